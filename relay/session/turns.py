"""Taking turns with everybody else who uses the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Final

_BURST: Final = 8
# Others have so many times as long as those that went on took, and at most so long (s).
_SHARE: Final = 40
_MOST_SECONDS: Final = 0.3
# A storm has to end: while it shrinks to this part, the others' turns take so long (s) altogether, however many wait.
_PART: Final = 8
_ALL_SECONDS: Final = 12.0


class Turns:
    """A few go on at a time, in the order in which they came, and then the event loop is everybody else's for several times as long as
    that took: thousands that are ready at the same moment would hold up live traffic until all of them are served. While there are no
    ``others`` it is theirs, whoever they may be, for as long as that took."""

    def __init__(self, burst: int = _BURST, *, others: Callable[[], bool] = lambda: True) -> None:
        self._burst = burst
        self._others = others
        self._left = burst
        # The most that have waited at once.
        self._peak = 0
        self._queue: deque[Callable[[], bool]] = deque()
        self._next: asyncio.Handle | None = None

    def __len__(self) -> int:
        return len(self._queue)

    async def turn(self) -> None:
        """Waits for one's turn; not at all when few come."""
        if self.free():
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.later(partial(_wake, waiter))
        await waiter

    def free(self) -> bool:
        """Whether it is one's turn at once, which is taken then. Otherwise call ``later``."""
        if self._next is None:
            self._next = asyncio.get_running_loop().call_soon(self._turn)
        if self._left and not self._queue:
            self._left -= 1
            return True
        return False

    def later(self, then: Callable[[], bool]) -> None:
        """Calls ``then`` when it is one's turn; it says whether it has done anything."""
        self._queue.append(then)
        self._peak = max(self._peak, len(self._queue))

    def _turn(self) -> None:
        self._left = self._burst
        # First of all: whatever somebody's turn brings, others have theirs. Those that go on now are run before that, and so is
        # what came from sockets meanwhile.
        loop = asyncio.get_running_loop()
        self._next = loop.call_soon(self._after, 2, perf_counter()) if self._queue else None
        while self._queue and self._left:
            if self._queue.popleft()():
                self._left -= 1

    def _after(self, steps: int, began: float) -> None:
        """When those that went on have run, the others have as much time as that took."""
        loop = asyncio.get_running_loop()
        if steps:
            self._next = loop.call_soon(self._after, steps - 1, began)
        else:
            took = perf_counter() - began
            if len(self._queue) <= self._peak // _PART:
                self._peak = len(self._queue)
            enough = _ALL_SECONDS * self._burst / max(1, self._peak)
            share = _SHARE if self._others() else 1
            self._next = loop.call_later(min(share * took, _MOST_SECONDS, enough), self._turn)


def _wake(waiter: asyncio.Future[None]) -> bool:
    if waiter.done():
        return False
    waiter.set_result(None)
    return True
