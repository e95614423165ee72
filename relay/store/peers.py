"""Which other relays run on this database. Every node says now and then that it lives, by MongoDB's clock.

Who changes members waits for the leases of those who live. A node whose beats do not come through may be taken for dead, and is
waited for no more: it commits nothing until one has, and believes nothing that it resolved before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from models.housekeeping import Node
from relay.store.audience import LEASE_SECONDS
from relay.store.mongo import time_limit
from relay.wire.clock import lease_time
from relay.wire.ids import new_id

BEAT_SECONDS: Final = 2.0
HELD_SECONDS: Final = 10.0
"""A node may go on for so long after the last beat that came through began."""
_LIMIT_SECONDS: Final = 2.0
_ALIVE_MS: Final = 10_000
# The two clocks need not run at the same rate.
_MARGIN_SECONDS: Final = 3.0


class Peers:
    """This node's entry (``id``) among the others'. Call ``beat`` before it listens, and every two seconds. ``commit_seconds`` is the
    time limit of a commit; ``lapsed`` is called when others may not have waited for this node's leases."""

    def __init__(self, *, commit_seconds: float, lapsed: Callable[[], None]) -> None:
        self.id = new_id()
        self._lapsed = lapsed
        self._beaten: float | None = None
        self._leased_ms = int((HELD_SECONDS + LEASE_SECONDS + commit_seconds + _MARGIN_SECONDS) * 1000)

    @property
    def held(self) -> bool:
        """Whether others wait for this node's leases."""
        return self._beaten is not None and lease_time() - self._beaten < HELD_SECONDS

    async def hold(self) -> None:
        """Returns when others wait for this node's leases. Raises PyMongoError."""
        if not self.held:
            await self.beat()

    async def beat(self) -> None:
        """Says that this node lives, within two seconds. Raises PyMongoError."""
        began = lease_time()
        with time_limit(_LIMIT_SECONDS):
            await Node.get_motor_collection().update_one(
                {"_id": self.id}, {"$currentDate": {"at": True}}, upsert=True
            )
        lapsed = not self.held
        self._beaten = max(began, self._beaten or began)
        if lapsed:
            self._lapsed()

    async def leave(self) -> None:
        """This node stops: nobody need wait for it."""
        self._beaten = None
        await Node.get_motor_collection().delete_one({"_id": self.id})

    async def others(self) -> list[str]:
        """The other nodes that live."""
        return await self._seen_within(_ALIVE_MS)

    async def leasing(self) -> list[str]:
        """The other nodes that may still commit by what they resolved before now."""
        return await self._seen_within(self._leased_ms)

    async def _seen_within(self, milliseconds: int) -> list[str]:
        query = {"_id": {"$ne": self.id}, "$expr": _seen_within(milliseconds)}
        return [row["_id"] async for row in Node.get_motor_collection().find(query, {"_id": 1})]

    async def lives(self, node: str) -> bool:
        """Whether this node lives."""
        query = {"_id": node, "$expr": _seen_within(_ALIVE_MS)}
        return await Node.get_motor_collection().find_one(query, {"_id": 1}) is not None


def _seen_within(milliseconds: int) -> dict[str, Any]:
    return {"$gt": ["$at", {"$subtract": ["$$NOW", milliseconds]}]}
