"""Group commit: whatever is queued is committed together, while the next group gathers.

There is no artificial delay. With one item at a time the group is one item; under load it grows by itself up to the
limits. Measured on the insert path: one at a time 2,700/s, groups of 200 67,000/s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Final, Generic, TypeVar

from relay.metrics import Metrics

Item = TypeVar("Item")
_EAGER_PART: Final = 8
_BUSY_PART: Final = 2
_LONGEST_REST: Final = 0.2


class BatcherClosed(Exception):
    """The node is stopping, or a committer died: nothing more is taken."""


class Batcher(Generic[Item]):
    """A bounded queue with committers behind it.

    ``commit`` gets one group, resolves every item of it by itself, and never raises: an exception from it is a fault of
    ours and ends this batcher (``dead`` is called once, the node stops; a supervisor restarts it). ``abandon`` is called
    with the items that will not be committed. With ``spacing`` (seconds) groups that are not worth a call of their own start
    at least so far apart: for work that hardly anybody waits for, where a call costs more than a moment's wait. When a call takes
    longer than that while the store has work of ``others``, the next one comes after a rest as long (0.2 s at most), or with half
    a full group, or when sources are held back.
    """

    def __init__(
        self,
        name: str,
        commit: Callable[[list[Item]], Awaitable[None]],
        abandon: Callable[[list[Item]], None],
        *,
        metrics: Metrics,
        max_items: int,
        max_bytes: int,
        queue_items: int,
        queue_bytes: int,
        workers: int,
        dead: Callable[[BaseException], None],
        spacing: float = 0,
        others: Callable[[], bool] = lambda: False,
    ) -> None:
        self._commit = commit
        self._abandon = abandon
        self._max_items = max_items
        self._max_bytes = max_bytes
        self._queue_items = queue_items
        self._queue_bytes = queue_bytes
        self._dead = dead
        self._spacing = spacing
        self._others = others
        self._queue: deque[tuple[Item, int, int]] = deque()
        self._count = 0
        self._bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        # While one group is under way, another starts only when it is worth a call of its own: many small calls cost more
        # than the wait.
        self._eager = max(1, max_items // _EAGER_PART)
        self._busy = max(1, max_items // _BUSY_PART)
        # So many end the rest of a committer.
        self._enough = self._eager
        self._rested = asyncio.Event()
        self._open = True
        self._flying = 0
        self._sizes = metrics.batch.labels(name)
        self._times = metrics.commit.labels(name)
        metrics.watch_queue(name, lambda: self._count, lambda: self._bytes)
        self._workers = [asyncio.create_task(self._work(), name=f"commit-{name}-{n}") for n in range(workers)]

    def submit(self, item: Item, size: int, weight: int = 1) -> None:
        """Queues one item of ``size`` bytes that counts as ``weight``. Raises BatcherClosed.

        Never refuses for lack of room: callers hold back their sources with ``room`` instead, so one frame's worth of
        items may go over the limit.
        """
        if not self._open:
            raise BatcherClosed
        self._queue.append((item, size, weight))
        self._count += weight
        self._bytes += size
        if self._count >= self._queue_items or self._bytes >= self._queue_bytes:
            self._room.clear()
            self._rested.set()
        if not self._flying or self._count >= self._eager:
            self._wake.set()
            if self._count >= self._enough:
                self._rested.set()

    @property
    def full(self) -> bool:
        """Whether sources should be held back now."""
        return not self._room.is_set()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or being committed."""
        return not self._queue and not self._flying

    async def room(self) -> None:
        """Waits until the queue is at most half full again, or the batcher has closed."""
        await self._room.wait()

    def refuse(self, refuse: Callable[[list[Item]], None]) -> None:
        """Takes everything out of the queue and hands it to ``refuse``; what is being committed goes on."""
        rest = [item for item, _, _ in self._queue]
        self._queue.clear()
        self._count = self._bytes = 0
        self._room.set()
        if rest:
            refuse(rest)

    async def close(self, timeout: float) -> None:
        """Takes nothing more, commits what is queued for at most ``timeout`` seconds, abandons the rest."""
        self._open = False
        self._wake.set()
        self._rested.set()
        self._room.set()
        _, late = await asyncio.wait(self._workers, timeout=timeout)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        self._give_up()

    async def _work(self) -> None:
        try:
            while True:
                while not self._queue or (self._open and self._flying and self._count < self._eager):
                    if not self._open:
                        return
                    self._wake.clear()
                    await self._wake.wait()
                batch = self._take()
                self._flying += 1
                started = perf_counter()
                try:
                    await self._commit(batch)
                except asyncio.CancelledError:
                    self._abandon(batch)
                    raise
                except Exception:
                    self._abandon(batch)
                    raise
                finally:
                    self._flying -= 1
                self._sizes.observe(len(batch))
                taken = perf_counter() - started
                self._times.observe(taken)
                if self._spacing:
                    await self._rest(taken)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the node must not go on without its committer
            first, self._open = self._open, False
            self._room.set()
            self._give_up()
            if first:
                self._dead(error)

    async def _rest(self, taken: float) -> None:
        if taken < self._spacing:
            seconds, self._enough = self._spacing - taken, self._eager
        elif self._others():
            seconds, self._enough = min(taken, _LONGEST_REST), self._busy
        else:
            return
        if self._count >= self._enough or self.full or not self._open:
            return
        self._rested.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._rested.wait()

    def _take(self) -> list[Item]:
        batch: list[Item] = []
        count = size = 0
        queue = self._queue
        while queue and count < self._max_items and (not size or size + queue[0][1] <= self._max_bytes):
            item, item_size, weight = queue.popleft()
            batch.append(item)
            count += weight
            size += item_size
        self._count -= count
        self._bytes -= size
        if (
            not self._room.is_set()
            and self._count <= self._queue_items // 2
            and self._bytes <= self._queue_bytes // 2
        ):
            self._room.set()
        return batch

    def _give_up(self) -> None:
        self.refuse(self._abandon)
