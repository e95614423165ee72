"""A storm goes on a few at a time, and everybody else has their turn in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from relay.session.turns import Turns


async def test_a_few_go_on_at_once_and_the_rest_in_order_a_few_at_a_time() -> None:
    found = Turns(burst=3)
    went: list[int] = []
    # How many had gone at each turn of the loop.
    counts: list[int] = []

    async def one(number: int) -> None:
        await found.turn()
        went.append(number)

    tasks = [asyncio.create_task(one(number), name=f"one {number}") for number in range(20)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        counts.append(len(went))
    assert went == list(range(20))
    steps = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    assert max(steps) <= 3, counts
    assert not len(found)


async def test_who_comes_alone_does_not_wait() -> None:
    found = Turns()
    for _ in range(20):
        task = asyncio.ensure_future(found.turn())
        await asyncio.sleep(0)
        assert task.done()
        await asyncio.sleep(0)


async def test_who_gives_up_takes_nobodys_turn() -> None:
    found = Turns(burst=1)
    tasks = [asyncio.ensure_future(found.turn()) for _ in range(10)]
    await asyncio.sleep(0)
    for task in tasks[1:9]:
        task.cancel()
    async with asyncio.timeout(5):
        await tasks[9]
    assert sum(task.cancelled() for task in tasks) >= 6


async def test_a_turn_that_fails_is_nobodys_but_its_own() -> None:
    found = Turns(burst=1)
    failures: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    def fails() -> bool:
        raise LookupError

    try:
        assert found.free()
        assert not found.free()
        found.later(fails)
        async with asyncio.timeout(5):
            await found.turn()
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    assert len(failures) == 1


def slow() -> bool:
    """Somebody's turn that takes two milliseconds."""
    time.sleep(0.002)
    return True


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[float]]:
    """From when it is called on pauses are noted, and over at once."""

    def note() -> list[float]:
        noted: list[float] = []
        loop = asyncio.get_running_loop()
        later = loop.call_later

        def at_once(delay: float, *args: Any) -> asyncio.TimerHandle:
            noted.append(delay)
            return later(0, *args)

        monkeypatch.setattr(loop, "call_later", at_once)
        return noted

    return note


async def test_others_have_several_times_as_long_and_in_a_large_storm_some_seconds_altogether(
    pauses: Callable[[], list[float]],
) -> None:
    found = Turns(burst=1)
    noted = pauses()

    async def storm(size: int) -> list[float]:
        noted.clear()
        for _ in range(size):
            if not found.free():
                found.later(slow)
        while len(found):
            await asyncio.sleep(0)
        return noted[:-1]

    assert min(await storm(30)) >= 30 * 0.002
    large = await storm(1200)
    assert max(large[:900]) <= 12 / 1000
    assert sum(large[:1000]) <= 12.5
    # Few are left.
    assert min(large[-20:]) >= 30 * 0.002
    assert sum(large) <= 30
    assert min(await storm(30)) >= 30 * 0.002


async def test_while_nobody_else_talks_the_next_wait_hardly_longer_than_the_first_took(
    pauses: Callable[[], list[float]],
) -> None:
    talking = [False]
    found = Turns(burst=1, others=lambda: talking[0])
    noted = pauses()
    averages = []
    for talks in (False, True):
        talking[0] = talks
        noted.clear()
        for _ in range(50):
            if not found.free():
                found.later(slow)
        while len(found):
            await asyncio.sleep(0)
        averages.append(sum(noted) / len(noted))
    quiet, busy = averages
    assert 5 * quiet < busy
