"""Handing out parts of large messages in slices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from relay.routing.fanout import Fanout
from relay.wire.envelope import Envelope
from tests.support.backlog import message


class Taken:
    """What was handed out, slice by slice."""

    def __init__(self) -> None:
        self.slices: list[list[str]] = []
        self.fanout = Fanout(self.take)

    def take(self, _: Envelope, keys: Sequence[str]) -> None:
        self.slices.append(list(keys))


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
        while sum(map(len, taken.slices)) < count:
            await asyncio.sleep(0)


async def test_everybody_gets_it_once_in_order(taken: Taken) -> None:
    parts = [part(number, 50) for number in range(4)]
    for one in parts:
        taken.fanout.put(one)
    await handed_out(taken, 200)
    assert [key for keys in taken.slices for key in keys] == [key for one in parts for key in one.awaiting]
    assert taken.fanout.waiting == 0


async def test_others_have_their_turn_after_every_slice(taken: Taken) -> None:
    taken.fanout.put(part(1, 160))
    turns = 0
    while sum(map(len, taken.slices)) < 160:
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 10
    assert max(map(len, taken.slices)) <= 16


async def test_who_has_drained_it_before_their_turn_does_not_get_it_again(taken: Taken) -> None:
    parts = [part(1, 40), part(1, 40)]
    for one in parts:
        taken.fanout.put(one)
    late = parts[0].awaiting[30]
    taken.fanout.ended(parts[0].doc_id, late)
    taken.fanout.ended(message(2).doc_id, late)
    await handed_out(taken, 78)
    assert late not in {key for keys in taken.slices for key in keys}
    while taken.fanout.waiting:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not taken.fanout._pending


async def test_whoever_commits_more_waits_until_half_is_handed_out(taken: Taken) -> None:
    for number in range(500):
        taken.fanout.put(part(number, 64))
    assert taken.fanout.waiting == 32_000
    async with asyncio.timeout(5):
        await taken.fanout.room()
    assert taken.fanout.waiting <= 10_000


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
