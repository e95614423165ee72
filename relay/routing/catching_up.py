"""What a device that comes back is told of the live events it missed: the read cursors that have moved since."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog

from relay.routing.announcer import Announcer
from relay.routing.hub import Connected
from relay.store.mongo import PyMongoError, brief
from relay.store.reading import ReadCursor
from relay.tasks import ended
from relay.wire import replies
from relay.wire.clock import wall_ms

MOST: Final = 1000
# What a device had when it was last heard was told a round trip before, and gathered before that; the rest is for clocks.
MARGIN_MS: Final = 15_000
_AT_ONCE: Final = 4
_TOGETHER: Final = 100
# Steps without giving way to others.
_STEPS: Final = 200
_BURST: Final = 4

Since = Callable[[str, int, int], Awaitable[list[ReadCursor]]]
SinceFor = Callable[[Sequence[tuple[str, int]], int], Awaitable[list[list[ReadCursor]] | None]]
_One = tuple[Connected, int]
log = structlog.get_logger(__name__)


class CatchingUp:
    """Tells returning devices, in groups of those that were away for about as long: thousands may come back together, and
    messages go first. ``since_for`` asks for a group, ``since`` for one. What cannot be told is in ``GET /v1/changes``."""

    def __init__(self, since: Since, since_for: SinceFor, out: Announcer) -> None:
        self._since = since
        self._since_for = since_for
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
        await ended(self._tasks)

    async def _work(self) -> None:
        while self._waiting:
            group = self._take()
            for number, (one, cursors) in enumerate(zip(group, await self._cursors(group), strict=True), 1):
                self._tell(one[0], cursors)
                if not number % _BURST:
                    await asyncio.sleep(0)

    def _take(self) -> list[_One]:
        """The first, and others that were away for about as long: what is read for a group goes back as far as any of it."""
        first = next(iter(self._waiting))
        now = wall_ms()
        group = [(first, self._waiting.pop(first))]
        length = _length(now - group[0][1])
        for one, moment in list(self._waiting.items())[:_STEPS]:
            if len(group) == _TOGETHER:
                break
            if _length(now - moment) == length:
                group.append((one, self._waiting.pop(one)))
        return group

    async def _cursors(self, group: Sequence[_One]) -> list[list[ReadCursor]]:
        """What each of the group is told. Whatever is wrong with one of them harms no other."""
        asked = [(one.user, max(0, moment - MARGIN_MS)) for one, moment in group]
        if len(group) > 1:
            try:
                found = await self._since_for(asked, MOST)
            except PyMongoError as error:
                log.warning(
                    "devices were not told what was read meanwhile", devices=len(group), error=brief(error)
                )
                return [[] for _ in group]
            except Exception:
                log.exception("devices are told one by one what was read meanwhile", devices=len(group))
                found = None
            if found is not None:
                return found
        return [await self._cursors_of(user, moment) for user, moment in asked]

    async def _cursors_of(self, user: str, moment: int) -> list[ReadCursor]:
        try:
            return await self._since(user, moment, MOST)
        except PyMongoError as error:
            log.warning("a device was not told what was read meanwhile", error=brief(error))
        except Exception:
            log.exception("a device was not told what was read meanwhile")
        return []

    def _tell(self, connection: Connected, cursors: Sequence[ReadCursor]) -> None:
        for one in cursors:
            frame = replies.read(one.conversation, one.user, one.up_to, one.at)
            if not self._out.put(connection, frame):
                break


def _length(away_ms: int) -> int:
    """The same for times that differ by less than a factor of two; all below a minute are alike."""
    return max(away_ms // 60_000, 0).bit_length()
