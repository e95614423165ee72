"""Changed members and devices: what a node waits for until it says, or confirms, that nobody goes by what was before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from typing import Any

import pytest

from relay.metrics import Metrics
from relay.routing.hints import Changed
from relay.routing.invalidation import Invalidation


class House:
    """All around an Invalidation. ``hanging``: what is under way, with the conversation that it is of."""

    def __init__(self) -> None:
        self.hanging: dict[asyncio.Future[None], str] = {}
        self.forgotten: list[str] = []
        self.confirmed: list[tuple[str, list[int]]] = []

    def changed(self, *, conversation: str | None = None, user: str | None = None) -> None:
        self.forgotten.append(conversation or user or "")

    async def late(self) -> set[asyncio.Future[None]]:
        await asyncio.sleep(0)
        return {over for over in self.hanging if not over.done()}

    def concerned(
        self, late: set[asyncio.Future[None]], conversations: Iterable[str], users: Iterable[str]
    ) -> list[asyncio.Future[None]]:
        assert set(conversations) | set(users) <= set(self.forgotten), "it was forgotten before"
        return [over for over, name in self.hanging.items() if over in late and name in conversations]

    async def barrier(self, conversations: Iterable[str], users: Iterable[str]) -> None:
        for over in self.concerned(await self.late(), conversations, users):
            await over

    async def leasing(self) -> list[str]:
        return []

    async def invalidate(self, *_: Any) -> bool:
        return True

    def confirm(self, node: str, numbers: Collection[int]) -> None:
        self.confirmed.append((node, list(numbers)))

    def hang(self, conversation: str) -> asyncio.Future[None]:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.hanging[over] = conversation
        return over


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
async def invalidation(house: House) -> AsyncIterator[Invalidation]:
    world: Any = house
    found = Invalidation(world, world, world, world, Metrics(), commit_seconds=1)
    yield found
    await found.close()


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_change_is_told_when_what_concerns_it_is_over(
    house: House, invalidation: Invalidation
) -> None:
    hanging = house.hang("slow")
    await asyncio.wait_for(invalidation.tell(conversations=["quick"]), 5)
    telling = asyncio.ensure_future(invalidation.tell(conversations=["slow", "quick"]))
    await asyncio.sleep(0.05)
    assert not telling.done()
    house.hang("slow")
    hanging.set_result(None)
    # What has begun since goes by what is so now.
    await asyncio.wait_for(telling, 5)


async def test_what_another_node_changed_is_confirmed_when_what_concerns_it_is_over(
    house: House, invalidation: Invalidation
) -> None:
    first, second = house.hang("slow"), house.hang("slow")
    invalidation.take(Changed("n1", 1, ["slow"], []))
    invalidation.take(Changed("n1", 2, ["quick"], ["ann"]))
    invalidation.take(Changed("n2", 7, [], ["bob"]))
    invalidation.take(Changed("n1", 3, ["other"], []))
    assert house.confirmed == []
    await turns()
    assert house.confirmed == [("n1", [2, 3]), ("n2", [7])], "at once, and together"
    first.set_result(None)
    await turns()
    assert len(house.confirmed) == 2
    second.set_result(None)
    await turns()
    assert house.confirmed[2:] == [("n1", [1])]


async def test_nothing_is_confirmed_once_it_is_closed(house: House, invalidation: Invalidation) -> None:
    hanging = house.hang("slow")
    invalidation.take(Changed("n1", 1, ["slow"], []))
    invalidation.take(Changed("n1", 2, ["quick"], []))
    await invalidation.close()
    hanging.set_result(None)
    await turns()
    assert house.confirmed == []
