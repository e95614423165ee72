"""Jobs run again and again, whatever one of them does, until they are stopped."""

from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

from relay.jobs.supervisor import Job, Supervisor


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
