"""Hot messages in Redis: what one node has committed to many devices, others need not read from MongoDB.

A help and never the truth: MongoDB says what waits for whom. Redis gets 200 ms; when it is late or away nothing is asked of
it for a second, and what there was to keep is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Final

import msgspec
import structlog

from relay.redis_client import TROUBLE, close, connect
from relay.tasks import ended
from relay.wire.envelope import Envelope
from relay.wire.framed import Framed
from relay.wire.ids import split_document_id

_SECONDS: Final = 300
_ANSWER_SECONDS: Final = 0.2
_PAUSE: Final = 1.0
_CONNECTIONS: Final = 8
_MOST_WAITING: Final = 1000
_MOST_BYTES: Final = 16_777_216
_AT_ONCE: Final = 100

log = structlog.get_logger(__name__)


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Framed).decode


class HotRedis:
    """Keeps messages for five minutes. ``start`` and ``close`` it. Keys of one conversation share a hash slot."""

    def __init__(self, url: str) -> None:
        """Connects at the first use. Raises ValueError for what is no URL of Redis."""
        self._redis = connect(url, connections=_CONNECTIONS, seconds=_ANSWER_SECONDS)
        self._waiting: deque[Envelope | str] = deque()
        self._size = 0
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
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await close(self._redis)
        except TROUBLE:
            return

    def put(self, envelope: Envelope) -> None:
        """Keeps a message, soon, unless too much waits already."""
        if len(self._waiting) < _MOST_WAITING and self._size + envelope.size <= _MOST_BYTES:
            self._waiting.append(envelope)
            self._size += envelope.size
            self._wake.set()

    def forget(self, doc_id: str) -> None:
        """Lets a message go, soon: it is withdrawn. What is dropped here leaves after five minutes."""
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(doc_id)
            self._wake.set()

    async def find(self, wanted: Sequence[tuple[str, int]]) -> dict[str, Envelope]:
        """The messages of these document ids and ``seq`` that are kept; none when Redis does not answer."""
        found: dict[str, Envelope] = {}
        now = monotonic()
        if not wanted or now < self._ask_at:
            return found
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                async with self._redis.pipeline(transaction=False) as pipe:
                    for doc_id, _ in wanted:
                        pipe.get(_key(doc_id))
                    values = await pipe.execute()
            for (doc_id, seq), value in zip(wanted, values, strict=True):
                kept = None if value is None else _decode(value)
                if kept is not None and kept.seq == seq:
                    found[doc_id] = kept.envelope()
        except (*TROUBLE, msgspec.DecodeError) as error:
            self._pause(error)
        return found

    def _pause(self, error: BaseException) -> None:
        self._ask_at = monotonic() + _PAUSE
        log.debug("Redis keeps no hot messages now", error=type(error).__name__)

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                some = [self._waiting.popleft() for _ in range(min(_AT_ONCE, len(self._waiting)))]
                self._size -= sum(one.size for one in some if isinstance(one, Envelope))
                if monotonic() >= self._ask_at:
                    await self._write_some(some)

    async def _write_some(self, some: Sequence[Envelope | str]) -> None:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                async with self._redis.pipeline(transaction=False) as pipe:
                    for one in some:
                        if isinstance(one, str):
                            pipe.unlink(_key(one))
                        else:
                            pipe.set(_key(one.doc_id), _encode(Framed.of(one)), ex=_SECONDS)
                    await pipe.execute()
        except TROUBLE as error:
            self._pause(error)
        except Exception as error:
            log.exception("hot messages were not kept")
            self._pause(error)


def _key(doc_id: str) -> str:
    conversation, message = split_document_id(doc_id)
    return f"relay:hot:{{{conversation}}}:{message}"
