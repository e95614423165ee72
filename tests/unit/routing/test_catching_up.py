"""Devices that come back are told what was read meanwhile, a few at once, and only while they are there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from time import time

import pytest

from relay.metrics import Metrics
from relay.routing.announcer import Announcer
from relay.routing.catching_up import _AT_ONCE, MARGIN_MS, MOST, CatchingUp
from relay.routing.hub import Hub
from relay.store.mongo import PyMongoError
from relay.store.reading import ReadCursor
from tests.support.backlog import LocalConnection, MemoryBacklog, turns


class House:
    """Ten devices, and a store that answers when ``gate`` is open."""

    def __init__(self) -> None:
        backlog = MemoryBacklog()
        self.all = [LocalConnection(backlog, f"u{number}") for number in range(10)]
        self.gate = asyncio.Event()
        self.asked: list[tuple[str, int, int]] = []
        self.failures = 0
        self.under_way = self.most = 0
        self.groups: list[list[str]] = []
        self.group_fault: Exception | None = None
        self.too_much = False
        self.catching_up = CatchingUp(self.since, self.since_for, Announcer(Hub(), Metrics(), "read"))

    async def since_for(self, asked: Sequence[tuple[str, int]], limit: int) -> list[list[ReadCursor]] | None:
        assert limit == MOST
        self.groups.append([user for user, _ in asked])
        await self.gate.wait()
        if self.group_fault is not None:
            raise self.group_fault
        return None if self.too_much else [[ReadCursor("talk", "bob", 5, 6)] for _ in asked]

    async def since(self, user: str, moment: int, limit: int) -> list[ReadCursor]:
        self.asked.append((user, moment, limit))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await self.gate.wait()
        self.under_way -= 1
        if self.failures:
            self.failures -= 1
            raise PyMongoError("no answer")
        return [ReadCursor("talk", "bob", 5, 6)]

    def told(self) -> int:
        return sum(len(one.got("read")) for one in self.all)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    yield found
    await found.catching_up.close()
    for one in found.all:
        await one.close()


async def test_those_who_come_together_are_asked_for_together(house: House) -> None:
    for one in house.all:
        house.catching_up.add(one, 1_000_000)
    house.gate.set()
    await turns(40)
    assert house.told() == 10
    assert house.groups == [[one.user for one in house.all]]
    assert not house.asked
    assert not house.catching_up._tasks


async def test_who_was_away_for_long_is_not_asked_for_with_who_was_not(house: House) -> None:
    now = int(time() * 1000)
    for number, one in enumerate(house.all):
        house.catching_up.add(one, now - (1000 if number % 2 else 86_400_000))
    house.gate.set()
    await turns(40)
    assert house.told() == 10
    assert sorted(map(len, house.groups)) == [5, 5]


@pytest.mark.parametrize("poison", [False, True])
async def test_what_cannot_be_read_together_is_asked_for_one_by_one(house: House, poison: bool) -> None:
    house.too_much = True
    house.group_fault = KeyError("readUpTo") if poison else None
    house.gate.set()
    for one in house.all:
        house.catching_up.add(one, 1_000_000)
    await turns(80)
    assert house.told() == 10
    assert set(house.asked) == {(one.user, 1_000_000 - MARGIN_MS, MOST) for one in house.all}
    assert house.most <= _AT_ONCE


async def test_who_has_left_is_not_asked_for(house: House) -> None:
    first, *rest = house.all
    house.catching_up.add(first, 0)
    await turns()
    for one in rest:
        house.catching_up.add(one, 0)
    for one in house.all:
        house.catching_up.left(one)
    house.gate.set()
    await turns(40)
    assert [user for user, _, _ in house.asked] == [first.user]
    assert house.groups == []
    assert all(moment == 0 for _, moment, _ in house.asked)


async def test_a_store_that_does_not_answer_ends_nothing_else(house: House) -> None:
    house.gate.set()
    house.group_fault = PyMongoError("no answer")
    for one in house.all[:5]:
        house.catching_up.add(one, 0)
    await turns(40)
    assert house.told() == 0
    house.failures = 1
    house.catching_up.add(house.all[5], 0)
    await turns(40)
    assert house.told() == 0
    house.group_fault = None
    for one in house.all[5:]:
        house.catching_up.add(one, 0)
    await turns(40)
    assert house.told() == 5


async def test_closing_ends_what_is_under_way(house: House) -> None:
    for one in house.all:
        house.catching_up.add(one, 0)
    await turns()
    await house.catching_up.close()
    house.catching_up.add(house.all[0], 0)
    house.gate.set()
    await turns(40)
    assert house.told() == 0
    assert not house.catching_up._tasks


async def test_a_slow_socket_goes_without(house: House) -> None:
    slow = house.all[0]
    slow.flowing.clear()
    slow.outbox.put("{}")
    await turns()
    while not slow.outbox.full:
        slow.outbox.put('{"t":"filler","x":"' + "x" * 100_000 + '"}')
    size = slow.outbox.size
    house.gate.set()
    house.catching_up.add(slow, 0)
    await turns(40)
    assert slow.outbox.size == size
