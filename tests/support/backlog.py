"""A mailbox in memory for tests of delivery: it forgets nothing, hides nothing, and answers as slowly as it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Sequence
from typing import Any

from relay.routing.delivery import Backlog, Delivery
from relay.routing.outbox import Outbox
from relay.store.messages import Page
from relay.store.mongo import PyMongoError
from relay.wire.envelope import Envelope
from relay.wire.errors import Close
from relay.wire.ids import device_key

WINDOW = 256
WINDOW_BYTES = 1_048_576


def message(
    number: int, *awaiting: str, size: int = 500, seq: int | None = None, user: str = "ann"
) -> Envelope:
    """Message ``number`` of one conversation; its id and, unless told otherwise, its ``seq`` follow from it."""
    found = Envelope(
        "talk",
        f"00000000-0000-4000-8000-{number:012d}",
        user=user,
        device="phone",
        seq=number if seq is None else seq,
        at=1000 + number,
        kind="text",
        body=str(number),
        awaiting=list(awaiting or ("bob/phone",)),
    )
    found.size = size
    return found


class MemoryBacklog:
    """What waits, by document id. While ``gate`` is clear an answer is held back after it was read, as by a slow
    network; ``failures`` answers are errors. ``away`` messages are on a part that does not answer."""

    def __init__(self, *envelopes: Envelope) -> None:
        self.stored = {envelope.doc_id: envelope for envelope in envelopes}
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.failures = 0
        self.away: set[str] = set()
        self.queries = self.marks = 0

    def add(self, envelope: Envelope) -> None:
        """Stores a message."""
        self.stored[envelope.doc_id] = envelope

    def remove(self, doc_id: str) -> None:
        """The message has come to its end."""
        self.stored.pop(doc_id, None)

    async def waiting(
        self, keys: Sequence[str], now: int, *, limit: int, max_bytes: int, exclude: Collection[str]
    ) -> Page:
        """As the store does it."""
        assert limit >= 1
        assert max_bytes >= 1
        self.queries += 1
        left_out = set(exclude)
        found: list[Envelope] = []
        size = 0
        whole = True
        for envelope in sorted(self.stored.values(), key=lambda one: (one.seq, one.doc_id)):
            if envelope.doc_id in left_out | self.away or not set(keys) & set(envelope.awaiting):
                continue
            if len(found) == limit or (found and size + envelope.size > max_bytes):
                whole = False
                break
            found.append(envelope)
            size += envelope.size
        complete = not self.away
        await self._answer()
        return Page(found, exhausted=whole and len(found) < limit, complete=complete)

    async def last_waiting(self, keys: Sequence[str]) -> int | None:
        """As the store does it."""
        self.marks += 1
        seqs = [one.seq for one in self.stored.values() if set(keys) & set(one.awaiting)]
        await self._answer()
        return max(seqs, default=None)

    async def _answer(self) -> None:
        self.asked.set()
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise PyMongoError("no answer")


class LocalConnection:
    """A connection without a socket: what is sent collects in ``frames`` and, operation by operation, in ``operations``."""

    def __init__(
        self,
        backlog: Backlog,
        user: str = "bob",
        device: str = "phone",
        *,
        window: int = WINDOW,
        window_bytes: int = WINDOW_BYTES,
        outbox_bytes: int = 2_097_152,
    ) -> None:
        self.user = user
        self.device = device
        self.key = device_key(user, device)
        self.heard = asyncio.get_running_loop().time()
        self.pinged = False
        self.issued = 0
        self.expires = 1 << 40
        self.session: str | None = None
        self.quiet = False
        self.serial = 0
        self.pings = 0
        self.life: float | None = None
        self.closes: list[Close] = []
        self.frames: list[str] = []
        self.operations: list[dict[str, Any]] = []
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.behind = 0
        self.drained = 0
        self.outbox = Outbox(max_bytes=outbox_bytes, max_frame=262_144, on_room=self._on_room)
        self.delivery = Delivery(
            user,
            self.key,
            self.outbox,
            backlog,
            window=window,
            window_bytes=window_bytes,
            now=lambda: 5000,
            behind=self._count_behind,
            drained=self._drained,
        )
        self._writer = asyncio.create_task(self.outbox.run(self._send), name=f"writer {self.key}")

    def shut(self, close: Close) -> None:
        """Notes the close."""
        self.closes.append(close)

    def listen(self, now: float) -> None:
        """Bytes of an unfinished frame came at ``life``."""
        if self.life is not None:
            self.heard = max(self.heard, self.life)

    async def ping(self) -> None:
        """Notes the ping."""
        self.pinged = True
        self.pings += 1

    def got(self, name: str) -> list[dict[str, Any]]:
        """The operations of this name, in the order in which they left."""
        return [operation for operation in self.operations if operation["t"] == name]

    def bodies(self) -> list[int]:
        """The numbers of the messages that left, in order."""
        return [int(operation["body"]) for operation in self.got("msg")]

    async def close(self) -> None:
        """Ends the delivery and the writer."""
        await self.delivery.close()
        self.flowing.set()
        self.outbox.discard()
        await self._writer

    async def _send(self, frame: str) -> None:
        await self.flowing.wait()
        self.frames.append(frame)
        value = json.loads(frame)
        self.operations.extend(value if isinstance(value, list) else [value])

    def _on_room(self) -> None:
        if self.delivery.behind:
            self.delivery.has_room()

    def _count_behind(self, change: int) -> None:
        self.behind += change

    def _drained(self) -> None:
        self.drained += 1


async def turns(count: int = 12) -> None:
    """Lets everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)
