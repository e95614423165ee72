"""The bus over a real Valkey: how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from relay.metrics import Metrics
from relay.routing.hints import Hint
from relay.routing.hub import Hub
from relay.routing.redis_bus import RedisBus
from relay.tasks import ended
from tests.support.valkey import open_valkey


class Nobody:
    """Takes every hint and does nothing."""

    def take(self, node: str, hints: Iterable[Hint]) -> None:
        """Nothing."""


async def test_it_ends_at_whatever_moment_of_its_work(tmp_path: Path) -> None:
    async with open_valkey(tmp_path) as server:
        for number in range(6):
            bus = RedisBus(server.url, Hub(), Metrics(), node=f"n{number}", prefix="relay:test")
            await bus.start(Nobody())
            for _ in range(number % 7):
                bus.recheck(["ann"])
                bus.leave("bob", "phone", 1)
                await asyncio.sleep(0)
            # Its last words are waited for; what is said then is cut short.
            closing = asyncio.create_task(bus.close())
            while bus.shared and not closing.done():
                bus.recheck(["ann"])
                await asyncio.sleep(0)
            async with asyncio.timeout(10):
                await closing


async def test_a_task_that_does_not_hear_the_first_time_is_ended_too() -> None:
    heard = 0

    async def stubborn() -> None:
        nonlocal heard
        while heard < 3:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                heard += 1

    async def broken() -> None:
        raise ValueError

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(broken())]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await ended(tasks)
    assert heard == 3
