"""Messages that many devices drain: decoded and encoded once for all of them, and while they are hot not read again.

What waits for a device is always asked of the store; only the content comes from here, by document id and ``seq``. So a
message that was withdrawn, or has expired, is not delivered though it may still be here. A withdrawn one leaves all the same, and
is not taken back: a page that was being read when it was deleted, or a first attempt that came through late, would bring it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from copy import copy
from itertools import islice
from time import monotonic
from typing import Final

from relay.store.hot_redis import HotRedis
from relay.wire.envelope import Envelope
from relay.wire.ids import head_id

_OVERHEAD: Final = 1000
# Each further piece: the value, its name, and what it names as recipients.
_PIECE: Final = 700
_RECIPIENT: Final = 8
_SECONDS: Final = 300.0
# How much one page weighs in what is remembered of the last ones.
_WEIGHT: Final = 0.2
_WARM: Final = 0.5
_MOST_WITHDRAWN: Final = 10_000
_AT_ONCE: Final = 500


class _Message:
    """One message: its pieces by stored id, which share one encoded frame."""

    __slots__ = ("pieces", "seq", "size", "until")

    def __init__(self, envelope: Envelope, now: float) -> None:
        self.seq = envelope.seq
        self.size = _OVERHEAD + 2 * envelope.size
        self.until = now + _SECONDS
        self.pieces = {envelope.stored_id: envelope}


class HotMessages:
    """At most ``max_bytes`` of messages (0: none), those used least recently leave first, each after five minutes. Sealed ones
    are not kept: each device has a content of its own."""

    def __init__(self, max_bytes: int, elsewhere: HotRedis | None = None) -> None:
        """``elsewhere``: where nodes share them."""
        self._max_bytes = max_bytes
        self._elsewhere = elsewhere
        self._messages: OrderedDict[str, _Message] = OrderedDict()
        # The same, the oldest first.
        self._by_age: dict[str, _Message] = {}
        # Those not to be taken back, and until when (monotonic).
        self._withdrawn: dict[str, float] = {}
        # With others to ask, it begins with asking them.
        self._hits = 0.0 if elsewhere is None else 1.0
        self.size = 0

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def warm(self) -> bool:
        """Whether what is asked for lately was mostly here: then asking the store for ids alone saves reading."""
        return self._hits > _WARM

    def asked(self, hits: int, total: int) -> None:
        """Of so many messages of a page so many were here."""
        if total:
            self._hits += _WEIGHT * (hits / total - self._hits)

    def put(self, envelope: Envelope) -> None:
        """Keeps a message that others await, too."""
        if not self._max_bytes or not envelope.shared or envelope.sealed is not None:
            return
        if envelope.doc_id in self._withdrawn:
            return
        known = self._messages.get(envelope.doc_id)
        if known is not None:
            if known.seq == envelope.seq:
                self._add(known, envelope)
                return
            self._drop(envelope.doc_id)
        message = _Message(envelope, monotonic())
        self._messages[envelope.doc_id] = self._by_age[envelope.doc_id] = message
        self.size += message.size
        self._trim()

    def find(self, stored_id: str, seq: int) -> Envelope | None:
        """The message of this document with this ``seq``, when it is here. What it says of recipients is not to be used."""
        doc_id = head_id(stored_id)
        message = self._messages.get(doc_id)
        if message is None or message.seq != seq:
            return None
        if message.until < monotonic():
            self._drop(doc_id)
            return None
        self._messages.move_to_end(doc_id)
        piece = message.pieces.get(stored_id)
        if piece is None:
            piece = _piece(next(iter(message.pieces.values())), stored_id)
            self._add(message, piece)
        return piece

    def forget(self, doc_id: str) -> None:
        """Lets a message go, for all nodes: it is withdrawn, and deleted for good."""
        self._leave(doc_id)
        if self._elsewhere is not None:
            self._elsewhere.forget(doc_id)

    def withdrawn_elsewhere(self, doc_id: str) -> None:
        """Lets a message go that another node withdraws, which has it deleted and looks after what nodes share."""
        self._leave(doc_id)
        if self._elsewhere is not None:
            self._elsewhere.forget_own(doc_id)

    async def tidy(self) -> None:
        """Lets go what is older than five minutes. Call now and then: nobody may ask for it any more."""
        more = True
        while more:
            more = self._let_go(monotonic())
            await asyncio.sleep(0)

    def _let_go(self, now: float) -> bool:
        """Some of what is too old; whether there may be more."""
        old = [name for name, one in islice(self._by_age.items(), _AT_ONCE) if one.until < now]
        over = [name for name, until in islice(self._withdrawn.items(), _AT_ONCE) if until < now]
        for name in old:
            self._drop(name)
        for name in over:
            del self._withdrawn[name]
        return max(len(old), len(over)) == _AT_ONCE

    def _leave(self, doc_id: str) -> None:
        if not self._max_bytes:
            return
        self._drop(doc_id)
        self._withdrawn.pop(doc_id, None)
        self._withdrawn[doc_id] = monotonic() + _SECONDS
        if len(self._withdrawn) > _MOST_WITHDRAWN:
            del self._withdrawn[next(iter(self._withdrawn))]

    def _add(self, message: _Message, piece: Envelope) -> None:
        if piece.stored_id in message.pieces:
            return
        message.pieces[piece.stored_id] = piece
        size = _PIECE + _RECIPIENT * len(piece.awaiting)
        message.size += size
        self.size += size
        self._trim()

    def _trim(self) -> None:
        while self.size > self._max_bytes:
            self._drop(next(iter(self._messages)))

    def _drop(self, doc_id: str) -> None:
        message = self._messages.pop(doc_id, None)
        if message is not None:
            del self._by_age[doc_id]
            self.size -= message.size

    def committed(self, envelopes: Iterable[Envelope]) -> None:
        """Keeps what was just stored in parts, for the other nodes, too."""
        for envelope in envelopes:
            if envelope.parts > 1 and envelope.doc_id not in self._withdrawn:
                self.put(envelope)
                if self._elsewhere is not None and not envelope.number and envelope.sealed is None:
                    self._elsewhere.put(envelope)

    async def fetch(self, places: Iterable[tuple[str, int]]) -> None:
        """Looks elsewhere for the messages of these stored ids and ``seq`` that are not here. What is found is here then."""
        if self._elsewhere is None or not self._max_bytes:
            return
        wanted = {head_id(stored_id): seq for stored_id, seq in places}
        for envelope in (await self._elsewhere.find(list(wanted.items()))).values():
            self.put(envelope)


def _piece(other: Envelope, stored_id: str) -> Envelope:
    """The same message in another of its documents."""
    # Encoded before it is copied, so that all share it.
    other.frame_for("")
    piece = copy(other)
    piece.stored_id = stored_id
    place = stored_id[len(piece.doc_id) + 1 :]
    piece.writing, number = place.split(".") if place else (other.writing, "0")
    piece.number = int(number)
    return piece
