"""Messages to many devices are handed out in slices, so that other sockets are served in between."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from relay.wire.envelope import Envelope

log = structlog.get_logger(__name__)

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
        # By document id, while parts of it are queued: how many, and who has it already.
        self._pending: dict[str, tuple[int, set[str]]] = {}
        self.waiting = 0
        """Recipients of the parts that are queued."""

    def start(self) -> None:
        """Begins to hand out."""
        self._task = asyncio.create_task(self._run(), name="fanout")

    def put(self, part: Envelope) -> None:
        """Queues one part. Never refuses: whoever commits them waits for ``room`` first."""
        self._queue.append(part)
        count, done = self._pending.get(part.doc_id, (0, set()))
        self._pending[part.doc_id] = (count + 1, done)
        self.waiting += len(part.awaiting)
        if self.waiting >= _MOST_WAITING:
            self._room.clear()
        self._wake.set()

    def ended(self, doc_id: str, key: str) -> None:
        """The message needs not be handed to this mailbox any more: its device has drained and acknowledged it before its turn
        came, or it ended."""
        pending = self._pending.get(doc_id)
        if pending is not None:
            pending[1].add(key)

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
                done = self._pending[part.doc_id][1]
                for start in range(0, len(awaiting), _SLICE):
                    some = awaiting[start : start + _SLICE]
                    self.waiting -= len(some)
                    try:
                        self._deliver(part, [key for key in some if key not in done] if done else some)
                    except Exception:
                        # It waits in the store; the others must not wait for it.
                        log.exception("a part was not handed out")
                    if self.waiting <= _MOST_WAITING // 2:
                        self._room.set()
                    # One turn of the loop for everybody else, and for the sockets that were just written to.
                    await asyncio.sleep(0)
                count, done = self._pending[part.doc_id]
                if count > 1:
                    self._pending[part.doc_id] = (count - 1, done)
                else:
                    del self._pending[part.doc_id]
