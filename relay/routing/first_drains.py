"""First drains: what waits for devices that have just connected.

After a restart thousands ask at once, and for most of them nothing waits. A few are asked for by themselves at a time, in the
order in which they came; while they are, the others gather, and one query tells for a whole group who has nothing to
wait for. The live devices, and what falls behind among them, do not stand in that queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from time import monotonic
from typing import Final

import structlog

from relay.metrics import Metrics
from relay.routing.delivery import Backlog
from relay.store.gatherer import Gatherer, GathererClosed, GathererFull
from relay.store.messages import Page
from relay.store.mongo import PyMongoError, brief

# A quarter of those that read pages (relay.store.messages): the live ones read, too.
_TURNS: Final = 4
_MOST: Final = 250
_QUEUE: Final = 50_000
_PATIENCE: Final = 0.1
_BESIDE: Final = 2
# A shard that is down fails the question for a group, and each device's own query knows what to do about it.
_REST_SECONDS: Final = 10.0

Empty = Callable[[Collection[str]], Awaitable[set[str]]]
log = structlog.get_logger(__name__)


class FirstDrains:
    """A backlog (relay.routing.delivery) for connections that have not drained yet. ``empty`` tells in which of many mailboxes
    nothing waits."""

    def __init__(self, backlog: Backlog, empty: Empty, metrics: Metrics) -> None:
        self._backlog = backlog
        self._empty = empty
        self._turns = asyncio.Semaphore(_TURNS)
        self._rests_until = 0.0
        self._gatherer: Gatherer[tuple[str, ...], bool] = Gatherer(
            "first drains",
            self._ask,
            metrics=metrics,
            most=_MOST,
            queue=_QUEUE,
            patience=_PATIENCE,
            beside=_BESIDE,
        )

    async def waiting(
        self, keys: Sequence[str], now: int, *, limit: int, max_bytes: int, exclude: Collection[str]
    ) -> Page:
        """See ``Backlog``."""
        crowded = self._turns.locked() or not self._gatherer.idle
        if crowded and not exclude and await self._has_nothing(keys):
            return Page([], exhausted=True)
        async with self._turns:
            return await self._backlog.waiting(keys, now, limit=limit, max_bytes=max_bytes, exclude=exclude)

    async def last_waiting(self, keys: Sequence[str]) -> int | None:
        """See ``Backlog``."""
        async with self._turns:
            return await self._backlog.last_waiting(keys)

    async def close(self) -> None:
        """Tells nobody any more that nothing waits."""
        await self._gatherer.close()

    async def _has_nothing(self, keys: Sequence[str]) -> bool:
        if monotonic() < self._rests_until:
            return False
        try:
            return await self._gatherer.answer(tuple(keys))
        except (GathererFull, GathererClosed):
            return False

    async def _ask(self, group: list[tuple[str, ...]]) -> list[bool]:
        """For each whether nothing waits in any of its mailboxes."""
        if monotonic() < self._rests_until:
            return [False] * len(group)
        try:
            empty = await self._empty([key for keys in group for key in keys])
        except PyMongoError as error:
            self._rests_until = monotonic() + _REST_SECONDS
            log.warning("what waits is asked for each device by itself", error=brief(error))
            return [False] * len(group)
        except Exception:
            log.exception("what waits is asked for each device by itself")
            return [False] * len(group)
        return [empty.issuperset(keys) for keys in group]
