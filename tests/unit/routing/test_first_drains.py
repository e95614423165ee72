"""First drains: groups learn together that nothing waits, the others have their turns, and live devices none of that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection

import pytest

from relay.metrics import Metrics
from relay.routing.first_drains import _TURNS, FirstDrains
from relay.store.messages import Page
from relay.store.mongo import PyMongoError
from tests.support.backlog import MemoryBacklog, message, turns


class House:
    """A backlog that answers while its gate is open, and a query for groups that says what is true or fails."""

    def __init__(self) -> None:
        self.backlog = MemoryBacklog()
        self.groups: list[int] = []
        self.fault: Exception | None = None
        self.first = FirstDrains(self.backlog, self.empty, Metrics())

    async def empty(self, keys: Collection[str]) -> set[str]:
        self.groups.append(len(keys))
        if self.fault is not None:
            raise self.fault
        full = {key for one in self.backlog.stored.values() for key in one.awaiting}
        await asyncio.sleep(0)
        return set(keys) - full

    def drain(self, user: str, *, exclude: Collection[str] = ()) -> asyncio.Task[Page]:
        return asyncio.create_task(
            self.first.waiting(
                (f"{user}/phone", f"{user}/*"), 0, limit=10, max_bytes=100_000, exclude=exclude
            ),
            name=f"drain {user}",
        )


@pytest.fixture
async def house() -> AsyncIterator[House]:
    found = House()
    yield found
    await found.first.close()


async def test_one_alone_asks_once_and_for_itself(house: House) -> None:
    assert (await house.drain("ann")).exhausted
    assert (house.backlog.queries, house.groups) == (1, [])


async def test_of_many_only_those_for_whom_something_waits_ask_for_themselves(house: House) -> None:
    house.backlog.add(message(1, "u50/phone"))
    house.backlog.add(message(2, "u60/*"))
    house.backlog.gate.clear()
    tasks = [house.drain(f"u{number}") for number in range(100)]
    await turns(40)
    house.backlog.gate.set()
    pages = await asyncio.gather(*tasks)
    assert [number for number, page in enumerate(pages) if page.envelopes] == [50, 60]
    assert all(page.exhausted for page in pages)
    assert house.backlog.queries == _TURNS + 2
    assert sum(house.groups) == 2 * (100 - _TURNS)
    assert len(house.groups) <= 3


async def test_a_few_ask_at_once(house: House) -> None:
    for number in range(30):
        house.backlog.add(message(number, f"u{number}/phone"))
    house.backlog.gate.clear()
    tasks = [house.drain(f"u{number}") for number in range(30)]
    await turns(60)
    assert house.backlog.queries == _TURNS
    house.backlog.gate.set()
    pages = await asyncio.gather(*tasks)
    assert [len(page.envelopes) for page in pages] == [1] * 30


async def test_who_has_something_in_flight_is_never_answered_for_a_group(house: House) -> None:
    house.backlog.gate.clear()
    tasks = [house.drain(f"u{number}") for number in range(_TURNS)]
    await turns()
    tasks.append(house.drain("ann", exclude=["talk m1"]))
    await turns(20)
    assert house.groups == []
    house.backlog.gate.set()
    await asyncio.gather(*tasks)
    assert house.backlog.queries == _TURNS + 1


@pytest.mark.parametrize("fault", [PyMongoError("no answer"), TypeError("poison")])
async def test_what_fails_for_a_group_is_asked_for_each(house: House, fault: Exception) -> None:
    house.fault = fault
    house.backlog.gate.clear()
    tasks = [house.drain(f"u{number}") for number in range(20)]
    await turns(20)
    house.backlog.gate.set()
    assert all(page.exhausted for page in await asyncio.gather(*tasks))
    assert house.backlog.queries == 20
    if isinstance(fault, PyMongoError):
        asked = len(house.groups)
        house.backlog.gate.clear()
        tasks = [house.drain(f"v{number}") for number in range(20)]
        await turns(20)
        house.backlog.gate.set()
        await asyncio.gather(*tasks)
        assert len(house.groups) == asked, "a shard that is down is not asked for every group"


async def test_a_device_that_leaves_while_it_waits_harms_no_other(house: House) -> None:
    house.backlog.gate.clear()
    tasks = [house.drain(f"u{number}") for number in range(30)]
    await turns()
    for task in tasks[::3]:
        task.cancel()
    await turns(20)
    house.backlog.gate.set()
    pages = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(page, Page) for page in pages) >= 20
    async with asyncio.timeout(5):
        assert (await house.drain("zoe")).exhausted
