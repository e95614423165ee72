"""Looks for what was lost between nodes, out of turn: soon, after whatever it was, and not too often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import pytest
from pymongo.errors import AutoReconnect

from relay.jobs import sweep as module
from relay.jobs.sweep import Sweep
from relay.routing.hub import Hub
from tests.support.waiting import until

GRACE, REST = 0.05, 0.4


class Looking(Sweep):
    """A sweep that only notes when it looks."""

    def __init__(self) -> None:
        nothing: Any = None
        super().__init__(Hub(), nothing, nothing, nothing, lambda: 0)
        self.looks: list[float] = []
        self.fails = False

    async def find_missed(self) -> None:
        self.looks.append(monotonic())
        if self.fails:
            raise AutoReconnect("away")

    async def looked(self, count: int) -> None:
        async def holds() -> bool:
            return len(self.looks) >= count

        await until(holds, 5, f"{count} looks")


@pytest.fixture
async def sweep(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Looking]:
    monkeypatch.setattr(module, "_GRACE_MS", int(GRACE * 1000))
    monkeypatch.setattr(module, "_SPREAD_SECONDS", (0.01, 0.05))
    monkeypatch.setattr(module, "_REST_SECONDS", REST)
    found = Looking()
    yield found
    await found.close()


async def test_a_look_begins_when_what_was_lost_is_old_enough_to_be_found(sweep: Looking) -> None:
    asked = monotonic()
    sweep.hurry()
    await sweep.looked(1)
    assert sweep.looks[0] >= asked + GRACE


async def test_whatever_is_asked_for_while_a_look_is_due_is_found_by_it_or_by_another(sweep: Looking) -> None:
    for _ in range(20):
        sweep.hurry()
        asked = monotonic()
        await asyncio.sleep(0.02)
    async with asyncio.timeout(5):
        while not sweep.looks or sweep.looks[-1] < asked + GRACE:
            await asyncio.sleep(0.01)
    count = len(sweep.looks)
    await asyncio.sleep(2 * REST)
    assert len(sweep.looks) == count, "and then there is nothing more to look for"


async def test_a_flapping_redis_makes_no_more_looks_than_one_in_a_while(sweep: Looking) -> None:
    began = monotonic()
    while len(sweep.looks) < 4:
        assert monotonic() < began + 10
        for _ in range(100):
            sweep.hurry()
        await asyncio.sleep(0.005)
    gaps = [late - early for early, late in zip(sweep.looks, sweep.looks[1:], strict=False)]
    assert min(gaps) >= REST - 0.01


async def test_a_look_that_fails_does_not_end_what_comes_after(sweep: Looking) -> None:
    sweep.fails = True
    sweep.hurry()
    await sweep.looked(1)
    sweep.fails = False
    sweep.hurry()
    await sweep.looked(2)
