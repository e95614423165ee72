"""Which shards an operation touches: every shard's profiler, asked for the commands that routers send to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from models.messages import FATES, MESSAGES
from relay.store.shards import PROBE
from tests.cluster import Cluster

_PROFILED: Final = "system.profile"
_MEGABYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Operation:
    """One command as one shard did it; ``conditions`` are the fields of its filter, or of the first stage."""

    shard: str
    name: str
    collection: str
    conditions: tuple[str, ...]


@dataclass(slots=True)
class Touched:
    """What happened on the shards."""

    operations: list[Operation] = field(default_factory=list)

    def shards(self, *collections: str, names: tuple[str, ...] = ()) -> set[str]:
        """The shards that were asked for anything of these collections (without any: ``messages`` and ``fates``), or for commands
        of these names only."""
        wanted = collections or (MESSAGES, FATES)
        return {
            one.shard
            for one in self.operations
            if one.collection in wanted and (not names or one.name in names)
        }


@asynccontextmanager
async def touching(cluster: Cluster, database: str) -> AsyncIterator[Touched]:
    """While this lasts every shard notes what it is asked; what that was is there when it ends."""
    found = Touched()
    for shard in cluster.shards:
        own = shard.client[database]
        await own.command("profile", 0)
        await own.drop_collection(_PROFILED)
        await own.create_collection(_PROFILED, capped=True, size=_MEGABYTES * 1_000_000)
        await own.command("profile", 2)
    try:
        yield found
    finally:
        for shard in cluster.shards:
            await shard.client[database].command("profile", 0)
    for shard in cluster.shards:
        own = shard.client[database]
        async for row in own[_PROFILED].find({}).sort("$natural"):
            operation = _operation(shard.name, row)
            if operation is not None:
                found.operations.append(operation)
        await own.drop_collection(_PROFILED)


def _operation(shard: str, row: dict[str, Any]) -> Operation | None:
    """What a router asked: its commands name the version of the routing table that they were planned with. Not whether it
    answers, which nodes ask every shard."""
    command = row.get("command", {})
    if command.get("comment") == PROBE:
        return None
    collection = row["ns"].partition(".")[2]
    if row["op"] in ("update", "remove"):
        # One for each statement, besides the command that held them, which has no entry.
        return Operation(shard, row["op"], collection, tuple(command.get("q", ())))
    if row["op"] == "getmore":
        return Operation(shard, "getMore", collection, ())
    if "shardVersion" not in command and "databaseVersion" not in command:
        return None
    name = next(iter(command))
    conditions = command.get("filter", {})
    if name == "aggregate" and command["pipeline"]:
        conditions = next(iter(command["pipeline"][0].values()), {})
    return Operation(shard, name, collection, tuple(conditions) if isinstance(conditions, dict) else ())
