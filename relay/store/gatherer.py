"""Questions in groups: while one group is asked, the next gathers.

There is no artificial delay: who comes alone is a group of one. A group that takes long holds up nobody for longer than a
moment: the next is asked beside it. Unlike a committer (batcher.py) a question may fail for all of its group, and the next
one is asked all the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from time import perf_counter
from typing import Final, Generic, TypeVar

from relay.metrics import Metrics
from relay.tasks import ended

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# So many go on at once when they are answered, then others have their turn.
_BURST: Final = 4


class GathererClosed(Exception):
    """The node is stopping: nothing more is asked."""


class GathererFull(Exception):
    """Too many wait for their turn."""


class _Group(Generic[Item, Answer]):
    """``prompt``: it has not taken long yet."""

    __slots__ = ("prompt", "waiters")

    def __init__(self, waiters: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        self.waiters = waiters
        self.prompt = True


class Gatherer(Generic[Item, Answer]):
    """``ask`` gets one group and answers each item of it, in the same order; an exception in the place of an answer is
    raised for that item, one that ``ask`` raises for each of its group. A group has at most ``most`` items. It is asked
    when no other one is, or when those that are have been for longer than ``patience`` (s) and are fewer than ``beside``;
    so that is how long an item waits for its turn, unless something hangs. At most ``queue`` items wait."""

    def __init__(
        self,
        name: str,
        ask: Callable[[list[Item]], Awaitable[Sequence[Answer | Exception]]],
        *,
        metrics: Metrics,
        most: int,
        queue: int,
        patience: float,
        beside: int,
    ) -> None:
        self._name = name
        self._ask = ask
        self._most = most
        self._queue = queue
        self._patience = patience
        self._beside = beside
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._prompt = 0
        self._closed = False
        self._sizes = metrics.batch.labels(name)
        self._times = metrics.commit.labels(name)
        metrics.watch_queue(name, lambda: len(self._waiting))

    @property
    def idle(self) -> bool:
        """Whether nothing is asked now."""
        return not self._tasks

    async def answer(self, item: Item) -> Answer:
        """The answer. Raises GathererFull and GathererClosed, and what became of the question. Who is cancelled harms nobody
        of the same group."""
        if self._closed:
            raise GathererClosed
        if len(self._waiting) >= self._queue:
            raise GathererFull
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, waiter))
        self._start()
        return await waiter

    async def close(self) -> None:
        """Ends what is asked; who waits gets GathererClosed."""
        self._closed = True
        await ended(self._tasks)
        self._refuse(self._waiting, GathererClosed())
        self._waiting.clear()

    def _start(self) -> None:
        """One more task, when there is something to ask and nothing that will be done in a moment."""
        if self._waiting and not self._prompt and len(self._tasks) < self._beside and not self._closed:
            self._prompt += 1
            # In a context of its own: a time limit of who happens to come first is not that of those who follow.
            task = asyncio.create_task(self._work(), name=f"gather {self._name}", context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # Should a fault of ours have ended it, who waits is not forgotten.
        self._start()

    async def _work(self) -> None:
        """Asks groups until nothing waits, or until one has taken so long that another task has gone on."""
        # Counted as prompt by who has started it.
        while True:
            group = _Group(self._take())
            if not group.waiters:
                self._prompt -= 1
                return
            timer = asyncio.get_running_loop().call_later(self._patience, self._is_late, group)
            try:
                await self._ask_group(group.waiters)
            except BaseException:
                self._refuse(group.waiters, GathererClosed())
                raise
            finally:
                timer.cancel()
                if group.prompt:
                    self._prompt -= 1
            if self._prompt or self._closed:
                return
            self._prompt += 1

    def _is_late(self, group: _Group[Item, Answer]) -> None:
        group.prompt = False
        self._prompt -= 1
        self._start()

    def _take(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        group: list[tuple[Item, asyncio.Future[Answer]]] = []
        while self._waiting and len(group) < self._most:
            item, waiter = self._waiting.popleft()
            # Who does not wait any more need not be asked for.
            if not waiter.done():
                group.append((item, waiter))
        return group

    async def _ask_group(self, group: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        began = perf_counter()
        try:
            answers = await self._ask([item for item, _ in group])
            if len(answers) != len(group):
                raise RuntimeError(f"{self._name}: {len(group)} asked, {len(answers)} answered")
        except Exception as error:  # noqa: BLE001 - every waiter is told; the next group is asked again
            self._refuse(group, error)
            return
        finally:
            self._sizes.observe(len(group))
            self._times.observe(perf_counter() - began)
        for number, ((_, waiter), answer) in enumerate(zip(group, answers, strict=True), 1):
            if not waiter.done():
                if isinstance(answer, Exception):
                    waiter.set_exception(answer)
                else:
                    waiter.set_result(answer)
            if not number % _BURST:
                await asyncio.sleep(0)

    @staticmethod
    def _refuse(waiters: Sequence[tuple[Item, asyncio.Future[Answer]]], error: Exception) -> None:
        for _, waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)
