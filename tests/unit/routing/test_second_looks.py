"""Watched people are looked up again: what was lost is told, and nobody flickers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

import pytest

from relay.routing import second_looks as module
from relay.routing.bus import Alone
from relay.routing.second_looks import ROUND_SECONDS, SecondLooks
from tests.support.backlog import LocalConnection
from tests.unit.routing.test_presence import GRACE, World, settle, told


class Directory(Alone):
    """A bus on which hints are lost: who is ``there`` is found only when asked for. ``works``: it answers."""

    tells = shared = True

    def __init__(self) -> None:
        super().__init__()
        self.there: set[str] = set()
        self.works = True
        self.asked: list[list[str]] = []

    async def online(self, users: Collection[str]) -> dict[str, set[str]] | None:
        self.asked.append(sorted(users))
        self.tells = self.shared = self.works
        return {user: {"phone"} for user in users if user in self.there} if self.works else None


class Looking(World):
    """A node whose watchers' second looks a test makes due."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now = 1000.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
        self.directory = Directory()
        self.presence._bus = self.directory
        self.looks = SecondLooks(self.presence, self.directory)

    async def watcher(self, *users: str) -> LocalConnection:
        ann = self.connect("ann")
        self.presence.watch(ann, users)
        await settle()
        self.directory.asked.clear()
        return ann

    async def round(self, seconds: float = 1.1 * ROUND_SECONDS + 1) -> None:
        self.now += seconds
        await self.looks.run()
        await settle()


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Looking]:
    found = Looking(monkeypatch)
    yield found
    await found.presence.close()
    for one in found.connections:
        await one.close()


async def test_who_came_unnoticed_is_told_in_the_next_round_and_who_left_in_the_one_after_it(
    world: Looking,
) -> None:
    world.directory.there = {"bob"}
    ann = await world.watcher("bob", "cleo")
    world.directory.there = {"cleo"}
    await world.round()
    assert told(ann) == [("bob", True), ("cleo", False), ("cleo", True)]
    await world.round()
    assert told(ann)[3:] == [("bob", False)]
    await world.round()
    assert len(told(ann)) == 4


async def test_what_an_emptied_redis_has_forgotten_for_a_while_is_no_news(world: Looking) -> None:
    world.directory.there = {"bob"}
    ann = await world.watcher("bob")
    for _ in range(3):
        world.directory.there = set()
        await world.round()
        world.directory.there = {"bob"}
        await world.round()
    assert told(ann) == [("bob", True)]


async def test_when_redis_is_back_the_first_round_counts_and_waits_until_all_are_entered(
    world: Looking,
) -> None:
    world.directory.there = {"bob", "cleo"}
    ann = await world.watcher("bob", "cleo")
    world.directory.there = set()
    world.looks.hurry()
    await world.round(4)
    assert world.directory.asked == []
    world.directory.there = {"bob"}
    world.looks.hurry()
    await world.round(5)
    assert told(ann) == [("bob", True), ("cleo", True), ("cleo", False)]


async def test_when_a_node_has_died_the_round_is_at_once(world: Looking) -> None:
    world.directory.there = {"bob"}
    ann = await world.watcher("bob")
    world.directory.there = set()
    world.looks.died()
    await world.round(0)
    assert told(ann) == [("bob", True), ("bob", False)]


async def test_who_cannot_be_asked_for_is_not_gone(world: Looking) -> None:
    world.directory.there = {"bob"}
    ann = await world.watcher("bob")
    world.directory.works = False
    world.looks.died()
    for _ in range(3):
        await world.round()
    assert told(ann) == [("bob", True)]


async def test_a_hint_that_cannot_be_looked_up_is_not_taken_for_news(world: Looking) -> None:
    world.directory.there = {"bob"}
    ann = await world.watcher("bob", "cleo")
    world.directory.there = {"cleo"}
    world.directory.works = False
    world.presence.changed_elsewhere([("bob", 5000), ("cleo", 5000)])
    await settle()
    assert told(ann) == [("bob", True), ("cleo", False)]
    world.directory.works = True
    world.looks.hurry()
    await world.round()
    assert told(ann)[2:] == [("bob", False), ("cleo", True)]


async def test_who_leaves_here_while_nobody_else_can_be_asked_is_gone(world: Looking) -> None:
    bob = world.connect("bob")
    ann = await world.watcher("bob")
    world.directory.works = False
    world.leave(bob)
    await asyncio.sleep(GRACE)
    await settle()
    assert told(ann) == [("bob", True), ("bob", False)]


async def test_it_asks_for_watched_people_who_are_not_here_in_groups_and_for_nobody_else(
    world: Looking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    world.connect("bob")
    world.connect("eve")
    world.directory.there = {"cleo", "fay"}
    ann = await world.watcher("bob", "cleo", "dan", "gil", "hal")
    await world.round()
    asked = world.directory.asked
    assert sorted(user for group in asked for user in group) == ["cleo", "dan", "gil", "hal"]
    assert asked[0] == ["cleo"], "those first who may be gone"
    assert all(len(group) <= 2 for group in asked)
    world.leave(ann)
    asked.clear()
    await world.round()
    assert asked == [] and world.presence._up == set()
