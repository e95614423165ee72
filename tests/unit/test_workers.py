"""The supervisor of workers by itself: how long it waits before it starts a dead one again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from config.settings import Settings
from relay import workers as module
from relay.workers import FIRST_BACKOFF, LAST_BACKOFF, STEADY, Workers, _Place


def dead(lived: float) -> Any:
    """A worker that has ended after so many seconds."""
    exit_ = asyncio.get_running_loop().create_future()
    exit_.set_result(-9)
    return SimpleNamespace(number=1, pid=4711, lived=lived, exit=exit_)


async def waits(monkeypatch: pytest.MonkeyPatch, lives: list[float]) -> list[float]:
    """How long the supervisor waits after each of these lives of a worker, one after the other."""
    found: list[float] = []
    alive = SimpleNamespace(exit=asyncio.get_running_loop().create_future())
    following = iter([*map(dead, lives[1:]), alive])

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    supervisor = Workers(Settings(workers=2))
    monkeypatch.setattr(supervisor, "_spawn", lambda _: next(following))
    place = _Place(1)
    place.worker = dead(lives[0])
    place.begun.set()
    keeping = asyncio.create_task(supervisor._keep(place))
    async with asyncio.timeout(5):
        while cast("object", place.worker) is not alive:
            await asyncio.sleep(0)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    return found


async def test_a_worker_that_dies_again_and_again_is_started_later_each_time_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "random", SimpleNamespace(uniform=lambda *_: 1.0))
    found = await waits(monkeypatch, [1.0] * 10)
    assert found[:4] == [FIRST_BACKOFF * 2**n for n in range(4)]
    assert found == sorted(found)
    assert found[-3:] == [LAST_BACKOFF] * 3
    assert max(found) == LAST_BACKOFF


async def test_a_worker_that_lived_long_is_started_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "random", SimpleNamespace(uniform=lambda *_: 1.0))
    found = await waits(monkeypatch, [1.0, 1.0, 1.0, STEADY, 1.0])
    assert found == [FIRST_BACKOFF * factor for factor in (1, 2, 4, 1, 2)]


async def test_the_waits_vary_by_half_so_that_workers_do_not_start_in_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = await waits(monkeypatch, [STEADY] * 50)
    assert all(0.5 * FIRST_BACKOFF <= wait <= 1.5 * FIRST_BACKOFF for wait in found)
    assert max(found) - min(found) > 0.2 * FIRST_BACKOFF
