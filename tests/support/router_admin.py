"""What a router does besides passing data on: the commands by which a cluster is administered, and those that concern all shards.

A router hands them to the config server or to shards under other names, and so does this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from pymongo import AsyncMongoClient
from pymongo import timeout as time_limit
from pymongo.errors import PyMongoError

Address = tuple[str, int]
Body = dict[str, Any]

MAJORITY: Final = {"w": "majority", "wtimeout": 60_000}
TOLD_ALL: Final[Mapping[str, str]] = {
    "collMod": "_shardsvrCollMod",
    "drop": "_shardsvrDropCollection",
    "dropDatabase": "_shardsvrDropDatabase",
}
TO_CONFIG: Final[Mapping[str, str]] = {
    "addShardToZone": "_configsvrAddShardToZone",
    "removeShardFromZone": "_configsvrRemoveShardFromZone",
    "balancerStatus": "_configsvrBalancerStatus",
    "balancerStart": "_configsvrBalancerStart",
    "balancerStop": "_configsvrBalancerStop",
    "configureCollectionBalancing": "_configsvrConfigureCollectionBalancing",
}
# After these routers find out by themselves that their knowledge is old, and ask anew. Shard servers that act as routers do not, in
# aggregations.
_MOVING: Final = frozenset({"shardCollection", "split", "moveRange"})
_NOT_AN_ADMINISTRATORS: Final = frozenset({"lsid", "writeConcern", "maxTimeMS", "txnNumber"})
_NO_SUCH_COLLECTION: Final = {"ok": 0.0, "errmsg": "the collection is not sharded", "code": 118}


def _client(address: Address) -> AsyncMongoClient[Body]:
    return AsyncMongoClient(*address, directConnection=True, serverSelectionTimeoutMS=10_000)


class RouterAdmin:
    """The administrative side of one forwarder."""

    def __init__(self, shard: Address, config: Address, primary_name: str) -> None:
        self._config = _client(config)
        self._shard = _client(shard)
        self._others: dict[str, AsyncMongoClient[Body]] = {}
        self._primary_name = primary_name
        self._created: set[str] = set()
        self._answers: Mapping[str, Callable[[Body], Awaitable[Body | None]]] = {
            **dict.fromkeys(TO_CONFIG, self._told_config),
            "enableSharding": self._enable_sharding,
            "shardCollection": self._shard_collection,
            "split": self._split,
            "moveRange": self._move_range,
            "updateZoneKeyRange": self._update_zone_key_range,
            "listShards": self._list_shards,
            "distinct": self._distinct,
            "createIndexes": self._create_indexes,
        }

    @classmethod
    def commands(cls) -> frozenset[bytes]:
        """The commands that ``answer`` may be asked, and ``rewritten``."""
        own = ("enableSharding", "shardCollection", "split", "moveRange", "updateZoneKeyRange", "listShards")
        others = ("distinct", "create", "createIndexes")
        return frozenset(name.encode() for name in (*own, *others, *TOLD_ALL, *TO_CONFIG))

    async def answer(self, body: Body) -> Body | None:
        """A router's answer to a command; None when the primary shard answers ``rewritten``. Raises PyMongoError."""
        command = next(iter(body))
        method = self._answers.get(command)
        if method is None:
            return None
        answer = await method(body)
        if answer is None:
            return None
        if command in _MOVING:
            await self._forget(body[command])
        return {"ok": 1.0, **{name: value for name, value in answer.items() if not name.startswith("$")}}

    async def rewritten(self, body: Body) -> Body:
        """What a router sends to the primary shard for a command that concerns all shards. Raises PyMongoError."""
        command, database = next(iter(body)), body["$db"]
        if database in ("admin", "config", "local"):
            return body
        if command not in TOLD_ALL:
            # As a router does: a database exists, with its primary shard, before anything in it.
            await self._create_database(database)
            return body
        self._created.discard(database)
        found = await self._config.config.databases.find_one({"_id": database})
        if found is None:
            return body
        fields = {name: value for name, value in body.items() if name not in (command, "writeConcern")}
        return {
            TOLD_ALL[command]: body[command],
            **fields,
            "databaseVersion": found["version"],
            "writeConcern": MAJORITY,
        }

    async def close(self) -> None:
        """Closes its connections."""
        for client in (self._config, self._shard, *self._others.values()):
            await client.close()

    async def _create_database(self, database: str) -> None:
        if database in self._created:
            return
        if await self._config.config.databases.find_one({"_id": database}) is not None:
            return
        await self._config.admin.command(
            "_configsvrCreateDatabase", database, primaryShardId=self._primary_name, writeConcern=MAJORITY
        )
        self._created.add(database)

    async def _told_config(self, body: Body) -> Body:
        command = next(iter(body))
        fields = {
            name: value
            for name, value in body.items()
            if name != command and not name.startswith("$") and name not in _NOT_AN_ADMINISTRATORS
        }
        if command.endswith("Zone"):
            fields["writeConcern"] = MAJORITY
        return await self._config.admin.command(TO_CONFIG[command], body[command], **fields)

    async def _enable_sharding(self, body: Body) -> Body:
        self._created.discard(body["enableSharding"])
        await self._create_database(body["enableSharding"])
        return {}

    async def _shard_collection(self, body: Body) -> Body:
        database, _, collection = body["shardCollection"].partition(".")
        self._created.discard(database)
        await self._create_database(database)
        found = await self._config.config.databases.find_one({"_id": database})
        assert found is not None
        primary = await self._client_of(found["primary"])
        await primary[database].command(
            "_shardsvrCreateCollection",
            collection,
            shardKey=body["key"],
            unique=body.get("unique", False),
            databaseVersion=found["version"],
            writeConcern=MAJORITY,
        )
        return {"collectionsharded": body["shardCollection"]}

    async def _split(self, body: Body) -> Body:
        about = await self._collection(body["split"])
        if about is None:
            return _NO_SUCH_COLLECTION
        at = body["middle"]
        chunk = await self._config.config.chunks.find_one(
            {"uuid": about["uuid"], "min": {"$lte": at}, "max": {"$gt": at}}
        )
        assert chunk is not None
        if chunk["min"] == at:
            text = f"new split key {at} is a boundary key of existing chunk"
            return {"ok": 0.0, "errmsg": text, "code": 72}
        owner = await self._client_of(chunk["shard"])
        await owner.admin.command(
            "splitChunk",
            body["split"],
            **{"from": chunk["shard"], "keyPattern": about["key"], "splitKeys": [at]},
            epoch=about["lastmodEpoch"],
            timestamp=about["timestamp"],
            min=chunk["min"],
            max=chunk["max"],
        )
        return {}

    async def _move_range(self, body: Body) -> Body:
        about = await self._collection(body["moveRange"])
        if about is None:
            return _NO_SUCH_COLLECTION
        given = {name: body[name] for name in ("min", "max", "forceJumbo") if name in body}
        if "forceJumbo" in given:
            given["forceJumbo"] = 1 if given["forceJumbo"] else 0
        return await self._config.admin.command(
            "_configsvrMoveRange",
            body["moveRange"],
            toShard=body["toShard"],
            epoch=about["lastmodEpoch"],
            collectionTimestamp=about["timestamp"],
            writeConcern=MAJORITY,
            **given,
        )

    async def _update_zone_key_range(self, body: Body) -> Body:
        fields = {name: body[name] for name in ("min", "max", "zone")}
        await self._config.admin.command(
            "_configsvrUpdateZoneKeyRange", body["updateZoneKeyRange"], writeConcern=MAJORITY, **fields
        )
        return {}

    async def _list_shards(self, _: Body) -> Body:
        return {"shards": await self._config.config.shards.find({}).to_list()}

    async def _distinct(self, body: Body) -> Body:
        field = f"${body['key']}"
        stages = [{"$match": body.get("query", {})}, {"$unwind": field}, {"$group": {"_id": field}}]
        whole = {"$group": {"_id": None, "values": {"$push": "$_id"}}}
        found = await self._shard[body["$db"]].command(
            "clusterAggregate", body["distinct"], pipeline=[*stages, whole], cursor={}
        )
        rows = found["cursor"]["firstBatch"]
        return {"values": rows[0]["values"] if rows else []}

    async def _create_indexes(self, body: Body) -> Body | None:
        """Every shard that has ranges of a sharded collection makes the indexes."""
        database, collection = body["$db"], body["createIndexes"]
        about = await self._collection(f"{database}.{collection}")
        if about is None:
            return None
        owners = await self._config.config.chunks.distinct("shard", {"uuid": about["uuid"]})
        clients = [await self._client_of(owner) for owner in owners]
        answers = await asyncio.gather(
            *(
                client[database].command(
                    "createIndexes", collection, indexes=body["indexes"], writeConcern=MAJORITY
                )
                for client in clients
            )
        )
        return {"raw": dict(zip(owners, answers, strict=True))}

    async def _forget(self, namespace: str) -> None:
        """No shard goes on what it knew of a collection's ranges. One that does not answer is left alone."""
        for shard in await self._config.config.shards.distinct("_id"):
            client = await self._client_of(shard)
            with suppress(PyMongoError), time_limit(2):
                await client.admin.command("flushRouterConfig", namespace)

    async def _collection(self, namespace: str) -> Body | None:
        return await self._config.config.collections.find_one({"_id": namespace})

    async def _client_of(self, shard: str) -> AsyncMongoClient[Body]:
        if shard not in self._others:
            found = await self._config.config.shards.find_one({"_id": shard})
            assert found is not None
            host, _, port = found["host"].partition("/")[2].rpartition(":")
            self._others[shard] = _client((host, int(port)))
        return self._others[shard]
