"""What nodes tell each other: hints about what the store knows, and what is stored nowhere.

One parcel is what one node has for another at one moment. Nodes of one relay run the same code but for the minutes of an
upgrade: what cannot be read is dropped, and the sweep finds what it was about. An unknown hint is dropped alone; a node of the first
kind drops the parcel that holds it, so a kind that is added later travels in a parcel of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Final

import msgspec

from relay.routing.bus import Event
from relay.wire.envelope import Envelope
from relay.wire.framed import Framed


class Message(msgspec.Struct, array_like=True, tag="m"):
    """A committed message for devices of the node; ``copies`` are the documents in which their mailboxes await it."""

    framed: Framed
    shared: bool
    parts: int
    sealed: dict[str, str] | None
    copies: list[tuple[str, list[str]]]

    @classmethod
    def of(cls, envelope: Envelope) -> Message:
        """For no mailbox yet."""
        sealed: dict[str, str] | None = None if envelope.sealed is None else {}
        return cls(Framed.of(envelope), envelope.shared, envelope.parts, sealed, [])

    def add(self, envelope: Envelope, keys: list[str]) -> None:
        """These mailboxes of one document of the message."""
        self.copies.append((envelope.stored_id, keys))
        if envelope.sealed is not None and self.sealed is not None:
            self.sealed.update((key, envelope.sealed[key]) for key in keys if key in envelope.sealed)

    def envelopes(self) -> Iterable[Envelope]:
        """One for each document, as the committing node had it."""
        for stored_id, keys in self.copies:
            found = self.framed.envelope()
            found.awaiting, found.sealed = keys, self.sealed
            found.shared, found.parts, found.stored_id = self.shared, self.parts, stored_id
            yield found


class Released(msgspec.Struct, array_like=True, tag="r"):
    """These documents (id and mailbox) are awaited no more."""

    pairs: list[tuple[str, str]]


class Told(msgspec.Struct, array_like=True, tag="t"):
    """A live frame for the devices of these users, but not for the one with the key ``but``; or for the one with the key
    ``only``."""

    event: Event
    frame: str
    users: list[str]
    but: str | None = None
    only: str | None = None


class Replaced(msgspec.Struct, array_like=True, tag="x"):
    """The device with this key has connected elsewhere; its connection here had this number."""

    key: str
    serial: int


class Missed(msgspec.Struct, array_like=True, tag="d"):
    """Messages for the device with this key may have gone into the connection that it had before, while it came to this node."""

    key: str


class Changed(msgspec.Struct, array_like=True, tag="i"):
    """Members of these conversations, or devices, blocks or preferences of these users have changed; to be confirmed to
    ``node``."""

    node: str
    number: int
    conversations: list[str]
    users: list[str]


class Confirmed(msgspec.Struct, array_like=True, tag="c"):
    """What was changed with these numbers is believed no more by ``node``, and nothing is being committed by it."""

    node: str
    numbers: list[int]


class Seen(msgspec.Struct, array_like=True, tag="p"):
    """These users came, left or fell silent; with when they were last heard (ms), or 0."""

    users: list[tuple[str, int]]


class Recheck(msgspec.Struct, array_like=True, tag="k"):
    """Who may see these people, or whom they may see, has changed."""

    users: list[str]


class Quiet(msgspec.Struct, array_like=True, tag="q"):
    """Whether others shall be told what this user receives has changed, at this moment (ms)."""

    user: str
    quiet: bool
    moment: int = 0


class Ended(msgspec.Struct, array_like=True, tag="e"):
    """The tokens of the device with this key are not good any more."""

    key: str


class Beat(msgspec.Struct, array_like=True, tag="b"):
    """The channel works."""


class Back(msgspec.Struct, array_like=True, tag="w"):
    """What this node had to tell may not have gone out; now it does again."""


Hint = (
    Message
    | Released
    | Told
    | Replaced
    | Missed
    | Changed
    | Confirmed
    | Seen
    | Recheck
    | Quiet
    | Ended
    | Beat
    | Back
)


class Parcel(msgspec.Struct, array_like=True):
    """What one node sends; ``at`` is the time of Redis (ms), 0 when the sender does not know it."""

    node: str
    at: int
    hints: list[Hint]


class _Sealed(msgspec.Struct, array_like=True):
    """A parcel whose hints are not read yet."""

    node: str
    at: int
    hints: list[msgspec.Raw]


Unreadable: Final = msgspec.DecodeError
encode: Final = msgspec.msgpack.Encoder().encode
_all: Final = msgspec.msgpack.Decoder(Parcel).decode
_sealed: Final = msgspec.msgpack.Decoder(_Sealed).decode
_one: Final = msgspec.msgpack.Decoder(Hint).decode


def decode(data: bytes) -> Parcel:
    """The parcel, without those of its hints that cannot be read. Raises Unreadable for what is none."""
    try:
        return _all(data)
    except msgspec.ValidationError:
        sealed = _sealed(data)
    parcel = Parcel(sealed.node, sealed.at, [])
    for raw in sealed.hints:
        with suppress(msgspec.ValidationError):
            parcel.hints.append(_one(raw))
    return parcel
