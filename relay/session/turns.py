"""Taking turns with everybody else who uses the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

_BURST: Final = 4


class Turns:
    """A few go on at each turn of the event loop, in the order in which they came: thousands that are ready at the same
    moment would hold up live traffic for as long as all of them take."""

    def __init__(self, burst: int = _BURST) -> None:
        self._burst = burst
        self._left = burst
        self._queue: deque[asyncio.Future[None]] = deque()
        self._next: asyncio.Handle | None = None

    def __len__(self) -> int:
        return len(self._queue)

    async def turn(self) -> None:
        """Waits for one's turn; not at all when few come."""
        loop = asyncio.get_running_loop()
        if self._next is None:
            self._next = loop.call_soon(self._turn)
        if self._left and not self._queue:
            self._left -= 1
            return
        waiter: asyncio.Future[None] = loop.create_future()
        self._queue.append(waiter)
        await waiter

    def _turn(self) -> None:
        self._left = self._burst
        while self._queue and self._left:
            waiter = self._queue.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._left -= 1
        # Those that go on now are run before the next turn, and so is what came from sockets meanwhile.
        self._next = asyncio.get_running_loop().call_soon(self._turn) if self._queue else None
        if self._next is None:
            self._left = self._burst
