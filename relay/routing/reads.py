"""Read cursors on their way: from many operations to few writes, then to the members' devices.

Only the furthest mark of a member counts, so a client that marks every message as it scrolls by costs one write in a while.
One group is written at a time; the next gathers meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import structlog

from relay.routing.announcer import Announcer
from relay.store.audience import Audience, Audiences
from relay.store.mongo import PyMongoError, brief
from relay.store.reading import Moved, Reader
from relay.tasks import ended
from relay.wire import replies
from relay.wire.errors import RelayError
from relay.wire.frames import MAX_LIVE_MEMBERS
from relay.wire.limits import Limit

SPACING_SECONDS: Final = 0.1
MOST_PENDING: Final = 20_000
MOST_OF_USER: Final = 1000
MOST_WAITING: Final = 512
_GROUP: Final = 500

Done = Callable[[RelayError | None], None]
log = structlog.get_logger(__name__)


_STOPPING: Final = RelayError("unavailable", "the relay is stopping; mark again", retry_after=1000)


class Cursors(Protocol):
    """Where cursors are kept."""

    async def move(self, marks: dict[Reader, int]) -> Moved:
        """Moves cursors forward, never back."""


class _Mark:
    __slots__ = ("by", "once", "up_to", "waiting")

    def __init__(self) -> None:
        self.up_to = -1
        self.by: str | None = None
        self.waiting: list[Done] = []
        self.once: dict[str, Done] = {}


class Reads:
    """Moves read cursors and tells of those that moved. Bounded: so many members' cursors, so many of one user, so many
    that wait for one of them."""

    def __init__(self, cursors: Cursors, audiences: Audiences, out: Announcer) -> None:
        self._cursors = cursors
        self._audiences = audiences
        self._out = out
        self._pending: dict[Reader, _Mark] = {}
        self._of_user: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def mark(
        self, conversation: str, user: str, up_to: int, done: Done, *, device: str, each: bool = True
    ) -> None:
        """This member has read so far, on the device with this key, which is not told. ``done`` is called once: with None when
        the cursor is durable there or further, else with what is wrong (``not_member``, ``unavailable``). Unless ``each``, marks
        of one device that are written together have one ``done``. Raises RelayError ``rate_limited`` or ``unavailable`` when too
        much is pending."""
        if self._closed:
            raise RelayError(_STOPPING.code, _STOPPING.message, retry_after=_STOPPING.retry_after)
        reader = (conversation, user)
        found = self._pending.get(reader)
        if found is None:
            found = self._new(reader)
        elif each and len(found.waiting) >= MOST_WAITING:
            raise _too_many("marks of one conversation")
        if up_to > found.up_to:
            found.up_to, found.by = up_to, device
        if each:
            found.waiting.append(done)
        else:
            found.once[device] = done
        if self._task is None:
            self._task = asyncio.create_task(self._write_all(), name="read cursors")

    async def close(self, seconds: float) -> None:
        """Takes nothing more, and writes what is pending for at most so long."""
        self._closed = True
        if self._task is not None:
            _, late = await asyncio.wait({self._task}, timeout=seconds)
            await ended(late)
        _answer(self._pending, _STOPPING)
        self._pending.clear()

    def _new(self, reader: Reader) -> _Mark:
        held = self._of_user.get(reader[1], 0)
        if held >= MOST_OF_USER:
            raise _too_many("read marks")
        if len(self._pending) >= MOST_PENDING:
            raise RelayError("unavailable", "the relay is busy; mark again", retry_after=1000)
        self._of_user[reader[1]] = held + 1
        found = self._pending[reader] = _Mark()
        return found

    def _take(self) -> dict[Reader, _Mark]:
        group: dict[Reader, _Mark] = {}
        while self._pending and len(group) < _GROUP:
            # The first first, or a busy node would leave somebody out for ever.
            reader = next(iter(self._pending))
            group[reader] = self._pending.pop(reader)
            left = self._of_user[reader[1]] - 1
            if left:
                self._of_user[reader[1]] = left
            else:
                del self._of_user[reader[1]]
        return group

    async def _write_all(self) -> None:
        try:
            while self._pending:
                await self._write(self._take())
                if not self._closed and len(self._pending) < _GROUP:
                    await asyncio.sleep(SPACING_SECONDS)
        finally:
            self._task = None

    async def _write(self, group: dict[Reader, _Mark]) -> None:
        failure: RelayError | None = None
        moved = None
        try:
            moved = await self._cursors.move({reader: mark.up_to for reader, mark in group.items()})
        except PyMongoError as error:
            log.warning("read cursors were not written", error=brief(error))
            failure = RelayError("unavailable", "the store did not answer; mark again", retry_after=1000)
        except asyncio.CancelledError:
            _answer(group, _STOPPING)
            raise
        except Exception:
            log.exception("read cursors were not written")
            failure = RelayError("internal", "something went wrong in the relay")
        if moved is None:
            _answer(group, failure)
            return
        strangers = {reader: mark for reader, mark in group.items() if reader not in moved.members}
        _answer(strangers, RelayError("not_member", "no such conversation"))
        _answer({reader: mark for reader, mark in group.items() if reader not in strangers}, None)
        if moved.moved:
            await self._tell(group, moved)

    async def _tell(self, group: dict[Reader, _Mark], moved: Moved) -> None:
        audiences: dict[str, Audience] = {}
        # Who is in a large one is much to read, and nobody would be told.
        wanted = {one for one, user in moved.moved if user not in moved.private and one not in moved.large}
        try:
            audiences = await self._audiences.resolve_all(wanted)
        except PyMongoError as error:
            # Who is not told learns it from GET /v1/changes.
            log.warning("read cursors are told to their own devices only", error=brief(error))
        for reader in moved.moved:
            conversation, user = reader
            audience = audiences.get(conversation)
            told = {user}
            if (
                audience is not None
                and len(audience.members) <= MAX_LIVE_MEMBERS
                and user not in moved.private
            ):
                told.update(one for one in audience.members if not audience.apart(one, user))
            mark = group[reader]
            frame = replies.read(conversation, user, mark.up_to, moved.at)
            self._out.tell(told, frame, but=mark.by)


def _too_many(what: str) -> RelayError:
    return RelayError("rate_limited", f"too many {what} at once", retry_after=500, limit=Limit.READ_RATE)


def _answer(marks: Mapping[Reader, _Mark], failure: RelayError | None) -> None:
    for mark in marks.values():
        for done in (*mark.waiting, *mark.once.values()):
            done(failure)
