"""Hot messages in Redis: what one node has committed to many devices, others need not read from MongoDB.

A help and never the truth: MongoDB says what waits for whom. Redis gets 200 ms; when it is late or away nothing is asked of
it for about a second (0.5 to 1.5 s), and what there was to keep is dropped. Of a cluster that goes for each master by itself.

What else lies there is small and worth more: who is connected where, and the counts of rate limits. So each node has a budget
of bytes for its copies, in which the oldest make room for new ones; and they live for a shorter time than a line of the
directory ever has left (relay.routing.directory), so that a Redis that is full all the same, and evicts by what ends first
(``volatile-ttl``), evicts them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from itertools import islice
from time import monotonic
from typing import Final

import msgspec
import structlog

from relay.redis_client import TROUBLE, close, connect
from relay.redis_servers import Command, Servers
from relay.tasks import ended
from relay.wire.envelope import Envelope
from relay.wire.framed import Framed
from relay.wire.ids import split_document_id

# A line of the directory has 60 s left, or more.
_SECONDS: Final = 45
_ANSWER_SECONDS: Final = 0.2
_PAUSE: Final = 1.0
_CONNECTIONS: Final = 8
_MOST_WAITING: Final = 1000
_MOST_BYTES: Final = 16_777_216
_AT_ONCE: Final = 100
_MOST_COPIES: Final = 20_000
_MOST_LEAVING: Final = 10_000
# What Redis needs for a copy beside its name and its value.
_OVERHEAD: Final = 200

log = structlog.get_logger(__name__)


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Framed).decode


class HotRedis:
    """Keeps messages for 45 seconds, at most 20,000 and ``max_bytes`` of its own node; a node that dies leaves its copies to their
    time. ``start`` and ``close`` it. Keys of one conversation share a hash slot."""

    def __init__(self, url: str, max_bytes: int) -> None:
        """Connects at the first use. Raises ValueError for what is no URL of Redis."""
        self._redis = connect(url, connections=_CONNECTIONS, seconds=_ANSWER_SECONDS)
        self._servers = Servers(self._redis, seconds=_ANSWER_SECONDS)
        self._max_bytes = max_bytes
        self._waiting: dict[str, Envelope] = {}
        self._size = 0
        # What is to leave, and when it has left by itself (monotonic).
        self._leaving: dict[str, float] = {}
        # What may lie there now, the oldest first: bytes, and until when (monotonic).
        self._copies: dict[str, tuple[int, float]] = {}
        self._copied = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ask_at = 0.0

    def start(self) -> None:
        """Begins to write."""
        self._task = asyncio.create_task(self._write(), name="hot messages")

    async def close(self) -> None:
        """Drops what is not written yet, and closes the connections."""
        if self._task is not None:
            await ended([self._task])
        await self._servers.close()
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await close(self._redis)
        except TROUBLE:
            return

    def put(self, envelope: Envelope) -> None:
        """Keeps a message, soon, unless too much waits already."""
        self._unqueue(envelope.doc_id)
        if envelope.doc_id in self._leaving:
            return
        if len(self._waiting) < _MOST_WAITING and self._size + envelope.size <= _MOST_BYTES:
            self._waiting[envelope.doc_id] = envelope
            self._size += envelope.size
            self._wake.set()

    def forget(self, doc_id: str) -> None:
        """Lets a message go, soon, or when Redis answers again: it is withdrawn. Of more than 10,000 at once the first leave by
        themselves."""
        self._unqueue(doc_id)
        self._leaving[doc_id] = monotonic() + _SECONDS
        if len(self._leaving) > _MOST_LEAVING:
            del self._leaving[next(iter(self._leaving))]
        self._wake.set()

    def forget_own(self, doc_id: str) -> None:
        """The same for what this node keeps there, or is about to."""
        if doc_id in self._waiting or doc_id in self._copies:
            self.forget(doc_id)

    def _unqueue(self, doc_id: str) -> None:
        envelope = self._waiting.pop(doc_id, None)
        if envelope is not None:
            self._size -= envelope.size

    async def find(self, wanted: Sequence[tuple[str, int]]) -> dict[str, Envelope]:
        """The messages of these document ids and ``seq`` that are kept; none when Redis does not answer."""
        found: dict[str, Envelope] = {}
        now = monotonic()
        if not wanted or now < self._ask_at:
            return found
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                values = await self._servers.ask([("GET", _key(doc_id)) for doc_id, _ in wanted])
            for (doc_id, seq), value in zip(wanted, values, strict=True):
                kept = None if value is None or isinstance(value, Exception) else _decode(value)
                if kept is not None and kept.seq == seq:
                    found[doc_id] = kept.envelope()
        except (*TROUBLE, msgspec.DecodeError) as error:
            self._pause(error)
        return found

    def _pause(self, error: BaseException) -> None:
        # Many nodes lose it at one moment, and must not all ask again at another.
        self._ask_at = monotonic() + _PAUSE * random.uniform(0.5, 1.5)
        log.debug("Redis keeps no hot messages now", error=type(error).__name__)

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting or self._leaving:
                pause = self._ask_at - monotonic()
                if pause <= 0:
                    leaving, values = self._take_leaving(), self._take()
                    if leaving or values:
                        await self._write_some(leaving, values)
                    elif self._leaving and not self._waiting:
                        # The master that has them does not answer.
                        await self._wait_for_more()
                    continue
                self._waiting.clear()
                self._size = 0
                if self._leaving:
                    await asyncio.sleep(pause)

    def _take_leaving(self) -> list[str]:
        """Some of what is to leave, and has not by itself. It stays noted until it has left."""
        now = monotonic()
        there = ((doc_id, until) for doc_id, until in self._leaving.items() if self._can_leave(doc_id))
        some = list(islice(there, _AT_ONCE))
        for doc_id, until in some:
            if until < now:
                del self._leaving[doc_id]
        return [doc_id for doc_id, until in some if until >= now]

    def _can_leave(self, doc_id: str) -> bool:
        return self._servers.answers(_key(doc_id))

    async def _wait_for_more(self) -> None:
        try:
            async with asyncio.timeout(_PAUSE):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def _take(self) -> dict[str, bytes]:
        """The copies to make next."""
        values: dict[str, bytes] = {}
        size = 0
        for doc_id, envelope in list(islice(self._waiting.items(), _AT_ONCE)):
            value = _encode(Framed.of(envelope))
            cost = _cost(doc_id, value)
            if values and size + cost > self._max_bytes:
                break
            if cost <= self._max_bytes:
                values[doc_id] = value
                size += cost
            self._unqueue(doc_id)
        return values

    async def _write_some(self, leaving: Sequence[str], values: Mapping[str, bytes]) -> None:
        now = monotonic()
        costs = {doc_id: _cost(doc_id, value) for doc_id, value in values.items()}
        gone = [*leaving, *self._room_for(costs, now)]
        # They count from now on, and what is to go until it has gone: of a question that was not answered nobody knows.
        for doc_id, cost in costs.items():
            self._uncount(doc_id)
            self._copies[doc_id] = (cost, now + _SECONDS + _ANSWER_SECONDS)
            self._copied += cost
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                commands: list[Command] = [("UNLINK", _key(doc_id)) for doc_id in gone]
                commands += [("SET", _key(doc_id), value, "EX", _SECONDS) for doc_id, value in values.items()]
                answers = await self._servers.ask(commands)
            for doc_id, answer in zip(gone, answers, strict=False):
                if not isinstance(answer, Exception):
                    self._uncount(doc_id)
                    self._leaving.pop(doc_id, None)
        except TROUBLE as error:
            self._pause(error)
        except Exception as error:
            log.exception("hot messages were not kept")
            self._pause(error)

    def _room_for(self, costs: Mapping[str, int], now: float) -> list[str]:
        """The oldest copies, as many as must go for these."""
        for doc_id in [
            doc_id for doc_id, (_, until) in islice(self._copies.items(), 2 * _AT_ONCE) if until < now
        ]:
            self._uncount(doc_id)
        replaced = [doc_id for doc_id in costs if doc_id in self._copies]
        excess = self._copied + sum(costs.values()) - self._max_bytes
        excess -= sum(self._copies[doc_id][0] for doc_id in replaced)
        surplus = len(self._copies) - len(replaced) + len(costs) - _MOST_COPIES
        oldest: list[str] = []
        for doc_id, (cost, _) in self._copies.items():
            if excess <= 0 and surplus <= 0:
                break
            if doc_id not in costs:
                oldest.append(doc_id)
                excess -= cost
                surplus -= 1
        return oldest

    def _uncount(self, doc_id: str) -> None:
        self._copied -= self._copies.pop(doc_id, (0, 0.0))[0]


def _cost(doc_id: str, value: bytes) -> int:
    return _OVERHEAD + len(_key(doc_id)) + len(value)


def _key(doc_id: str) -> str:
    conversation, message = split_document_id(doc_id)
    return f"relay:hot:{{{conversation}}}:{message}"
