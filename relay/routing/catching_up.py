"""What a device that comes back is told of the live events it missed: the read cursors that have moved since."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from relay.routing.announcer import Announcer
from relay.routing.hub import Connected
from relay.store.mongo import PyMongoError, brief
from relay.store.reading import ReadCursor
from relay.wire import replies

MOST: Final = 1000
# When a device left is noted up to 12 s late; the rest is for clocks.
MARGIN_MS: Final = 15_000
_AT_ONCE: Final = 4

Since = Callable[[str, int, int], Awaitable[list[ReadCursor]]]
log = structlog.get_logger(__name__)


class CatchingUp:
    """Tells returning devices, a few at once: thousands may come back together, and messages go first. What cannot be told is
    in ``GET /v1/changes``."""

    def __init__(self, since: Since, out: Announcer) -> None:
        self._since = since
        self._out = out
        # At most one entry for each connection of this node.
        self._waiting: dict[Connected, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def add(self, connection: Connected, live_until: int) -> None:
        """This device has drained; it was told what happened live until then (ms)."""
        if self._closed:
            return
        self._waiting[connection] = live_until
        if len(self._tasks) < _AT_ONCE:
            task = asyncio.create_task(self._work(), name="catching up")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def left(self, connection: Connected) -> None:
        """The connection has ended."""
        self._waiting.pop(connection, None)

    async def close(self) -> None:
        """Ends; who was not told yet asks for changes."""
        self._closed = True
        self._waiting.clear()
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self) -> None:
        while self._waiting:
            connection = next(iter(self._waiting))
            moment = self._waiting.pop(connection)
            try:
                cursors = await self._since(connection.user, max(0, moment - MARGIN_MS), MOST)
            except PyMongoError as error:
                log.warning("a device was not told what was read meanwhile", error=brief(error))
                continue
            except Exception:
                log.exception("a device was not told what was read meanwhile")
                continue
            for one in cursors:
                frame = replies.read(one.conversation, one.user, one.up_to, one.at)
                if not self._out.put(connection, frame):
                    break
