"""Group commit: order, bounds, back-pressure, and its end."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.metrics import Metrics
from relay.store import batcher as batchers
from relay.store.batcher import Batcher, BatcherClosed
from tests.support.backlog import turns


class Commits:
    """Collects groups. While ``gate`` is clear commits hang; ``fault`` makes the next ones raise."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.started: list[list[int]] = []
        self.abandoned: list[int] = []
        self.faults: list[BaseException] = []
        self.fault: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def commit(self, group: list[int]) -> None:
        self.started.append(group)
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        self.groups.append(group)

    @property
    def done(self) -> list[int]:
        return [item for group in self.groups for item in group]


def batcher(commits: Commits, *, metrics: Metrics | None = None, **limits: Any) -> Batcher[int]:
    values: dict[str, Any] = {
        "max_items": 10,
        "max_bytes": 1000,
        "queue_items": 100,
        "queue_bytes": 10_000,
        "workers": 1,
        **limits,
    }
    return Batcher[int](
        "test",
        commits.commit,
        commits.abandoned.extend,
        metrics=metrics or Metrics(),
        dead=commits.faults.append,
        **values,
    )


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


async def test_it_is_idle_when_nothing_is_queued_or_being_committed() -> None:
    commits = Commits()
    commits.gate.clear()
    one = batcher(commits)
    seen = [one.idle]
    one.submit(1, 10)
    seen.append(one.idle)
    await until(lambda: commits.started == [[1]])
    seen.append(one.idle)
    assert seen == [True, False, False]
    commits.gate.set()
    await until(lambda: one.idle)
    assert commits.groups == [[1]]
    await one.close(1)


async def test_one_item_alone_is_committed_at_once() -> None:
    commits = Commits()
    one = batcher(commits)
    one.submit(1, 10)
    await turns()
    assert commits.groups == [[1]]
    await one.close(1)


async def test_while_one_group_is_in_flight_the_next_gathers() -> None:
    commits = Commits()
    one = batcher(commits)
    commits.gate.clear()
    one.submit(1, 10)
    await turns()
    for item in range(2, 8):
        one.submit(item, 10)
        await turns(2)
    assert commits.started == [[1]]
    commits.gate.set()
    await turns()
    assert commits.groups == [[1], [2, 3, 4, 5, 6, 7]]
    await one.close(1)


@settings(max_examples=60)
@given(
    items=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 4)), max_size=60),
    pauses=st.sets(st.integers(0, 60)),
)
async def test_items_are_committed_in_order_in_groups_within_the_bounds(
    items: list[tuple[int, int]], pauses: set[int]
) -> None:
    commits = Commits()
    one = batcher(commits)
    for number, (size, weight) in enumerate(items):
        one.submit(number, size, weight)
        if number in pauses:
            await turns(3)
    await one.close(5)
    assert commits.done == list(range(len(items)))
    assert commits.abandoned == []
    for group in commits.groups:
        assert group
        # One item may be larger than a group; nothing is added once a bound is reached.
        assert len(group) == 1 or sum(items[item][0] for item in group) <= 1000
        assert sum(items[item][1] for item in group[:-1]) < 10


async def test_an_item_larger_than_a_group_goes_alone() -> None:
    commits = Commits()
    one = batcher(commits)
    for item, size in enumerate((10, 5000, 10)):
        one.submit(item, size)
    await one.close(1)
    assert commits.groups == [[0], [1], [2]]


async def test_two_committers_work_at_once() -> None:
    commits = Commits()
    one = batcher(commits, workers=2, max_items=1)
    commits.gate.clear()
    for item in range(3):
        one.submit(item, 1)
    await turns()
    assert commits.started == [[0], [1]]
    commits.gate.set()
    await one.close(1)
    assert sorted(commits.done) == [0, 1, 2]


@pytest.mark.parametrize(("size", "weight"), [(1, 1), (100, 1), (1, 5)])
async def test_a_full_queue_holds_its_sources_back_until_half_is_gone(size: int, weight: int) -> None:
    commits = Commits()
    one = batcher(commits, max_items=10, queue_items=40, queue_bytes=4000, max_bytes=100_000)
    commits.gate.clear()
    one.submit(-1, 0)
    await turns()
    count = 0
    while not one.full:
        one.submit(count, size, weight)
        count += 1
    assert count * max(size * 0.01, weight) == 40
    waiter = asyncio.ensure_future(one.room())
    await turns()
    assert not waiter.done()
    commits.gate.set()
    await asyncio.wait_for(waiter, 1)
    assert [one.full] == [False]
    await one.close(1)
    assert commits.done == [-1, *range(count)]


async def test_room_comes_when_half_is_gone_and_not_before() -> None:
    commits = Commits()
    one = batcher(commits, max_items=10, queue_items=40)
    commits.gate.clear()
    one.submit(-1, 0)
    await turns()
    for item in range(40):
        one.submit(item, 1)
    full = []
    for _ in range(4):
        commits.gate.set()
        await asyncio.sleep(0)
        commits.gate.clear()
        await turns()
        full.append((sum(len(group) for group in commits.started) - 1, one.full))
    commits.gate.set()
    await one.close(1)
    assert full == [(10, True), (20, False), (30, False), (40, False)]


async def test_submitting_never_refuses_for_lack_of_room() -> None:
    commits = Commits()
    one = batcher(commits, queue_items=5)
    for item in range(50):
        one.submit(item, 1)
    assert one.full
    await one.close(1)
    assert commits.done == list(range(50))


async def test_closing_commits_what_is_queued_and_takes_nothing_more() -> None:
    commits = Commits()
    one = batcher(commits)
    for item in range(35):
        one.submit(item, 1)
    closing = asyncio.ensure_future(one.close(5))
    await asyncio.sleep(0)
    with pytest.raises(BatcherClosed):
        one.submit(99, 1)
    await closing
    assert commits.done == list(range(35))
    assert commits.abandoned == []
    assert commits.faults == []


async def test_closing_abandons_what_cannot_be_committed_in_time() -> None:
    commits = Commits()
    one = batcher(commits)
    commits.gate.clear()
    for item in range(25):
        one.submit(item, 1)
    await turns()
    await one.close(0.05)
    assert commits.groups == []
    assert sorted(commits.abandoned) == list(range(25))
    assert commits.faults == []


async def test_closing_wakes_whoever_waits_for_room() -> None:
    commits = Commits()
    one = batcher(commits, queue_items=2)
    commits.gate.clear()
    for item in range(5):
        one.submit(item, 1)
    waiter = asyncio.ensure_future(one.room())
    await turns()
    closing = asyncio.ensure_future(one.close(0.05))
    await asyncio.wait_for(waiter, 1)
    await closing


async def test_an_idle_batcher_closes_at_once() -> None:
    commits = Commits()
    one = batcher(commits, workers=3)
    await turns()
    await asyncio.wait_for(one.close(5), 1)
    assert commits.started == []


async def test_a_commit_that_raises_ends_the_batcher_and_everything_in_it_is_abandoned() -> None:
    commits = Commits()
    one = batcher(commits)
    commits.fault = RuntimeError("a fault of ours")
    for item in range(25):
        one.submit(item, 1)
    await until(lambda: bool(commits.faults))
    assert commits.faults == [commits.fault]
    assert sorted(commits.abandoned) == list(range(25))
    assert commits.groups == []
    with pytest.raises(BatcherClosed):
        one.submit(99, 1)
    await asyncio.wait_for(one.room(), 1)
    await one.close(1)
    assert sorted(commits.abandoned) == list(range(25))


async def test_the_death_of_several_committers_is_told_once() -> None:
    commits = Commits()
    one = batcher(commits, workers=2, max_items=1)
    commits.gate.clear()
    for item in range(2):
        one.submit(item, 1)
    await turns()
    assert len(commits.started) == 2
    commits.fault = RuntimeError("a fault of ours")
    commits.gate.set()
    await turns()
    await one.close(1)
    assert sorted(commits.abandoned) == [0, 1]
    assert commits.faults == [commits.fault]


async def timed(commits: Commits, one: Batcher[int], items: int) -> float:
    """Seconds until the next group begins, when so many come together."""
    began, groups = monotonic(), len(commits.started)
    for item in range(items):
        one.submit(item, 1)
    await until(lambda: len(commits.started) > groups)
    return monotonic() - began


def taking(monkeypatch: pytest.MonkeyPatch, seconds: float, *, longest: float = 60) -> None:
    """Every call seems to take so long; no rest is longer than ``longest``."""
    monkeypatch.setattr(batchers, "perf_counter", partial(next, itertools.count(step=seconds)))
    monkeypatch.setattr(batchers, "_LONGEST_REST", longest)


async def test_with_spacing_the_first_goes_at_once_and_the_next_waits_unless_it_is_worth_a_call() -> None:
    commits = Commits()
    one = batcher(commits, max_items=80, spacing=3)
    assert await timed(commits, one, 1) < 2
    assert await timed(commits, one, 10) < 2
    assert await timed(commits, one, 9) > 1
    assert [len(group) for group in commits.started] == [1, 10, 9]


async def gathering(one: Batcher[int], commits: Commits, *, most: int) -> None:
    """One group, and while the committer rests, one item less than ends the rest, then that."""
    await timed(commits, one, 1)
    for item in range(most - 1):
        one.submit(item, 1)
    await turns(5)
    assert len(commits.started) == 1
    await timed(commits, one, 1)
    assert [len(group) for group in commits.started] == [1, most]


async def test_what_becomes_worth_a_call_in_the_meantime_goes_then() -> None:
    commits = Commits()
    await gathering(batcher(commits, max_items=80, spacing=60), commits, most=10)


async def test_beside_others_half_a_full_group_ends_the_rest_after_a_long_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taking(monkeypatch, 60)
    commits = Commits()
    await gathering(batcher(commits, max_items=80, spacing=0.01, others=lambda: True), commits, most=40)


async def test_a_rest_ends_when_sources_are_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    taking(monkeypatch, 60)
    commits = Commits()
    one = batcher(commits, max_items=80, queue_items=20, spacing=0.01, others=lambda: True)
    await gathering(one, commits, most=20)


async def test_beside_others_the_next_waits_as_long_as_a_long_call_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taking(monkeypatch, 2)
    commits = Commits()
    one = batcher(commits, max_items=80, spacing=0.01, others=lambda: True)
    await timed(commits, one, 1)
    assert await timed(commits, one, 39) > 1


async def test_with_no_others_a_long_call_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    taking(monkeypatch, 60)
    commits = Commits()
    one = batcher(commits, max_items=80, spacing=0.01)
    await timed(commits, one, 1)
    await timed(commits, one, 1)
    assert [len(group) for group in commits.started] == [1, 1]


async def test_no_rest_is_longer_than_a_moment_however_long_the_call_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taking(monkeypatch, 60, longest=batchers._LONGEST_REST)
    commits = Commits()
    one = batcher(commits, max_items=80, spacing=0.01, others=lambda: True)
    await timed(commits, one, 1)
    await timed(commits, one, 1)
    assert [len(group) for group in commits.started] == [1, 1]


async def test_closing_ends_a_rest() -> None:
    commits = Commits()
    one = batcher(commits, max_items=80, spacing=60)
    await timed(commits, one, 1)
    await until(lambda: len(commits.groups) == 1)
    one.submit(2, 1)
    await turns(5)
    await one.close(timeout=5)
    assert commits.done == [0, 2]
    assert not commits.abandoned


async def test_the_depth_of_the_queue_is_on_the_metrics() -> None:
    commits, metrics = Commits(), Metrics()
    one = batcher(commits, metrics=metrics)
    commits.gate.clear()
    one.submit(0, 1)
    await turns()
    for item in range(1, 4):
        one.submit(item, 50, 2)
    sample = metrics.registry.get_sample_value
    assert sample("relay_queue_items", {"queue": "test"}) == 6
    assert sample("relay_queue_bytes", {"queue": "test"}) == 150
    commits.gate.set()
    await one.close(1)
    assert sample("relay_queue_items", {"queue": "test"}) == 0
    assert sample("relay_queue_bytes", {"queue": "test"}) == 0
    assert sample("relay_commit_batch_size_sum", {"queue": "test"}) == 4
