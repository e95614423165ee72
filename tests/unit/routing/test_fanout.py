"""Handing out parts of large messages in slices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from relay.routing.fanout import Fanout
from relay.wire.envelope import Envelope
from tests.support.backlog import message


class Taken:
    """What was handed out: who got which parts, and in which turn of the loop."""

    def __init__(self) -> None:
        self.handed: list[tuple[str, list[Envelope]]] = []
        self.busy = False
        self.fanout = Fanout(self.take, lambda: self.busy)

    def take(self, key: str, parts: Sequence[Envelope]) -> None:
        self.handed.append((key, list(parts)))

    @property
    def count(self) -> int:
        return sum(len(parts) for _, parts in self.handed)


@pytest.fixture
async def taken() -> AsyncIterator[Taken]:
    found = Taken()
    found.fanout.start()
    yield found
    await found.fanout.close()


def part(number: int, recipients: int) -> Envelope:
    return message(number, *(f"p{number}-{n}/phone" for n in range(recipients)))


async def handed_out(taken: Taken, count: int) -> None:
    async with asyncio.timeout(3):
        while taken.count < count or taken.fanout.waiting:
            await asyncio.sleep(0)


async def test_everybody_gets_it_once_in_order(taken: Taken) -> None:
    parts = [part(number, 50) for number in range(4)]
    for one in parts:
        taken.fanout.put(one)
    await handed_out(taken, 200)
    assert [key for key, _ in taken.handed] == [key for one in parts for key in one.awaiting]
    assert all(its == [parts[n // 50]] for n, (_, its) in enumerate(taken.handed))


async def test_what_is_queued_for_one_device_is_handed_to_it_together_and_in_order(taken: Taken) -> None:
    everybody = [f"p{n}/phone" for n in range(40)]
    messages = [message(number, *everybody) for number in range(3)]
    for one in messages:
        taken.fanout.put(one)
    await handed_out(taken, 120)
    assert taken.handed == [(key, messages) for key in everybody]


async def test_what_comes_while_others_are_handed_out_is_handed_out_next(taken: Taken) -> None:
    everybody = [f"p{n}/phone" for n in range(100)]
    taken.fanout.put(message(0, *everybody))
    while not taken.handed:
        await asyncio.sleep(0)
    for number in range(1, 4):
        taken.fanout.put(message(number, *everybody))
    await handed_out(taken, 400)
    assert [len(parts) for _, parts in taken.handed] == [1] * 100 + [3] * 100


async def test_others_have_their_turn_after_every_slice(taken: Taken) -> None:
    taken.fanout.put(part(1, 160))
    most = before = 0
    while taken.count < 160:
        await asyncio.sleep(0)
        most, before = max(most, taken.count - before), taken.count
    assert 0 < most <= 16


async def test_beside_messages_between_few_devices_it_pauses_after_smaller_slices(taken: Taken) -> None:
    taken.busy = True
    taken.fanout.put(part(1, 40))
    while taken.count < 40:
        before = taken.count
        await asyncio.sleep(0)
        assert taken.count - before <= 16
        began = taken.count
        for _ in range(20):
            await asyncio.sleep(0)
        assert taken.count - began <= 8, "a pause, not only a turn"
        await asyncio.sleep(0.005)


async def test_who_has_drained_it_before_their_turn_does_not_get_it_again(taken: Taken) -> None:
    parts = [part(1, 40), part(1, 40)]
    for one in parts:
        taken.fanout.put(one)
    late = parts[0].awaiting[30]
    taken.fanout.ended(parts[0].doc_id, late)
    taken.fanout.ended(message(2).doc_id, late)
    await handed_out(taken, 78)
    assert [its for key, its in taken.handed if key == late] == [[]]
    await asyncio.sleep(0)
    assert not taken.fanout._pending


async def test_whoever_commits_more_waits_until_half_is_handed_out(taken: Taken) -> None:
    for number in range(500):
        taken.fanout.put(part(number, 64))
    assert taken.fanout.waiting == 32_000
    async with asyncio.timeout(5):
        await taken.fanout.room()
    assert taken.fanout.waiting <= 10_000


async def test_one_that_fails_holds_up_nobody() -> None:
    taken = Taken()
    calls: list[str] = []

    def fails(key: str, parts: Sequence[Envelope]) -> None:
        calls.append(key)
        if len(calls) == 1:
            raise RuntimeError("a fault of ours")
        taken.take(key, parts)

    fanout = Fanout(fails, lambda: False)
    fanout.start()
    fanout.put(part(1, 3))
    async with asyncio.timeout(3):
        while taken.count < 2:
            await asyncio.sleep(0)
    await fanout.close()


async def test_it_ends_and_holds_nobody_up_who_waits_for_room() -> None:
    taken = Taken()
    for number in range(500):
        taken.fanout.put(part(number, 64))
    waiting = asyncio.create_task(taken.fanout.room())
    await asyncio.sleep(0)
    taken.fanout.start()
    await taken.fanout.close()
    async with asyncio.timeout(1):
        await waiting
