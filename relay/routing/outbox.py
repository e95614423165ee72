"""What is ready for one socket: a bounded queue that leaves as few, large frames.

Everything put in during one turn of the event loop goes out as one array frame, up to the frame's limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import islice

from relay.wire.codec import join
from relay.wire.frames import MAX_OPERATIONS


class Outbox:
    """Encoded frames on their way to one socket, at most about ``max_bytes`` of them before it counts as full.

    ``send`` writes one frame and waits while the socket is slow. ``run`` is the writer; it ends when the outbox is
    closed and empty, or when ``send`` fails.
    """

    __slots__ = ("_closed", "_max_bytes", "_max_frame", "_on_room", "_queue", "_room", "_wake", "size")

    def __init__(self, *, max_bytes: int, max_frame: int, on_room: Callable[[], None] | None = None) -> None:
        # A list, not a deque: an empty one takes a tenth of the memory, and most connections are idle.
        self._queue: list[str] = []
        self._max_bytes = max_bytes
        self._max_frame = max_frame
        self._wake: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._on_room = on_room
        self._closed = False
        self.size = 0

    def put(self, frame: str) -> None:
        """Queues one encoded operation. Dropped when the outbox is closed."""
        if self._closed:
            return
        self._queue.append(frame)
        self.size += len(frame)
        self._wake_writer()

    @property
    def full(self) -> bool:
        """Whether nothing that can wait should be put in now."""
        return self.size >= self._max_bytes

    async def room(self) -> None:
        """Waits until the outbox is no longer full, or is closed. For one waiter: the connection's reader."""
        while self.full and not self._closed:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def close(self) -> None:
        """Takes nothing more; the writer sends what is queued and ends."""
        self._closed = True
        self._wake_writer()
        self._tell_room()

    def discard(self) -> None:
        """Takes nothing more and forgets what is queued: the socket is gone."""
        self._queue.clear()
        self.size = 0
        self.close()

    async def run(self, send: Callable[[str], Awaitable[None]]) -> None:
        """Writes until closed and empty."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                if self._closed:
                    return
                self._wake = loop.create_future()
                await self._wake
            await send(self._take())
            if not self.full:
                self._tell_room()
                if self._on_room is not None:
                    self._on_room()

    def _take(self) -> str:
        queue = self._queue
        first = queue[0]
        if len(queue) == 1:
            queue.clear()
            self.size -= len(first)
            return first
        taken = 1
        # Characters stand in for bytes here; a character is at most four of them, and three for all of the BMP. Real
        # bytes are counted only when the frame comes near its limit.
        size = len(first)
        limit = self._max_frame - 2
        near = limit // 4
        exact = size > near
        total = len(first.encode()) if exact else size
        for item in islice(queue, 1, MAX_OPERATIONS):
            if not exact and size + len(item) > near:
                exact = True
                total = sum(len(frame.encode()) + 1 for frame in islice(queue, taken))
            added = (len(item.encode()) if exact else len(item)) + 1
            if total + added > limit:
                break
            taken += 1
            size += len(item)
            total += added
        self.size -= size
        frames = queue[:taken]
        del queue[:taken]
        return join(frames) if taken > 1 else first

    def _wake_writer(self) -> None:
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():
            wake.set_result(None)

    def _tell_room(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)
