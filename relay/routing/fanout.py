"""Messages to many devices are handed out in slices, so that other sockets are served in between.

Everything that is queued for one conversation is handed out together: a device gets it in one frame and acknowledges it in
one. While that goes on the next gathers, so the more there is the less each message costs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from relay.tasks import ended
from relay.wire.envelope import Envelope

_MOST_WAITING: Final = 20_000
# A turn of the loop with so many sockets to write to takes about a millisecond.
_SLICE: Final = 16
# Beside messages between few devices: so that these wait for hardly longer than without.
_SMALL_SLICE: Final = 6
_PAUSE_SECONDS: Final = 0.004
_MOST_TOGETHER: Final = 32_000

log = structlog.get_logger(__name__)


class Fanout:
    """A queue of parts of messages. ``deliver`` hands parts, in the order in which they were put, to one mailbox.
    ``start`` and ``close`` it. What is not handed out when it closes waits in the store.

    While ``others`` says that messages between few devices are under way, it leaves most of the time to them; each device then
    gets more at once, later.
    """

    def __init__(
        self, deliver: Callable[[str, Sequence[Envelope]], None], others: Callable[[], bool]
    ) -> None:
        self._deliver = deliver
        self._others = others
        self._queued: dict[str, list[Envelope]] = {}
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._task: asyncio.Task[None] | None = None
        # By document id, while parts of it are queued: how many, and who needs it no more.
        self._pending: dict[str, tuple[int, set[str]]] = {}
        self.waiting = 0
        """Deliveries (part and recipient) that are queued."""

    def start(self) -> None:
        """Begins to hand out."""
        self._task = asyncio.create_task(self._run(), name="fanout")

    def put(self, part: Envelope) -> None:
        """Queues one part. Never refuses: whoever commits them waits for ``room`` first."""
        self._queued.setdefault(part.conversation, []).append(part)
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

    @property
    def full(self) -> bool:
        """Whether nothing more should be put."""
        return self.waiting >= _MOST_WAITING

    async def room(self) -> None:
        """Waits until the queue is at most half full."""
        await self._room.wait()

    async def close(self) -> None:
        """Ends."""
        self._room.set()
        if self._task is not None:
            await ended([self._task])

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queued:
                parts = self._take()
                await self._hand_out(parts)
                for part in parts:
                    self._forget(part.doc_id)

    def _take(self) -> list[Envelope]:
        """Of the conversation that waits for longest everything, or as much as is good to keep in memory together."""
        conversation = next(iter(self._queued))
        parts = self._queued.pop(conversation)
        size = 0
        for number, part in enumerate(parts):
            size += len(part.awaiting)
            if size > _MOST_TOGETHER and number:
                self._queued[conversation] = parts[number:]
                return parts[:number]
        return parts

    async def _hand_out(self, parts: Sequence[Envelope]) -> None:
        by_key: dict[str, list[Envelope]] = {}
        for part in parts:
            for key in part.awaiting:
                known = by_key.get(key)
                if known is None:
                    by_key[key] = [part]
                else:
                    known.append(part)
        left = _SLICE
        for key, its in by_key.items():
            self.waiting -= len(its)
            try:
                self._deliver(key, [part for part in its if key not in self._pending[part.doc_id][1]])
            except Exception:
                # It waits in the store; the others must not wait for it.
                log.exception("a part was not handed out")
            left -= 1
            if left <= 0:
                if self.waiting <= _MOST_WAITING // 2:
                    self._room.set()
                # One turn of the loop for everybody else, and for the sockets that were just written to.
                busy = self._others()
                left = _SMALL_SLICE if busy else _SLICE
                await asyncio.sleep(_PAUSE_SECONDS if busy else 0)
        if self.waiting <= _MOST_WAITING // 2:
            self._room.set()

    def _forget(self, doc_id: str) -> None:
        count, done = self._pending[doc_id]
        if count > 1:
            self._pending[doc_id] = (count - 1, done)
        else:
            del self._pending[doc_id]
