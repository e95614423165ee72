"""First drains: groups are answered together, whom nothing is said of has a turn, and live devices none of that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence

import pytest

from relay.metrics import Metrics
from relay.routing.first_drains import _MOST, _TURNS, FirstDrains
from relay.store.backlogs import Asked
from relay.store.messages import Page
from relay.store.mongo import PyMongoError
from tests.support.backlog import MemoryBacklog, message, turns


class House:
    """A backlog that answers while its gate is open, and a query for groups that answers what is true or fails; of the mailboxes in
    ``much`` it says nothing."""

    def __init__(self) -> None:
        self.backlog = MemoryBacklog()
        self.groups: list[int] = []
        self.fault: Exception | None = None
        self.much: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.first = FirstDrains(self.backlog, self.pages, Metrics())

    async def pages(self, asked: Sequence[Asked]) -> list[Page | None]:
        self.groups.append(len(asked))
        if self.fault is not None:
            raise self.fault
        waiting = sorted(self.backlog.stored.values(), key=lambda one: one.seq)
        found = [
            None
            if self.much.intersection(one.keys)
            else Page([each for each in waiting if set(one.keys) & set(each.awaiting)], exhausted=True)
            for one in asked
        ]
        await asyncio.sleep(0)
        await self.gate.wait()
        return found

    def drain(self, user: str, *, exclude: Collection[str] = ()) -> asyncio.Task[Page]:
        return asyncio.create_task(
            self.first.waiting(
                (f"{user}/phone", f"{user}/*"), 0, limit=10, max_bytes=100_000, exclude=exclude
            ),
            name=f"drain {user}",
        )

    def ask_for_themselves(self, count: int) -> list[asyncio.Task[Page]]:
        self.much.update(f"u{number}/phone" for number in range(count))
        return [self.drain(f"u{number}") for number in range(count)]


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    yield found
    await found.first.close()


async def test_one_alone_asks_once_and_for_itself(house: House) -> None:
    house.backlog.add(message(1, "ann/phone"))
    page = await house.drain("ann")
    assert (len(page.envelopes), page.exhausted) == (1, True)
    assert (house.backlog.queries, house.groups) == (1, [])


async def test_those_that_ask_at_the_same_moment_are_answered_together(house: House) -> None:
    house.backlog.add(message(1, "u50/phone"))
    house.backlog.add(message(2, "u60/*", "u50/phone"))
    pages = await asyncio.gather(*(house.drain(f"u{number}") for number in range(100)))
    assert {number: len(page.envelopes) for number, page in enumerate(pages) if page.envelopes} == {
        50: 2,
        60: 1,
    }
    assert all(page.exhausted for page in pages)
    assert (house.backlog.queries, house.groups) == (0, [_MOST, _MOST])


async def test_while_a_group_is_asked_the_next_gathers(house: House) -> None:
    house.gate.clear()
    tasks = [house.drain(f"u{number}") for number in range(3)]
    await turns()
    tasks += [house.drain(f"v{number}") for number in range(20)]
    await turns()
    assert house.groups == [3]
    house.gate.set()
    await asyncio.gather(*tasks)
    assert (house.backlog.queries, house.groups) == (0, [3, 20])


async def test_of_whom_nothing_is_said_a_few_ask_at_once(house: House) -> None:
    for number in range(30):
        house.backlog.add(message(number, f"u{number}/phone"))
    house.backlog.gate.clear()
    tasks = house.ask_for_themselves(30)
    await turns(60)
    assert house.backlog.queries == _TURNS
    house.backlog.gate.set()
    pages = await asyncio.gather(*tasks)
    assert [len(page.envelopes) for page in pages] == [1] * 30
    assert house.groups == [30]


async def test_who_comes_alone_does_not_wait_behind_those_that_ask_for_themselves(house: House) -> None:
    house.backlog.gate.clear()
    tasks = house.ask_for_themselves(30)
    await turns(60)
    async with asyncio.timeout(5):
        assert (await house.drain("zoe")).exhausted
    assert house.groups == [30, 1]
    house.backlog.gate.set()
    await asyncio.gather(*tasks)


async def test_who_has_something_in_flight_is_never_answered_for_a_group(house: House) -> None:
    tasks = [house.drain("ann", exclude=["talk m1"]), house.drain("bob"), house.drain("cleo")]
    await asyncio.gather(*tasks)
    assert (house.backlog.queries, house.groups) == (1, [2])


@pytest.mark.parametrize("fault", [PyMongoError("no answer"), TypeError("poison")])
async def test_what_fails_for_a_group_is_asked_for_each(house: House, fault: Exception) -> None:
    house.fault = fault
    pages = await asyncio.gather(*(house.drain(f"u{number}") for number in range(20)))
    assert all(page.exhausted for page in pages)
    assert (house.backlog.queries, house.groups) == (20, [20])
    await asyncio.gather(*(house.drain(f"v{number}") for number in range(20)))
    # A shard that is down is not asked for every group.
    assert house.groups == [20] if isinstance(fault, PyMongoError) else [20, 20]
    assert house.backlog.queries == 40


async def test_a_device_that_leaves_while_it_waits_harms_no_other(house: House) -> None:
    house.gate.clear()
    house.backlog.gate.clear()
    tasks = house.ask_for_themselves(30)
    tasks += [house.drain(f"v{number}") for number in range(30)]
    await turns()
    for task in tasks[::3]:
        task.cancel()
    house.gate.set()
    await turns(20)
    for task in tasks[1::3]:
        task.cancel()
    await turns()
    house.backlog.gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not any(task.cancelled() or task.exception() for task in tasks[2::3])
    async with asyncio.timeout(5):
        assert (await house.drain("zoe")).exhausted
