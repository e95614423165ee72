"""Jobs run again and again, whatever one of them does, until they are stopped."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from relay.jobs import supervisor as module
from relay.jobs.supervisor import Job, Supervisor
from tests.support.stand_in import StandIn


async def until_count(runs: list[str], name: str, count: int) -> None:
    async with asyncio.timeout(3):
        while runs.count(name) < count:
            await asyncio.sleep(0.002)


async def test_a_job_runs_again_and_again_until_it_is_stopped() -> None:
    runs: list[str] = []

    async def work() -> None:
        runs.append("work")

    supervisor = Supervisor([Job("work", work, 0.01, 0.5)])
    supervisor.start()
    assert runs == []
    await until_count(runs, "work", 3)
    await supervisor.stop()
    count = len(runs)
    await asyncio.sleep(0.05)
    assert len(runs) == count


async def test_a_job_that_does_not_hear_that_it_ends_is_told_again() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        if begun.is_set():
            await asyncio.sleep(60)
        # As asyncio.wait_for of Python 3.11 does when what it waits for is done at that moment.
        with contextlib.suppress(asyncio.CancelledError):
            begun.set()
            await asyncio.sleep(60)

    supervisor = Supervisor([Job("work", work, 0.01)])
    supervisor.start()
    await begun.wait()
    async with asyncio.timeout(3):
        await supervisor.stop()


async def test_a_job_that_fails_is_logged_and_runs_again_and_disturbs_no_other() -> None:
    runs: list[str] = []

    async def bad() -> None:
        runs.append("bad")
        raise ValueError("broken")

    async def good() -> None:
        runs.append("good")

    supervisor = Supervisor([Job("bad", bad, 0.01), Job("good", good, 0.01)])
    with capture_logs() as logs:
        supervisor.start()
        await until_count(runs, "bad", 2)
        await until_count(runs, "good", 2)
        await supervisor.stop()
    assert logs[0]["job"] == "bad"
    assert "ValueError" in logs[0]["error"]
    assert {entry["job"] for entry in logs} == {"bad"}


async def test_a_job_that_hangs_holds_up_no_other_and_ends_when_stopped() -> None:
    runs: list[str] = []
    ended = asyncio.Event()

    async def hangs() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def good() -> None:
        runs.append("good")

    supervisor = Supervisor([Job("hangs", hangs, 0.001), Job("good", good, 0.01)])
    supervisor.start()
    await until_count(runs, "good", 3)
    await asyncio.wait_for(supervisor.stop(), 1)
    assert ended.is_set()


async def test_jobs_run_under_their_names() -> None:
    names: list[str] = []

    async def work() -> None:
        task = asyncio.current_task()
        assert task is not None
        names.append(task.get_name())

    supervisor = Supervisor([Job("expiry", work, 0.001)])
    supervisor.start()
    await until_count(names, "job expiry", 1)
    await supervisor.stop()


async def test_runs_of_a_prompt_job_begin_no_further_apart_than_its_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    now = 100.0
    over = asyncio.Event()

    async def sleep(seconds: float) -> None:
        nonlocal now
        pauses.append(seconds)
        now += seconds
        if len(pauses) == 200:
            over.set()
            await asyncio.Event().wait()

    began: list[float] = []

    async def work() -> None:
        nonlocal now
        began.append(now)
        # The last ones take nearly as long as the interval, or longer.
        now += 12.0 if len(began) < 150 else 40.0

    monkeypatch.setattr(module, "monotonic", lambda: now)
    monkeypatch.setattr(module, "asyncio", StandIn(asyncio, "sleep", sleep))
    supervisor = Supervisor([Job("work", work, 30.0, 0.2, prompt=True)])
    supervisor.start()
    async with asyncio.timeout(5):
        await over.wait()
    await supervisor.stop()
    gaps = [late - early for early, late in pairwise([100.0, *began])][:150]
    assert 23.9 < min(gaps) < 25.5 and 28.5 < max(gaps) < 30.1, "only ever shortened, and not all alike"
    assert set(pauses[150:]) == {7.5}, "one that takes too long still leaves time to others"
