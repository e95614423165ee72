"""First drains: what waits for devices that have just connected.

After a restart thousands ask at once. Those that ask at the same moment are answered with one query; who comes alone, and those for
whom much waits, ask for themselves, a few at a time, in the order in which they came. The live devices, and what falls behind among
them, do not stand in that queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from time import monotonic
from typing import Final

import structlog

from relay.metrics import Metrics
from relay.routing.delivery import Backlog
from relay.store.backlogs import Asked
from relay.store.gatherer import Gatherer, GathererClosed, GathererFull
from relay.store.messages import Page
from relay.store.mongo import PyMongoError, brief

# A quarter of those that read pages (relay.store.messages): the live ones read, too.
_TURNS: Final = 4
# Of larger groups more would wait than is looked at for one (relay.store.backlogs).
_MOST: Final = 50
_QUEUE: Final = 50_000
_PATIENCE: Final = 0.1
_BESIDE: Final = 2
# A shard that is down fails the question for a group, and each device's own query knows what to do about it.
_REST_SECONDS: Final = 10.0

Pages = Callable[[Sequence[Asked]], Awaitable[Sequence[Page | None]]]
log = structlog.get_logger(__name__)


class FirstDrains:
    """A backlog (relay.routing.delivery) for connections that have not drained yet. ``pages`` answers many at once, and None for who
    should ask for themselves (relay.store.backlogs)."""

    def __init__(self, backlog: Backlog, pages: Pages, metrics: Metrics) -> None:
        self._backlog = backlog
        self._pages = pages
        self._turns = asyncio.Semaphore(_TURNS)
        self._rests_until = 0.0
        self._gatherer: Gatherer[Asked, Page | None] = Gatherer(
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
        if not exclude and not self._rests:
            page = await self._grouped(Asked(keys, now, limit, max_bytes))
            if page is not None:
                return page
        async with self._turns:
            return await self._backlog.waiting(keys, now, limit=limit, max_bytes=max_bytes, exclude=exclude)

    async def last_waiting(self, keys: Sequence[str]) -> int | None:
        """See ``Backlog``."""
        async with self._turns:
            return await self._backlog.last_waiting(keys)

    async def close(self) -> None:
        """Answers no group any more."""
        await self._gatherer.close()

    @property
    def _rests(self) -> bool:
        return monotonic() < self._rests_until

    async def _grouped(self, asked: Asked) -> Page | None:
        try:
            return await self._gatherer.answer(asked)
        except (GathererFull, GathererClosed):
            return None

    async def _ask(self, group: list[Asked]) -> Sequence[Page | None]:
        nobody: list[Page | None] = [None] * len(group)
        if self._rests or (len(group) == 1 and not self._turns.locked()):
            return nobody
        try:
            return await self._pages(group)
        except PyMongoError as error:
            self._rests_until = monotonic() + _REST_SECONDS
            log.warning("what waits is asked for each device by itself", error=brief(error))
        except Exception:
            log.exception("what waits is asked for each device by itself")
        return nobody
