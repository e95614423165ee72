"""Does the store answer; what ``/readyz`` tells."""

from __future__ import annotations

import structlog

from handlers.context import Health
from relay.store.mongo import Mongo

log = structlog.get_logger(__name__)


class HealthCheck:
    """Asks MongoDB for its primary and notes the answer; changes are logged."""

    def __init__(self, mongo: Mongo, health: Health) -> None:
        self._mongo = mongo
        self._health = health

    async def run(self) -> None:
        """One look."""
        problems = self._health.problems
        if await self._mongo.ping():
            if problems.pop("mongodb", None):
                log.info("MongoDB answers again")
        elif "mongodb" not in problems:
            problems["mongodb"] = "no primary answers"
            log.warning("MongoDB does not answer; messages wait with their senders")
