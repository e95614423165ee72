"""How a channel of Redis comes back: later each time, up to a limit, and no two nodes in step."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from relay.routing import channels as module
from relay.routing.channels import Channel

FIRST, LAST = 0.1, 2.0


def lost() -> Any:
    raise ConnectionError


async def waits(monkeypatch: pytest.MonkeyPatch, count: int) -> list[float]:
    """How long a channel waits before each of so many tries, while there is no Redis."""
    found: list[float] = []
    enough = asyncio.Event()

    async def sleep(seconds: float) -> None:
        found.append(seconds)
        if len(found) == count:
            enough.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    redis: Any = SimpleNamespace(pubsub=lambda **_: lost())
    running = asyncio.create_task(Channel(redis, "one", lambda _: None).run())
    async with asyncio.timeout(5):
        await enough.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return found


async def test_it_waits_longer_each_time_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "random", SimpleNamespace(uniform=lambda *_: 1.0))
    assert await waits(monkeypatch, 8) == [FIRST, 0.2, 0.4, 0.8, 1.6, LAST, LAST, LAST]


async def test_nodes_that_lost_redis_at_one_moment_do_not_come_back_at_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [await waits(monkeypatch, 1) for _ in range(50)]
    found = [first for (first,) in nodes]
    assert all(0.5 * FIRST <= wait <= 1.5 * FIRST for wait in found)
    assert max(found) - min(found) > 0.2 * FIRST
