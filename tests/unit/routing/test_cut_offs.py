"""A device whose tokens were ended at another node is cut off, one that has logged in again is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from relay.routing.cut_offs import CutOffs
from relay.routing.hub import Hub
from relay.store.accounts import Standing
from relay.store.mongo import PyMongoError
from relay.wire import errors
from tests.support.backlog import LocalConnection, MemoryBacklog, turns


class World:
    """A node, and the store that it asks (``standing``; None: unknown there) when ``gate`` opens."""

    def __init__(self) -> None:
        self.hub = Hub()
        self.forgotten: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.standing: Standing | None = Standing(ended=None, session="now", barred=False)
        self.silent = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.cut_offs = CutOffs(self.hub, self.forgotten.append, self.of)
        self.connections: list[LocalConnection] = []

    async def of(self, user: str, device: str) -> Standing | None:
        self.asked.append((user, device))
        found = self.standing
        await self.gate.wait()
        if self.silent:
            raise PyMongoError("no answer")
        return found

    def connect(self, session: str) -> LocalConnection:
        found = LocalConnection(MemoryBacklog(), "bob", "phone")
        found.session = session
        self.connections.append(found)
        self.hub.add(found)
        return found


@pytest.fixture
async def world() -> AsyncIterator[World]:
    found = World()
    yield found
    await found.cut_offs.close()
    for one in found.connections:
        await one.close()


@pytest.mark.parametrize("known", [True, False])
async def test_a_device_whose_token_is_not_good_any_more_is_cut_off(world: World, known: bool) -> None:
    bob = world.connect("before")
    if not known:
        world.standing = None
    world.cut_offs.take("bob/phone")
    await turns()
    assert bob.closes == [errors.UNAUTHORIZED] and world.forgotten == ["bob/phone"]


async def test_one_that_has_logged_in_again_stays(world: World) -> None:
    bob = world.connect("now")
    world.cut_offs.take("bob/phone")
    await turns()
    assert bob.closes == [] and world.asked == [("bob", "phone")]


async def test_one_that_connects_while_the_store_is_asked_stays(world: World) -> None:
    old = world.connect("before")
    world.standing = Standing(ended=None, session=None, barred=True)
    world.gate.clear()
    world.cut_offs.take("bob/phone")
    await turns()
    new = world.connect("now")
    world.gate.set()
    await turns()
    assert (old.closes, new.closes) == ([], [])


async def test_who_is_not_connected_here_is_not_asked_for(world: World) -> None:
    world.cut_offs.take("bob/phone")
    await turns()
    assert world.asked == [] and world.forgotten == ["bob/phone"]


async def test_a_silent_store_is_asked_again_at_the_next_one(world: World) -> None:
    bob = world.connect("before")
    world.silent = True
    world.cut_offs.take("bob/phone")
    await turns()
    assert bob.closes == []
    world.silent = False
    world.cut_offs.take("bob/phone")
    await turns()
    assert bob.closes == [errors.UNAUTHORIZED]
