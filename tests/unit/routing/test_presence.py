"""Presence: online is a fresh heartbeat, watchers are told of changes, and only of whom they may see."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence

import pytest

from relay.metrics import Metrics
from relay.routing import presence as module
from relay.routing.announcer import Announcer
from relay.routing.hub import Hub
from relay.routing.presence import SPACING_SECONDS, Look, Presence
from relay.store.mongo import PyMongoError
from relay.store.sights import Pair, Sight
from relay.wire.errors import RelayError
from tests.support.backlog import LocalConnection, MemoryBacklog, turns

FRESH = 30.0
GRACE = 0.3
NOW = 1_000_000_000


class World:
    """Who may see whom (everybody, but for ``hidden`` and ``blocked``), asked for in ``queries``."""

    def __init__(self) -> None:
        self.hidden: set[Pair] = set()
        self.blocked: dict[Pair, int] = {}
        self.queries: list[set[Pair]] = []
        self.failures = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.noted: dict[str, int] = {}
        self.hub = Hub()
        self.metrics = Metrics()
        self.presence = Presence(
            Announcer(self.hub, self.metrics, "presence"),
            self,
            self.last_seen,
            fresh=FRESH,
            now=lambda: NOW,
            grace=GRACE,
        )
        self.connections: list[LocalConnection] = []

    async def of(self, pairs: Collection[Pair]) -> dict[Pair, Sight]:
        self.queries.append(set(pairs))
        found = {pair: self._sight(pair) for pair in pairs if pair not in self.hidden}
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise PyMongoError("no answer")
        return found

    def _sight(self, pair: Pair) -> Sight:
        moment = self.blocked.get(pair)
        return Sight() if moment is None else Sight(True, moment)

    async def last_seen(self, users: Sequence[str]) -> dict[str, int]:
        return {user: self.noted[user] for user in users if user in self.noted}

    def connect(self, user: str, device: str = "phone") -> LocalConnection:
        found = LocalConnection(MemoryBacklog(), user, device)
        self.connections.append(found)
        self.hub.add(found)
        self.presence.arrived(found)
        return found

    def leave(self, connection: LocalConnection) -> None:
        self.hub.remove(connection)
        self.presence.left(connection)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    found = World()
    yield found
    found.gate.set()
    await found.presence.close()
    for one in found.connections:
        await one.close()


def told(connection: LocalConnection) -> list[tuple[str, bool]]:
    return [(one["user"], one["online"]) for one in connection.got("presence")]


async def settle() -> None:
    await asyncio.sleep(SPACING_SECONDS * 1.7)


async def test_a_watcher_is_told_of_each_at_once_with_one_query(world: World) -> None:
    world.connect("bob")
    world.noted = {"cleo": 5000}
    ann = world.connect("ann")
    done: list[bool] = []
    world.presence.watch(ann, ["bob", "cleo", "nobody", "bob"], lambda: done.append(True))
    await turns()
    here, *others = [(one["user"], one["online"], one["lastSeen"]) for one in ann.got("presence")]
    assert here[:2] == ("bob", True)
    assert NOW - 1000 < here[2] <= NOW
    assert others == [
        ("cleo", False, 5000),
        ("nobody", False, None),
    ]
    assert len(world.queries) == 1
    assert done == [True]
    assert world.presence.watched == 3


async def test_changes_are_told_and_nothing_else(world: World) -> None:
    ann = world.connect("ann")
    world.presence.watch(ann, ["bob"])
    await settle()
    bob = world.connect("bob")
    await settle()
    tablet = world.connect("bob", "tablet")
    await settle()
    world.leave(tablet)
    await asyncio.sleep(GRACE * 1.5)
    assert told(ann) == [("bob", False), ("bob", True)]
    world.leave(bob)
    await turns()
    assert told(ann)[-1] == ("bob", True)
    await asyncio.sleep(GRACE + SPACING_SECONDS * 1.7)
    assert told(ann) == [("bob", False), ("bob", True), ("bob", False)]
    last = ann.got("presence")[-1]["lastSeen"]
    assert NOW - 5000 <= last <= NOW


async def test_a_reconnect_is_no_news(world: World) -> None:
    bob = world.connect("bob")
    ann = world.connect("ann")
    world.presence.watch(ann, ["bob"])
    await settle()
    world.leave(bob)
    await asyncio.sleep(GRACE / 2)
    world.connect("bob")
    await asyncio.sleep(GRACE * 1.5 + SPACING_SECONDS)
    assert told(ann) == [("bob", True)]
    assert world.presence._leaving == {}


async def test_an_open_socket_that_is_silent_is_not_online(world: World) -> None:
    bob = world.connect("bob")
    ann = world.connect("ann")
    world.presence.watch(ann, ["bob"])
    await settle()
    bob.heard -= FRESH - 1
    world.presence.faded(bob)
    await settle()
    assert world.presence.online("bob")
    bob.heard -= 2
    assert not world.presence.online("bob")
    assert await world.presence.devices_online("bob") == set()
    world.presence.faded(bob)
    world.presence.faded(bob)
    await settle()
    assert told(ann) == [("bob", True), ("bob", False)]
    bob.heard += 10
    await world.presence.tick()
    await settle()
    assert told(ann) == [("bob", True), ("bob", False), ("bob", True)]
    assert world.presence._faded == {}


async def test_a_new_list_replaces_the_old_one_and_an_empty_one_ends_it(world: World) -> None:
    ann = world.connect("ann")
    world.presence.watch(ann, ["bob", "cleo"])
    world.presence.watch(ann, ["cleo", "dan"])
    await settle()
    world.connect("bob")
    world.connect("dan")
    await settle()
    assert told(ann) == [("cleo", False), ("dan", False), ("dan", True)]
    world.presence.watch(ann, [])
    world.connect("cleo")
    await settle()
    assert ("cleo", True) not in told(ann)
    assert (world.presence.watched, world.presence._watchers, world.presence._watches) == (0, {}, {})


async def test_a_connection_that_ends_watches_nobody(world: World) -> None:
    ann = world.connect("ann")
    world.presence.watch(ann, ["bob"])
    world.leave(ann)
    await settle()
    assert (world.presence.watched, world.presence._watchers, world.presence._asked) == (0, {}, {})


async def test_who_may_not_see_sees_nobody_and_who_is_blocked_the_past(world: World) -> None:
    world.hidden = {("ann", "bob")}
    world.blocked = {("ann", "cleo"): 4000, ("ann", "dan"): 4000}
    world.noted = {"bob": 9000, "cleo": 9000, "dan": 3000}
    for user in ("bob", "cleo"):
        world.connect(user)
    ann = world.connect("ann")
    world.presence.watch(ann, ["bob", "cleo", "dan"])
    await turns()
    assert [(one["user"], one["online"], one["lastSeen"]) for one in ann.got("presence")] == [
        ("bob", False, None),
        ("cleo", False, 4000),
        ("dan", False, 3000),
    ]
    assert await world.presence.look("ann", "bob") is None
    assert await world.presence.look("ann", "cleo") == Look(False, 4000)


async def test_a_change_of_who_may_see_is_told_at_once(world: World) -> None:
    world.connect("bob")
    ann = world.connect("ann")
    world.presence.watch(ann, ["bob"])
    await settle()
    world.hidden = {("ann", "bob")}
    world.presence.recheck(["bob"])
    await settle()
    world.hidden = set()
    world.presence.recheck(["ann"])
    await settle()
    assert told(ann) == [("bob", True), ("bob", False), ("bob", True)]


async def test_what_was_read_before_a_block_is_not_told_after_it(world: World) -> None:
    world.connect("bob")
    ann = world.connect("ann")
    world.gate.clear()
    world.presence.watch(ann, ["bob"])
    await turns()
    world.hidden = {("ann", "bob")}
    world.presence.recheck(["bob"])
    world.gate.set()
    await settle()
    assert set(told(ann)) == {("bob", False)}


async def test_within_the_lease_a_change_asks_nothing(world: World) -> None:
    ann = world.connect("ann")
    world.presence.watch(ann, ["bob"])
    await settle()
    world.connect("bob")
    await settle()
    assert told(ann)[-1] == ("bob", True)
    assert len(world.queries) == 1


async def test_the_changes_of_a_moment_are_one_query(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.0)
    users = [f"u{number}" for number in range(50)]
    watchers = [world.connect(f"w{number}") for number in range(4)]
    for watcher in watchers:
        world.presence.watch(watcher, users)
    await settle()
    before = len(world.queries)
    for user in users:
        world.connect(user)
    await settle()
    await settle()
    assert len(world.queries) - before <= 2
    for watcher in watchers:
        assert sorted(told(watcher)[-50:]) == sorted((user, True) for user in users)


async def test_when_the_store_does_not_answer_it_is_told_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.1)
    world.failures = 2
    ann = world.connect("ann")
    world.presence.watch(ann, ["bob"])
    await asyncio.sleep(0.5)
    assert told(ann) == [("bob", False)]


async def test_a_node_watches_so_many_and_no_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    ann, bob = world.connect("ann"), world.connect("bob")
    world.presence.watch(ann, ["a", "b"])
    with pytest.raises(RelayError) as caught:
        world.presence.watch(bob, ["a", "b"])
    assert caught.value.code == "unavailable"
    world.presence.watch(ann, ["a", "b", "c"])
    assert world.presence.watched == 3
