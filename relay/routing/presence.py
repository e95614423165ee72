"""Who is online, and who is told.

Somebody is online when one of their connections was heard from within the heartbeat and a little more; an open socket says
nothing. What costs is a change: watchers are found by whom they watch, and who may see whom is asked for all changes of a
moment together.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from relay.routing.announcer import Announcer
from relay.routing.hub import Connected
from relay.store.audience import LEASE_SECONDS
from relay.store.mongo import PyMongoError, brief
from relay.store.sights import Pair, Sight
from relay.tasks import ended
from relay.wire import replies
from relay.wire.errors import RelayError

FRESH_SECONDS: Final = 5.0
"""A connection is fresh for a heartbeat and so much longer."""
GRACE_SECONDS: Final = 3.0
SPACING_SECONDS: Final = 0.1
MOST: Final = 1_000_000
_RETRY_SECONDS: Final = 1.0
# Until the job that notes when devices left has certainly run.
_LEFT_SECONDS: Final = 60.0
_MOST_LEFT: Final = 100_000

log = structlog.get_logger(__name__)


class Looks(Protocol):
    """Who may see whom."""

    async def of(self, pairs: Collection[Pair]) -> dict[Pair, Sight]:
        """How each may see the other; absent: not at all."""


LastSeen = Callable[[Sequence[str]], Awaitable[dict[str, int]]]


@dataclass(frozen=True, slots=True)
class Look:
    """What somebody sees of another. ``last_seen`` in milliseconds."""

    online: bool
    last_seen: int | None


_NOTHING: Final = Look(False, None)


class _Watch:
    """What one connection watches: what it was told last, and how it may see each (None: not at all), since when."""

    __slots__ = ("done", "sights", "told", "users")

    def __init__(self, users: tuple[str, ...], done: Callable[[], None] | None) -> None:
        self.users = users
        self.done = done
        self.told: dict[str, Look] = {}
        self.sights: dict[str, tuple[Sight | None, float]] = {}


class Presence:
    """The people online at this node, and the watch lists of its connections. ``fresh`` (s): how long after it was heard from
    a connection counts; ``now`` is the wall clock (ms)."""

    def __init__(
        self,
        out: Announcer,
        sights: Looks,
        last_seen: LastSeen,
        *,
        fresh: float,
        now: Callable[[], int],
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._out = out
        self._hub = out.hub
        self._bus = out.bus
        self._sights = sights
        self._noted = last_seen
        self._fresh = fresh
        self._now = now
        self._grace = grace
        self._watches: dict[Connected, _Watch] = {}
        self._watchers: dict[str, set[Connected]] = {}
        # Who of those watched was online when they were last looked at.
        self._up: set[str] = set()
        self.watched = 0
        """How many people are watched, counted once for each watcher."""
        # Whether it was seen at this node.
        self._changed: dict[str, bool] = {}
        self._asked: dict[Connected, None] = {}
        self._outrun: set[str] = set()
        self._faded: dict[Connected, None] = {}
        self._left: OrderedDict[str, int] = OrderedDict()
        self._leaving: OrderedDict[str, float] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    # -- who is online

    def online(self, user: str) -> bool:
        """Whether a connection of this user to this node was heard from lately."""
        return any(self._is_fresh(connection) for connection in self._hub.of_user(user))

    async def online_of(self, users: Collection[str]) -> set[str]:
        """Which of these people are online, at whatever node."""
        return (await self._online_of(users))[0]

    async def devices_online(self, user: str) -> set[str]:
        """Which of this user's devices are online, at whatever node."""
        here = {one.device for one in self._hub.of_user(user) if self._is_fresh(one)}
        elsewhere = await self._bus.online([user]) or {}
        return here.union(elsewhere.get(user, ()))

    async def last_seen(self, users: Sequence[str]) -> dict[str, int]:
        """When a device of each was last noted or heard here (ms), with one query; who never was is absent."""
        found = await self._noted(users) if users else {}
        loop = asyncio.get_running_loop().time()
        now = self._now()
        for user in users:
            moments = [now - int((loop - one.heard) * 1000) for one in self._hub.of_user(user)]
            here = max([*moments, self._left.get(user, 0)])
            if here:
                found[user] = max(found.get(user, 0), here)
        return found

    async def look(self, viewer: str, user: str) -> Look | None:
        """What ``viewer`` may see of ``user`` now; None when it does not concern them."""
        sight = (await self._sights.of([(viewer, user)])).get((viewer, user))
        if sight is None:
            return None
        seen = await self.last_seen([user])
        return _look(sight, user in await self.online_of([user]), seen.get(user))

    # -- what happens

    def arrived(self, connection: Connected) -> None:
        """The connection is registered."""
        if self._leaving.pop(connection.user, None) is not None:
            return
        self._change(connection.user)

    def left(self, connection: Connected) -> None:
        """The connection has ended and is not registered any more."""
        self._forget(connection)
        self._faded.pop(connection, None)
        user = connection.user
        loop = asyncio.get_running_loop().time()
        moment = self._now() - int((loop - connection.heard) * 1000)
        self._note_left(user, moment)
        watched = user in self._watchers or self._bus.tells
        if watched and not self._closed and not self.online(user):
            # A device that reconnects must not flicker.
            self._leaving[user] = loop + self._grace
            self._leaving.move_to_end(user)
            self._await_leaving()

    def faded(self, connection: Connected) -> None:
        """The connection has been silent for too long. May be told again and again."""
        if connection not in self._faded and not self._is_fresh(connection):
            self._faded[connection] = None
            self._bus.silent(connection.user, connection.device, connection.serial, True)
            self._change(connection.user)

    def heard(self, connection: Connected) -> None:
        """Something has come from a connection that had been silent for a heartbeat."""
        if connection in self._faded:
            del self._faded[connection]
            self._bus.silent(connection.user, connection.device, connection.serial, False)
            self._change(connection.user)

    async def tick(self) -> None:
        """Looks whether connections that had faded were heard from in another way: by a part of a long frame."""
        for connection in list(self._faded):
            if self._is_fresh(connection):
                self.heard(connection)

    def changed_elsewhere(self, users: Iterable[tuple[str, int]]) -> None:
        """At another node these came, left or fell silent; with when they were last heard there (ms), or 0."""
        for user, moment in users:
            if moment:
                self._note_left(user, moment)
            self._look_again(user, here=False)

    def watched_users(self, *, online: bool) -> list[str]:
        """Everybody who is watched here and, when last looked at, was online, or was not."""
        return list(self._up) if online else [user for user in self._watchers if user not in self._up]

    def thought_online(self, user: str) -> bool:
        """Whether somebody who is watched here was online when last looked at."""
        return user in self._up

    def recheck(self, users: Iterable[str]) -> None:
        """Who may see these people, or whom they may see, has changed: for the watchers of every node."""
        concerned = list(users)
        self.recheck_here(concerned)
        self._bus.recheck(concerned)

    def recheck_here(self, users: Iterable[str]) -> None:
        """As ``recheck``, for the watchers of this node."""
        for user in users:
            self._outrun.add(user)
            for watcher in self._watchers.get(user, ()):
                self._watches[watcher].sights.pop(user, None)
            self._look_again(user)
            for connection in self._hub.of_user(user):
                watch = self._watches.get(connection)
                if watch is not None:
                    watch.sights.clear()
                    for other in watch.users:
                        self._look_again(other)

    # -- watching

    def watch(
        self, connection: Connected, users: Iterable[str], done: Callable[[], None] | None = None
    ) -> None:
        """From now on this connection is told of these people, and of no others: of each once, then ``done``; then of what
        changes. Raises RelayError ``unavailable`` when the node watches too many."""
        before = self._watches.get(connection)
        wanted = tuple(dict.fromkeys(users))
        held = 0 if before is None else len(before.users)
        if self._closed or self.watched - held + len(wanted) > MOST:
            raise RelayError("unavailable", "too much is watched here; try again later", retry_after=10_000)
        self._forget(connection)
        if before is not None and before.done is not None:
            before.done()
        if not wanted:
            if done is not None:
                done()
            return
        self._watches[connection] = _Watch(wanted, done)
        self.watched += len(wanted)
        for user in wanted:
            self._watchers.setdefault(user, set()).add(connection)
        self._asked[connection] = None
        self._begin()

    async def close(self) -> None:
        """Ends; nobody is told anything more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        task, self._task = self._task, None
        if task is not None:
            await ended([task])

    def _is_fresh(self, connection: Connected) -> bool:
        return asyncio.get_running_loop().time() - connection.heard < self._fresh

    def _note_left(self, user: str, moment: int) -> None:
        self._left[user] = max(moment, self._left.pop(user, 0))
        oldest = self._now() - int(_LEFT_SECONDS * 1000)
        while self._left:
            first, when = next(iter(self._left.items()))
            if when >= oldest and len(self._left) <= _MOST_LEFT:
                break
            del self._left[first]

    def _await_leaving(self) -> None:
        if self._timer is None and self._leaving:
            self._timer = asyncio.get_running_loop().call_at(next(iter(self._leaving.values())), self._gone)

    def _gone(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._leaving:
            user, due = next(iter(self._leaving.items()))
            if due > now:
                break
            del self._leaving[user]
            self._change(user)
        self._await_leaving()

    def _forget(self, connection: Connected) -> None:
        self._asked.pop(connection, None)
        watch = self._watches.pop(connection, None)
        if watch is None:
            return
        self.watched -= len(watch.users)
        for user in watch.users:
            watchers = self._watchers[user]
            watchers.discard(connection)
            if not watchers:
                del self._watchers[user]
                self._up.discard(user)

    def _change(self, user: str) -> None:
        self._look_again(user)
        self._bus.seen(user, self._left.get(user, 0))

    def _look_again(self, user: str, *, here: bool = True) -> None:
        if user in self._watchers:
            self._changed[user] = here or self._changed.get(user, False)
            self._begin()

    def _begin(self) -> None:
        if self._task is None and not self._closed:
            self._task = asyncio.create_task(self._tell_all(), name="presence")

    # -- telling

    async def _tell_all(self) -> None:
        try:
            while self._changed or self._asked:
                changed, self._changed = self._changed, {}
                asked, self._asked = self._asked, {}
                self._outrun = set()
                try:
                    await self._tell(changed, asked)
                except PyMongoError as error:
                    log.warning("presence cannot be told now", error=brief(error))
                    for user, here in changed.items():
                        self._look_again(user, here=here)
                    self._asked = {one: None for one in asked if one in self._watches} | self._asked
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                except Exception:
                    log.exception("presence was not told")
                await asyncio.sleep(SPACING_SECONDS)
        finally:
            self._task = None

    async def _online_of(self, users: Collection[str]) -> tuple[set[str], bool]:
        """And whether other nodes could be asked."""
        here = {user for user in users if self.online(user)}
        elsewhere = await self._bus.online([user for user in users if user not in here])
        return here.union(elsewhere or ()), elsewhere is not None

    async def _tell(self, changed: Mapping[str, bool], asked: Mapping[Connected, None]) -> None:
        concerned = [(watcher, user) for user in changed for watcher in self._watchers.get(user, ())]
        concerned += [
            (watcher, user)
            for watcher in asked
            if (watch := self._watches.get(watcher)) is not None
            for user in watch.users
        ]
        wanted = {user for _, user in concerned}
        begun = asyncio.get_running_loop().time()
        unsure = {
            (watcher.user, user) for watcher, user in concerned if not self._knows(watcher, user, begun)
        }
        sights = await self._sights.of(unsure) if unsure else {}
        seen = await self.last_seen(list(wanted)) if wanted else {}
        online, known = await self._online_of(wanted)
        everywhere = online.union(wanted & self._leaving.keys())
        if not known:
            # What other nodes told of these cannot be seen now; they are looked at again when it can.
            concerned = [
                (watcher, user)
                for watcher, user in concerned
                if watcher in asked or user in everywhere or changed[user]
            ]
            wanted = {user for _, user in concerned}
        self._up -= wanted
        self._up |= everywhere & self._watchers.keys()
        for watcher, user in dict.fromkeys(concerned):
            watch = self._watches.get(watcher)
            if watch is None or user not in self._watchers or watcher not in self._watchers[user]:
                continue
            if user in self._outrun or watcher.user in self._outrun:
                # Read before the change: it comes again.
                if watcher in asked:
                    self._asked[watcher] = None
                continue
            pair = (watcher.user, user)
            if pair in unsure:
                watch.sights[user] = (sights.get(pair), begun)
            elif user not in watch.sights:
                self._look_again(user, here=changed.get(user, False))
                continue
            sight = watch.sights[user][0]
            look = _NOTHING if sight is None else _look(sight, user in everywhere, seen.get(user))
            self._tell_one(watcher, watch, user, look, always=watcher in asked)
        for watcher in asked:
            watch = self._watches.get(watcher)
            if watch is not None and watcher not in self._asked and watch.done is not None:
                done, watch.done = watch.done, None
                done()

    def _knows(self, watcher: Connected, user: str, now: float) -> bool:
        watch = self._watches.get(watcher)
        known = None if watch is None else watch.sights.get(user)
        return known is not None and now - known[1] < LEASE_SECONDS

    def _tell_one(self, watcher: Connected, watch: _Watch, user: str, look: Look, *, always: bool) -> None:
        before = watch.told.get(user)
        same = before is not None and (before == look or (before.online and look.online))
        if same and not always:
            return
        watch.told[user] = look
        self._out.put(watcher, replies.presence(user, look.online, look.last_seen))


def _look(sight: Sight, online: bool, last_seen: int | None) -> Look:
    if not sight.blocked:
        return Look(online, last_seen)
    if last_seen is None or sight.blocked_at is None:
        return Look(False, last_seen)
    return Look(False, min(last_seen, sight.blocked_at))
