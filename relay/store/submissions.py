"""Messages on their way into the store, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Final, NamedTuple

from bson.raw_bson import RawBSONDocument

from relay.store.audience import Audience, refusal_error
from relay.store.documents import encode
from relay.wire.envelope import Envelope
from relay.wire.errors import RelayError
from relay.wire.ids import new_writing, user_of


class Stored(NamedTuple):
    """A durable message. ``fresh`` is False when an earlier attempt had stored it."""

    seq: int
    at: int
    fresh: bool


class GivenUp(NamedTuple):
    """A message whose outcome was still unknown at its deadline; ``since`` is monotonic. ``trimmed`` counts the full mailboxes
    that it was left out of."""

    seq: int
    awaiting: Sequence[str]
    trimmed: int
    since: float


_NONE: Final[Mapping[str, tuple[list[str], list[str]]]] = MappingProxyType({})
Done = Callable[[Stored | RelayError], None]


class Submission:
    """One message on its way into the store; ``done`` is called exactly once. ``also`` are mailboxes that get it besides the
    audience's: a system message tells those who were removed, too. ``check`` raises RelayError when it must not go to
    recipients that were resolved again.

    With more than ``inline`` recipients it is *large*: stored in ``pieces``, the head first. Else the only piece is the
    envelope. ``raws`` are their stored forms, ``size`` the bytes of all; ``writings`` are the recipients of every attempt, and the
    full mailboxes that it was left out of. ``held`` while it cannot be told whether it is on record as gone; ``renewed``
    when its recipients have changed after it was tried.
    """

    __slots__ = (
        "again",
        "also",
        "audience",
        "check",
        "deadline",
        "done",
        "envelope",
        "held",
        "inline",
        "large",
        "pieces",
        "raws",
        "renewed",
        "sender_key",
        "settled",
        "size",
        "writing",
        "writings",
    )

    def __init__(
        self,
        envelope: Envelope,
        audience: Audience,
        sender_key: str,
        *,
        again: bool,
        deadline: float,
        done: Done,
        also: Sequence[str] = (),
        check: Callable[[Audience], None] | None = None,
        inline: int | None = None,
    ) -> None:
        self.also = also
        self.check = check
        self.envelope = envelope
        self.inline = inline
        self.large = inline is not None and len(envelope.awaiting) > inline
        self.audience = audience
        self.sender_key = sender_key
        self.again = again
        self.deadline = deadline
        self.done = done
        self.settled = False
        self.held = False
        self.renewed = False
        self.writings: Mapping[str, tuple[list[str], list[str]]] = _NONE
        self.encode()

    def encode(self) -> None:
        """Makes the stored form, for the recipients that the envelope has now. A new writing: what an attempt before has
        written for others is not taken for this. Raises bson.errors.BSONError."""
        envelope = self.envelope
        if not self.large or self.inline is None:
            self.writing = ""
            envelope.resent = self.again
            self.pieces = [envelope]
            self.raws: list[RawBSONDocument] = [encode(envelope)]
            self.size = envelope.size
            return
        self.writing = new_writing()
        self.pieces = envelope.split(self.inline, self.writing)
        self.writings = {**self.writings, self.writing: (envelope.awaiting, envelope.trimmed)}
        self.raws = [encode(piece) for piece in self.pieces]
        self.size = sum(piece.size for piece in self.pieces)
        envelope.size = self.pieces[0].size

    def concerns(self, conversations: Collection[str], users: AbstractSet[str]) -> bool:
        """Whether it may go to recipients that a change of these conversations, or of these users' devices or blocks, makes
        outdated. One whose audience is not fresh may just be getting another."""
        if self.envelope.conversation in conversations:
            return True
        if not users:
            return False
        audience = self.audience
        return (
            not audience.fresh
            or not users.isdisjoint(audience.members)
            or any(user_of(key) in users for key in self.also)
        )

    def settle(self, outcome: Stored | RelayError) -> None:
        """Tells the sender, once."""
        if not self.settled:
            self.settled = True
            self.done(outcome)


def stranger(submission: Submission) -> RelayError:
    """What a sender hears who may not, or not any more, write there."""
    refusal = submission.audience.refusals.get(submission.envelope.user)
    return refusal_error(refusal) if refusal is not None else RelayError("not_member", "no such conversation")


def unreachable() -> RelayError:
    """What a sender hears while the part of the store that has the conversation does not answer."""
    return RelayError(
        "unavailable", "the store does not answer for this conversation; send again", retry_after=1000
    )


def conflict() -> RelayError:
    """What a sender hears whose message has the id of another's."""
    return RelayError("id_conflict", "this id is taken by another message")
