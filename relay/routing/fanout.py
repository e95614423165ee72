"""Messages to many devices are handed out in slices, so that other sockets are served in between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from relay.wire.envelope import Envelope

_MOST_WAITING: Final = 20_000
# A turn of the loop with so many sockets to write to takes about a millisecond.
_SLICE: Final = 16


class Fanout:
    """A queue of parts of messages. ``deliver`` hands one part to those of these recipients that are connected. ``start`` and
    ``close`` it. What is not handed out when it closes waits in the store."""

    def __init__(self, deliver: Callable[[Envelope, Sequence[str]], None]) -> None:
        self._deliver = deliver
        self._queue: deque[Envelope] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._task: asyncio.Task[None] | None = None
        self.waiting = 0
        """Recipients of the parts that are queued."""

    def start(self) -> None:
        """Begins to hand out."""
        self._task = asyncio.create_task(self._run(), name="fanout")

    def put(self, part: Envelope) -> None:
        """Queues one part. Never refuses: whoever commits them waits for ``room`` first."""
        self._queue.append(part)
        self.waiting += len(part.awaiting)
        if self.waiting >= _MOST_WAITING:
            self._room.clear()
        self._wake.set()

    async def room(self) -> None:
        """Waits until the queue is at most half full."""
        await self._room.wait()

    async def close(self) -> None:
        """Ends."""
        self._room.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                part = self._queue.popleft()
                awaiting = part.awaiting
                for start in range(0, len(awaiting), _SLICE):
                    some = awaiting[start : start + _SLICE]
                    self._deliver(part, some)
                    self.waiting -= len(some)
                    if self.waiting <= _MOST_WAITING // 2:
                        self._room.set()
                    # One turn of the loop for everybody else, and for the sockets that were just written to.
                    await asyncio.sleep(0)
