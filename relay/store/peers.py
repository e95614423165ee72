"""Which other relays run on this database. Every node says now and then that it lives, by MongoDB's clock."""

from __future__ import annotations

from typing import Any, Final

from models.housekeeping import Node
from relay.wire.ids import new_id

BEAT_SECONDS: Final = 2.0
# A node that is stopped for longer has lost its leases: it resolves recipients anew for what it had not yet committed.
_ALIVE: Final[dict[str, Any]] = {"$gt": ["$at", {"$subtract": ["$$NOW", 10_000]}]}


class Peers:
    """This node's entry (``id``) among the others'. Call ``beat`` before it listens, and every two seconds."""

    def __init__(self) -> None:
        self.id = new_id()

    async def beat(self) -> None:
        """Says that this node lives."""
        await Node.get_motor_collection().update_one(
            {"_id": self.id}, {"$currentDate": {"at": True}}, upsert=True
        )

    async def leave(self) -> None:
        """This node stops: nobody need wait for it."""
        await Node.get_motor_collection().delete_one({"_id": self.id})

    async def others(self) -> list[str]:
        """The other nodes that live."""
        query = {"_id": {"$ne": self.id}, "$expr": _ALIVE}
        return [row["_id"] async for row in Node.get_motor_collection().find(query, {"_id": 1})]

    async def lives(self, node: str) -> bool:
        """Whether this node lives."""
        query = {"_id": node, "$expr": _ALIVE}
        return await Node.get_motor_collection().find_one(query, {"_id": 1}) is not None
