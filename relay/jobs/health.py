"""Do the store and Redis answer, and what time is it; what ``/readyz`` and the metrics tell."""

from __future__ import annotations

import asyncio

import structlog

from handlers.context import Health
from relay.metrics import Metrics
from relay.routing.bus import Bus
from relay.security.rates import Rates
from relay.store.mongo import Mongo
from relay.store.shards import Shards
from relay.store.timekeeping import Timekeeper

log = structlog.get_logger(__name__)


class HealthCheck:
    """Asks MongoDB for its primary and its time, and Redis to count, and notes the answers; changes are logged."""

    def __init__(
        self,
        mongo: Mongo,
        shards: Shards,
        rates: Rates,
        bus: Bus,
        timekeeper: Timekeeper,
        health: Health,
        metrics: Metrics,
    ) -> None:
        self._bus = bus
        self._timekeeper = timekeeper
        self._mongo = mongo
        self._shards = shards
        self._rates = rates
        self._health = health
        self._metrics = metrics

    async def run(self) -> None:
        """One look."""
        mongodb, redis = await asyncio.gather(
            self._mongo.ping(told=self._timekeeper.take), self._rates.reaches_redis()
        )
        if self._note("mongodb", None if mongodb else "no primary answers"):
            if mongodb:
                log.info("MongoDB answers again")
            else:
                log.warning("MongoDB does not answer; messages wait with their senders")
        self._note("shards", self._shards.problem)
        self._note("redis", None if redis else "it does not count; rate limits hold for each node by itself")
        self._note("bus", self._bus.problem)
        self._note("clock", self._timekeeper.problem)
        self._metrics.clock_offset.set(self._timekeeper.offset)

    def _note(self, part: str, problem: str | None) -> bool:
        """Whether this changes what is known."""
        problems = self._health.problems
        before = problems.pop(part, None)
        if problem is not None:
            problems[part] = problem
        self._metrics.problems.labels(part).set(problem is not None)
        return before != problem
