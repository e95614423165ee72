"""The raw cycle: what MongoDB and the driver do when nothing is in their way. The relay's speed is quoted against it.

The same documents, the same indexes, the same durability and the same driver as the relay's; a group is inserted and then
deleted by the filter that acknowledgements use. Two cycles are under way at once, as in the relay.
"""

from __future__ import annotations

import asyncio
import secrets
from time import perf_counter, time_ns
from typing import Any, Final

import msgspec

from relay.store.documents import encode
from relay.store.mongo import Mongo
from relay.wire.clock import Clock
from relay.wire.envelope import Envelope
from relay.wire.ids import new_id
from scripts.tools.bench.processes import spent, usages

CYCLES_IN_FLIGHT: Final = 2
CONVERSATIONS: Final = 100
_WARMUP_SECONDS: Final = 1.0
_DAY: Final = 86_400


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """``rate`` in messages/s; ``cpu_us`` is CPU per message in µs, ``cores`` CPU seconds a second, by process (``bench``
    is the driver, ``others`` what does not belong to the run)."""

    rate: float
    messages: int
    seconds: float
    batch: int
    cycles: int
    size: int
    cpu_us: dict[str, float]
    cores: dict[str, float]


class _Cycles:
    """Cycles until told to stop; counts what is done while ``counting``."""

    def __init__(self, collection: Any, batch: int, size: int) -> None:
        self._collection = collection
        self._batch = batch
        self._body = "x" * size
        self._clock = Clock()
        self._names = [new_id() for _ in range(CONVERSATIONS)]
        self._turn = 0
        self.running = True
        self.counting = False
        self.done = 0

    async def run(self) -> None:
        """One lane of cycles."""
        while self.running:
            envelopes = [self._envelope() for _ in range(self._batch)]
            await self._collection.insert_many([encode(envelope) for envelope in envelopes], ordered=False)
            await self._collection.delete_many(
                {
                    "_id": {"$in": [envelope.doc_id for envelope in envelopes]},
                    "conversationId": {"$in": list({envelope.conversation for envelope in envelopes})},
                    "seq": {"$in": [envelope.seq for envelope in envelopes]},
                }
            )
            if self.counting:
                self.done += len(envelopes)

    def _envelope(self) -> Envelope:
        self._turn += 1
        place = self._turn % CONVERSATIONS
        return Envelope(
            self._names[place],
            f"{secrets.randbits(32):08x}-0000-4000-8000-{self._turn:012x}",
            user=f"sender-{place}",
            device="bench",
            seq=self._clock.next(),
            at=time_ns() // 1_000_000,
            kind="text",
            body=self._body,
            awaiting=[f"recipient-{place}/bench"],
        )


async def measure(
    uri: str, database: str, *, seconds: float, batch: int, cycles: int, size: int, pids: dict[str, int]
) -> Limit:
    """Runs cycles in ``database``, which is dropped afterwards. Raises MongoUnavailable and PyMongoError."""
    mongo = Mongo(uri, database)
    try:
        await mongo.prepare(30 * _DAY, 3 * _DAY)
        work = _Cycles(mongo.messages, batch, size)
        async with asyncio.TaskGroup() as group:
            for number in range(cycles):
                group.create_task(work.run(), name=f"cycle {number}")
            try:
                await asyncio.sleep(_WARMUP_SECONDS)
                work.counting = True
                before, started = usages(pids), perf_counter()
                await asyncio.sleep(seconds)
                work.counting = False
                after, elapsed = usages(pids), perf_counter() - started
            finally:
                work.running = False
        cpu = spent(before, after)
        return Limit(
            rate=work.done / elapsed,
            messages=work.done,
            seconds=elapsed,
            batch=batch,
            cycles=cycles,
            size=size,
            cpu_us={name: used * 1e6 / max(1, work.done) for name, used in cpu.items() if name != "others"},
            cores={name: used / elapsed for name, used in cpu.items()},
        )
    finally:
        await mongo.client.drop_database(database)
        mongo.close()
