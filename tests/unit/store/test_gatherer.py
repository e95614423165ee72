"""Questions in groups: no delay, no lost waiter, and whatever happens to one harms no other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import pytest

from relay.metrics import Metrics
from relay.store.gatherer import Gatherer, GathererClosed, GathererFull
from tests.support.backlog import turns


class Questions:
    """Doubles numbers, in groups, while ``gate`` is open; a negative number cannot be doubled, and 99 spoils its group."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def ask(self, group: list[int]) -> Sequence[int | Exception]:
        self.groups.append(group)
        await asyncio.sleep(0)
        await self.gate.wait()
        if 99 in group:
            raise ValueError("ninety-nine")
        return [LookupError(str(one)) if one < 0 else 2 * one for one in group]


def gatherer(questions: Questions, **limits: Any) -> Gatherer[int, int]:
    values: dict[str, Any] = {"most": 10, "queue": 100, "patience": 30.0, "beside": 3, **limits}
    return Gatherer("test", questions.ask, metrics=Metrics(), **values)


def ask(of: Gatherer[int, int], *items: int) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(of.answer(item), name=f"ask {item}") for item in items]


async def test_one_alone_is_asked_at_once() -> None:
    questions = Questions()
    assert await gatherer(questions).answer(4) == 8
    assert questions.groups == [[4]]


async def test_while_one_group_is_asked_the_next_gathers_up_to_the_most() -> None:
    questions = Questions()
    questions.gate.clear()
    found = gatherer(questions)
    first = ask(found, 0)
    await turns()
    rest = ask(found, *range(1, 16))
    await turns()
    assert questions.groups == [[0]]
    questions.gate.set()
    assert await asyncio.gather(*first, *rest) == [2 * number for number in range(16)]
    assert questions.groups == [[0], list(range(1, 11)), list(range(11, 16))]
    await turns()
    assert found.idle


async def test_a_failure_is_that_of_its_item_and_a_spoiled_group_that_of_its_group() -> None:
    questions = Questions()
    questions.gate.clear()
    found = gatherer(questions, most=3)
    tasks = ask(found, 0)
    await turns()
    tasks += ask(found, 1, -2, 3, 4, 99, 5, 6)
    await turns()
    questions.gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) if isinstance(one, Exception) else one for one in answers] == [
        0,
        2,
        LookupError,
        6,
        ValueError,
        ValueError,
        ValueError,
        12,
    ]


async def test_a_group_that_hangs_holds_up_others_for_a_moment_only_and_so_many_at_most() -> None:
    questions = Questions()
    questions.gate.clear()
    found = gatherer(questions, patience=0.01, beside=3)
    tasks: list[asyncio.Task[int]] = []
    for number in range(3):
        tasks += ask(found, number)
        async with asyncio.timeout(5):
            while len(questions.groups) <= number:
                await asyncio.sleep(0.001)
    tasks += ask(found, 3, 4)
    await asyncio.sleep(0.05)
    assert questions.groups == [[0], [1], [2]]
    questions.gate.set()
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8]
    assert [3, 4] in questions.groups
    await turns()
    assert found.idle


async def test_who_gives_up_is_not_asked_for_and_harms_nobody() -> None:
    questions = Questions()
    questions.gate.clear()
    found = gatherer(questions)
    first = ask(found, 0, 1)
    await turns()
    rest = ask(found, 2, 3)
    await turns()
    for task in (first[0], rest[0]):
        task.cancel()
    await turns()
    questions.gate.set()
    assert [await first[1], await rest[1]] == [2, 6]
    assert questions.groups == [[0, 1], [3]]


async def test_a_full_queue_refuses_and_takes_again() -> None:
    questions = Questions()
    questions.gate.clear()
    found = gatherer(questions, queue=2)
    tasks = ask(found, 0)
    await turns()
    tasks += ask(found, 1, 2)
    await turns()
    with pytest.raises(GathererFull):
        await found.answer(3)
    questions.gate.set()
    assert await asyncio.gather(*tasks) == [0, 2, 4]
    assert await found.answer(3) == 6


async def test_closing_tells_everybody_who_waits_and_leaves_no_task() -> None:
    questions = Questions()
    questions.gate.clear()
    found = gatherer(questions)
    tasks = ask(found, 0)
    await turns()
    tasks += ask(found, 1, 2)
    await turns()
    await found.close()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(one, GathererClosed) for one in answers)
    with pytest.raises(GathererClosed):
        await found.answer(3)
    assert not found._tasks


async def test_a_question_that_answers_too_few_is_a_fault_of_its_group_only() -> None:
    async def short(group: list[int]) -> list[int]:
        return [] if 0 in group else group

    found = Gatherer[int, int]("test", short, metrics=Metrics(), most=10, queue=10, patience=30, beside=1)
    with pytest.raises(RuntimeError):
        await found.answer(0)
    assert await found.answer(1) == 1


async def test_a_time_limit_of_who_came_first_is_not_that_of_those_who_follow() -> None:
    limit: ContextVar[int | None] = ContextVar("limit", default=None)
    seen: list[int | None] = []

    async def look(group: list[int]) -> list[int]:
        seen.append(limit.get())
        return group

    found = Gatherer[int, int]("test", look, metrics=Metrics(), most=1, queue=10, patience=30, beside=1)
    limit.set(1)
    await asyncio.gather(*(found.answer(number) for number in range(3)))
    assert seen == [None, None, None]


async def test_nobody_waits_for_ever_whatever_the_order_of_events() -> None:
    chance = random.Random(5)

    async def now_and_then(group: list[int]) -> list[int]:
        for _ in range(chance.choice((0, 1, 2, 5))):
            await asyncio.sleep(0)
        if chance.random() < 0.2:
            await asyncio.sleep(0.004)
        if chance.random() < 0.1:
            raise LookupError
        return group

    found = Gatherer[int, int](
        "test", now_and_then, metrics=Metrics(), most=7, queue=10_000, patience=0.002, beside=3
    )
    tasks: list[asyncio.Task[int]] = []
    for number in range(2000):
        tasks += ask(found, number)
        if chance.random() < 0.3:
            await asyncio.sleep(0)
        if chance.random() < 0.05:
            chance.choice(tasks).cancel()
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(
        answer == number or isinstance(answer, LookupError | asyncio.CancelledError)
        for number, answer in enumerate(answers)
    )
    assert sum(answer == number for number, answer in enumerate(answers)) > 1000
    await turns(20)
    assert found.idle
    assert not found._prompt
