"""Named background jobs: started together, run at an interval, kept alive, ended together."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final

import structlog

from relay.store.mongo import brief
from relay.tasks import ended

# Of the interval: a job that takes all of its time leaves so much to others.
_LEAST_PAUSE: Final = 0.25

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """Something done ``seconds`` after the last time. ``jitter`` is the part of the interval that varies, so that nodes do not act in
    step. A ``prompt`` job's runs begin ``seconds`` apart at most, jitter included, unless one takes most of that itself."""

    name: str
    run: Callable[[], Awaitable[None]]
    seconds: float
    jitter: float = 0.0
    prompt: bool = False


class Supervisor:
    """Owns the jobs' tasks. A run that fails is logged and the job goes on at its next interval."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Starts every job; the first run comes after one interval."""
        self._tasks = [asyncio.create_task(_repeat(job), name=f"job {job.name}") for job in self._jobs]

    async def stop(self) -> None:
        """Ends every job."""
        await ended(self._tasks)
        self._tasks = []


async def _repeat(job: Job) -> None:
    began = monotonic()
    while True:
        await asyncio.sleep(_pause(job, monotonic() - began))
        began = monotonic()
        try:
            await job.run()
        except Exception as error:  # noqa: BLE001 - one bad round must not end the job
            log.warning("job failed; it runs again", job=job.name, error=brief(error))


def _pause(job: Job, took: float) -> float:
    """How long a job rests after a run that took so long."""
    if not job.prompt:
        return job.seconds * (1 + random.uniform(-job.jitter, job.jitter))
    return job.seconds * max(1 - random.uniform(0, job.jitter) - took / job.seconds, _LEAST_PAUSE)
