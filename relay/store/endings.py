"""What ends a message, as values: acknowledgements and removals, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from relay.store.ledger import Fate
from relay.wire import ids


class Sole(NamedTuple):
    """What a connection knows of a message that only its device ever awaited: enough to delete it, and to tell its fate,
    without reading it."""

    seq: int
    user: str
    device: str
    at: int


class Ack:
    """One device has these messages on disk, since ``at`` (ms). ``messages`` maps document ids to what is known. ``quiet``: its
    user does not want other people to learn of it."""

    __slots__ = ("at", "deadline", "device", "done", "key", "messages", "quiet", "user")

    def __init__(
        self,
        user: str,
        device: str,
        messages: Mapping[str, Sole | None],
        *,
        at: int,
        deadline: float,
        done: Callable[[bool], None],
        quiet: bool = False,
    ) -> None:
        self.quiet = quiet
        self.user = user
        self.device = device
        self.key = ids.device_key(user, device)
        self.messages = messages
        self.at = at
        self.deadline = deadline
        self.done = done


class Removal:
    """These messages end now, for everybody who still awaits them; with ``whole`` their parts, too. With ``sender`` only those that
    this user has sent."""

    __slots__ = ("deadline", "doc_ids", "done", "fate", "sender", "whole")

    def __init__(
        self,
        doc_ids: Sequence[str],
        fate: Fate,
        *,
        deadline: float,
        done: Callable[[bool], None] | None = None,
        whole: bool = False,
        sender: str | None = None,
    ) -> None:
        self.doc_ids = doc_ids
        self.fate = fate
        self.sender = sender
        self.whole = whole
        self.deadline = deadline
        self.done = done or _nothing


class Release:
    """These mailboxes are nobody's any more: the messages stop waiting for them."""

    __slots__ = ("deadline", "doc_ids", "done", "keys")

    def __init__(
        self, doc_ids: Sequence[str], keys: Sequence[str], *, deadline: float, done: Callable[[bool], None]
    ) -> None:
        self.doc_ids = doc_ids
        self.keys = keys
        self.deadline = deadline
        self.done = done


class Acknowledged(NamedTuple):
    """A device's acknowledgement of one message is durable. ``user`` and ``device`` are the message's sender. ``quiet``: nobody
    but the acknowledging user may learn of it."""

    doc_id: str
    user: str
    device: str
    by_user: str
    by_device: str
    at: int
    accepted_at: int
    quiet: bool = False


@dataclass(slots=True)
class Settlement:
    """What one group brought about, for the router."""

    acknowledged: list[Acknowledged]
    released: list[tuple[str, str]]
    """(document id, device key) pairs that no connection needs to hold credit for any more."""
    withdrawn: list[str] = field(default_factory=list)
    """Ids of messages that their sender has withdrawn: they are gone, or never were there."""


Ending = Ack | Removal | Release


def _nothing(_: bool) -> None:
    return None
