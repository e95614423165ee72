"""`scripts/shard` on a real sharded cluster, as an operator runs it; and where there is none."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import AsyncMongoClient
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.write_concern import WriteConcern
from typer.testing import CliRunner

from models.messages import CREATED_TTL_INDEX
from relay.store.embedded import EmbeddedMongo
from relay.store.embedded_files import Layout, find_mongod
from scripts.tools.shard.__main__ import app
from tests.cluster import MAJORITY, PARAMETERS, Cluster
from tests.support.databases import Databases
from tests.support.mongo_server import MongoServer
from tests.support.node import NodeFactory
from tests.support.shard_tool import ShardTool
from tests.support.waiting import until

Database = AsyncDatabase[dict[str, Any]]
slow = [pytest.mark.faults, pytest.mark.timeout(180)]
SETUP = ("setup", "--apply")
HOT = "12345678-1234-4123-8123-123456789abc"


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two shards; no database of it is sharded but the cluster's own ``relay``."""
    parameters = {"enableTestCommands": "1"}
    async with Cluster(tmp_path_factory.mktemp("cluster"), server_parameters=parameters) as found:
        yield found


@pytest.fixture
async def db(cluster: Cluster) -> AsyncIterator[Database]:
    """A database that does not exist yet, through the routers."""
    async with AsyncMongoClient[dict[str, Any]](cluster.uri) as client:
        found = client.get_database(
            f"t{uuid.uuid4().hex[:12]}", write_concern=WriteConcern(w="majority", j=True)
        )
        yield found
        await client.drop_database(found.name)
        await client.drop_database(f"{found.name}_media")


@pytest.fixture
def tool(cluster: Cluster, db: Database) -> ShardTool:
    return ShardTool(cluster.uri, db.name)


def message(conversation: str, number: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "_id": f"{conversation} m{number}",
        "conversationId": conversation,
        "awaiting": ["ann/phone"],
        "seq": number,
        **fields,
    }


def messages(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [message(str(uuid.uuid4()), number, **fields) for number in range(count)]


async def counts(cluster: Cluster, db: Database, collection: str = "messages") -> list[int]:
    """How many documents each shard owns."""
    found = await (await db[collection].aggregate([{"$collStats": {"storageStats": {}}}])).to_list()
    held = {
        row["shard"]: row["storageStats"]["count"] - row["storageStats"]["numOrphanDocs"] for row in found
    }
    return [held.get(shard.name, 0) for shard in cluster.shards]


async def here(uri: str, database: str, *arguments: str) -> tuple[int, str, str]:
    """Runs a command in this process: exit code, standard output, standard error."""
    settings = {"RELAY_MONGO_URI": uri, "RELAY_MONGO_DATABASE": database}
    found = await asyncio.to_thread(CliRunner().invoke, app, list(arguments), env=settings)
    return found.exit_code, found.stdout, found.stderr


async def known(cluster: Cluster) -> dict[str, list[dict[str, Any]]]:
    """All that the config server knows of sharding."""
    config = cluster.config.client.config
    names = ("shards", "databases", "collections", "chunks", "tags")
    return {name: await config[name].find({}).sort("_id").to_list() for name in names}


async def test_a_replica_set_is_refused_with_one_line(mongod: EmbeddedMongo) -> None:
    if not isinstance(mongod, EmbeddedMongo):
        pytest.skip("this run has no replica set")
    database = f"t{uuid.uuid4().hex[:12]}"
    for command in (("setup",), SETUP, ("status",), ("presplit", "--apply"), ("move", "s1", "--max", "8")):
        code, out, said = await here(mongod.uri, database, *command)
        assert (code, out) == (1, "")
        assert said.startswith("shard: RELAY_MONGO_URI leads to the replica set "), said
        assert "mongos" in said and "docs/operations.md" in said and said.count("\n") == 1
    async with AsyncMongoClient[dict[str, Any]](mongod.uri) as client:
        assert database not in await client.list_database_names()


async def test_routers_that_do_not_answer_are_told_in_one_line() -> None:
    uri = "mongodb://somebody:secret@127.0.0.1:1/"
    assert await here(uri, "relay", "status") == (
        1,
        "",
        "shard: the routers of RELAY_MONGO_URI do not answer\n",
    )


@pytest.mark.parametrize(
    "wrong",
    [("--max", "XYZ"), ("--min", "8", "--max", "4"), (), ("--conversation", "8"), ("--only", "--min", "8")],
    ids=" ".join,
)
async def test_a_range_that_is_none_is_a_wrong_usage(wrong: tuple[str, ...]) -> None:
    code, _, said = await here("mongodb://127.0.0.1:1/", "relay", "move", "s1", *wrong)
    assert code == 2
    assert "Invalid value" in said


class TestOnACluster:
    pytestmark = slow

    async def test_a_dry_run_says_what_is_to_be_done_and_changes_nothing(
        self, cluster: Cluster, tool: ShardTool
    ) -> None:
        before = await known(cluster)
        said = await tool.done("setup")
        assert f"shard {tool.database}.messages by conversationId" in said
        assert f"shard {tool.database}.fates by lane" in said
        assert said.endswith("nothing was changed: the same with --apply does it\n")
        assert await tool.done("setup", "--dry-run") == said
        assert await known(cluster) == before
        code, out, _ = await tool("status")
        assert code == 1
        assert "setup is not complete" in out

    async def test_setup_spreads_messages_and_places_lanes_and_a_second_run_changes_nothing(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        await tool.done(*SETUP)
        made = await known(cluster)
        assert await tool.done(*SETUP) == f"{db.name} is set up on 2 shards: nothing to do\n"
        assert await known(cluster) == made

        await db.messages.insert_many(messages(200), ordered=False)
        held = await counts(cluster, db)
        assert sum(held) == 200
        assert min(held) > 60
        for shard in cluster.shards:
            indexes = await shard.client[db.name].messages.index_information()
            assert {"awaiting_seq", "conversation_createdAt", CREATED_TTL_INDEX} <= set(indexes)
        for shard in cluster.shards:
            await db.fates.insert_many(
                [{"lane": shard.name, "entries": []}, {"lane": shard.name, "entries": []}]
            )
            assert await shard.client[db.name].fates.count_documents({"lane": shard.name}) == 2

        code, out, _ = await tool("status")
        assert code == 0, out
        assert "everything is as it should be" in out
        found = (await tool.status())["collections"]["messages"]
        assert [one["documents"] for one in found["shards"].values()] == held
        assert [one["share"] for one in found["shards"].values()] == [0.5, 0.5]

    async def test_a_relay_runs_on_what_setup_made(
        self, cluster: Cluster, db: Database, tool: ShardTool, tmp_path: Path
    ) -> None:
        await tool.done(*SETUP)
        made = await known(cluster)
        nodes = NodeFactory(cluster.uri, tmp_path, Databases())
        try:
            node = await nodes.start(mongo_database=db.name)
            group = await node.group("ann", ["bob"])
            ann, bob = await node.connect("ann"), await node.connect("bob")
            sent = await ann.sent(group, "hello")
            await bob.expect("msg", id=sent["id"])
            await bob.ack(group, sent["id"])
            assert await db.messages.count_documents({}) == 0
            assert await db.fates.count_documents({"entries.id": f"{group} {sent['id']}"}) == 1
        finally:
            await nodes.close()
        after = await known(cluster)
        assert (after["chunks"], after["tags"]) == (made["chunks"], made["tags"])

    async def test_what_test_clusters_make_by_themselves_is_as_the_tool_wants_it(
        self, cluster: Cluster
    ) -> None:
        tool = ShardTool(cluster.uri, "relay")
        assert "nothing to do" in await tool.done(*SETUP)
        assert (await tool("status"))[0] == 0

    async def test_a_setup_that_was_cut_short_is_finished_by_the_next_run(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        await db.client.admin.command("enableSharding", db.name)
        await db.client.admin.command("shardCollection", f"{db.name}.messages", key={"conversationId": 1})
        await db.client.admin.command("addShardToZone", "s2", zone="lane-s2")
        assert len((await tool.status())["collections"]["messages"]["ranges"]) == 1
        await tool.done(*SETUP)
        found = await tool.status()
        assert not any(one["wrong"] for one in found["findings"])
        assert [one["shard"] for one in found["collections"]["messages"]["ranges"]] == ["s1", "s2"]
        assert {one["zone"] for one in found["collections"]["fates"]["zones"]} == {"lane-s1", "lane-s2"}

    async def test_collections_with_documents_are_sharded_where_they_are_and_moved_only_when_told(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        wanted = messages(120)
        await db.create_collection("messages")
        await db.messages.insert_many(wanted)
        await db.fates.insert_many([{"lane": "0"}, {"lane": "s2"}])
        await tool.done(*SETUP)
        assert await counts(cluster, db) == [120, 0]
        # The lane of a shard lies there, whatever was in it.
        assert await counts(cluster, db, "fates") == [1, 1]
        (wrong,) = [one for one in (await tool.status())["findings"] if one["wrong"]]
        assert wrong["what"] == "few conversations lie on s2 (0.0%)"

        high = sum(one["conversationId"] >= "8" for one in wanted)
        said = await tool.refused("presplit", "--apply")
        assert f"messages holds 120 documents; this would move {high} documents" in said
        assert await counts(cluster, db) == [120, 0]
        await tool.done("presplit", "--populated", "--apply")
        assert await counts(cluster, db) == [120 - high, high]
        assert await db.messages.find({}).sort("seq").to_list() == wanted

    async def test_presplit_makes_even_ranges_and_a_second_run_changes_nothing(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        assert "scripts/shard setup" in await tool.refused("presplit", "--apply")
        await tool.done(*SETUP)
        before = await known(cluster)
        assert "split messages at 2" in await tool.done("presplit", "--ranges", "4")
        assert await known(cluster) == before
        await tool.done("presplit", "--ranges", "4", "--apply")
        found = (await tool.status())["collections"]["messages"]["ranges"]
        assert [one["min"] for one in found] == [None, "2", "4", "6", "8", "a", "c", "e"]
        assert [one["shard"] for one in found] == ["s1"] * 4 + ["s2"] * 4
        made = await known(cluster)
        assert "nothing to do" in await tool.done("presplit", "--ranges", "4", "--apply")
        assert await known(cluster) == made

    async def test_a_shard_that_is_added_gets_its_lane_from_the_next_run_and_one_that_leaves_lets_it_go(
        self, tmp_path: Path
    ) -> None:
        async with Cluster(tmp_path, 1) as small, AsyncMongoClient[dict[str, Any]](small.uri) as client:
            tool, db = ShardTool(small.uri, "other"), client["other"]
            await tool.done(*SETUP)
            await db.messages.insert_many(messages(40))
            binary = find_mongod(Layout(tmp_path))
            added = MongoServer(
                "s2", tmp_path / "s2", binary, role="shardsvr", parameters=PARAMETERS, cache_gb=0.25
            )
            try:
                await added.start()
                await small.config.client.admin.command(
                    "_configsvrAddShard", f"s2/{added.address}", name="s2", writeConcern=MAJORITY
                )
                wrong = [one["what"] for one in (await tool.status())["findings"] if one["wrong"]]
                assert any("lane s2" in one for one in wrong)
                said = await tool.done(*SETUP)
                assert "move lane s2 of fates" in said and "lane s1" not in said and "messages" not in said
                await db.fates.insert_many([{"lane": "s1"}, {"lane": "s2"}])
                assert await added.client["other"].fates.count_documents({}) == 1
                await tool.done("presplit", "--populated", "--apply")
                assert await db.messages.count_documents({}) == 40
                assert await added.client["other"].messages.count_documents({}) > 0
                assert (await tool("status"))[0] == 0

                await tool.done("setup", "--leaving", "s2", "--apply")
                await small.config.client.admin.command("_configsvrRemoveShard", "s2", writeConcern=MAJORITY)
                assert "nothing to do" in await tool.done(*SETUP)
                assert await db.messages.count_documents({}) == 40
            finally:
                await added.close()

    async def test_a_range_moves_while_messages_are_stored_and_deleted_and_each_is_there_once(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        await tool.done(*SETUP)
        kept: dict[str, dict[str, Any]] = {}
        over = asyncio.Event()

        async def load() -> None:
            number = 0
            while not over.is_set():
                number += 1
                stays, goes = message(str(uuid.uuid4()), number), message(str(uuid.uuid4()), number)
                await db.messages.insert_one(stays)
                await db.messages.insert_one(goes)
                kept[stays["_id"]] = stays
                place = {"_id": goes["_id"], "conversationId": goes["conversationId"]}
                assert (await db.messages.delete_one(place)).deleted_count == 1

        loading = asyncio.create_task(load())
        said = await tool.done("move", "s2", "--min", "2", "--max", "6", "--apply")
        assert "before  from 2 below 6: on s1" in said
        assert "after   from 2 below 6: on s2" in said
        await tool.done("move", "s1", "--min", "c", "--apply")
        await tool.done("move", "s2", "--max", "1", "--apply")
        over.set()
        await loading
        found = await db.messages.find({}).to_list()
        assert len(kept) > 30
        assert sorted(one["_id"] for one in found) == sorted(kept)

        async def cleared() -> bool:
            held = [await shard.client[db.name].messages.count_documents({}) for shard in cluster.shards]
            return sum(held) == len(kept)

        await until(cleared, 30, "the donors have removed what they gave")

    async def test_a_conversation_moves_with_its_range_or_alone(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        await tool.done(*SETUP)
        await db.messages.insert_many([message(HOT, number) for number in range(5)])
        before = await known(cluster)
        said = await tool.done("move", "s2", "--conversation", HOT, "--only")
        assert "5 documents" in said and "nothing was changed" in said
        assert await known(cluster) == before
        await tool.done("move", "s2", "--conversation", HOT, "--only", "--apply")
        assert await counts(cluster, db) == [0, 5]
        found = (await tool.status())["collections"]["messages"]["ranges"]
        assert [one["shard"] for one in found] == ["s1", "s2", "s1", "s2"]
        await tool.done("move", "s1", "--conversation", HOT, "--apply")
        assert await counts(cluster, db) == [5, 0]

    async def test_a_move_that_cannot_be_made_says_why(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        assert "scripts/shard setup" in await tool.refused("move", "s2", "--max", "4", "--apply")
        await tool.done(*SETUP)
        before = await known(cluster)
        said = await tool.refused("move", "s9", "--max", "4", "--apply")
        assert said == "shard: there is no shard 's9'; there are s1, s2\n"
        assert "already on s1" in await tool.done("move", "s1", "--max", "4", "--apply")
        assert await known(cluster) == before
        await cluster.set_zone(db.name, "messages", "conversationId", "1", "2", "s1")
        zoned = await known(cluster)
        said = await tool.refused("move", "s2", "--max", "4", "--apply")
        assert "messages from 1 below 2 belongs to zone s1, and s2 is not in it" in said
        assert await known(cluster) == zoned
        await cluster.set_zone(db.name, "messages", "conversationId", "1", "2", None)
        await tool.done("move", "s2", "--max", "4", "--apply")

    async def test_a_move_waits_for_another_one_as_long_as_told(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        await tool.done(*SETUP)
        donor = cluster.shards[0].client.admin
        await donor.command("configureFailPoint", "moveChunkHangAtStep3", mode="alwaysOn")
        try:
            first = asyncio.create_task(tool("move", "s2", "--max", "1", "--apply"))

            async def moving() -> bool:
                found = await donor.command({"currentOp": 1, "desc": {"$regex": "moveChunk|MoveChunk"}})
                return bool(found["inprog"])

            await until(moving, 30, "the first move has begun")
            said = await tool.refused("move", "s2", "--min", "2", "--max", "3", "--apply", "--wait", "1")
            assert "waiting for it" in said and "another move has been under way for 1 s" in said
        finally:
            await donor.command("configureFailPoint", "moveChunkHangAtStep3", mode="off")
        assert (await first)[0] == 0
        await tool.done("move", "s2", "--min", "2", "--max", "3", "--apply")

    async def test_more_than_mongodb_moves_at_once_is_moved_in_parts(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        await tool.done(*SETUP)
        await db.client.admin.command("configureCollectionBalancing", f"{db.name}.messages", chunkSize=1)
        wanted = messages(150, body="x" * 20_000) + [
            message(HOT, 200 + number, body="x" * 20_000) for number in range(300)
        ]
        await db.messages.insert_many(wanted, ordered=False)
        code, _, said = await tool("move", "s2", "--apply", "--max", "8")
        assert code == 1
        assert f"conversationId {HOT} has more data than MongoDB moves at once" in said
        assert "--force-jumbo" in said
        # What comes before it has moved.
        pieces = (await tool.status())["collections"]["messages"]["ranges"]
        assert {one["shard"] for one in pieces if (one["max"] or "g") <= HOT} == {"s2"}
        assert next(one["shard"] for one in pieces if one["min"] == HOT) == "s1"
        await tool.done("move", "s2", "--apply", "--max", "8", "--force-jumbo")
        assert await counts(cluster, db) == [0, 450]
        assert await db.messages.find({}).sort("seq").to_list() == wanted

    async def test_status_finds_a_missing_index_and_setup_makes_it(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        await tool.done(*SETUP)
        await db.messages.insert_many(messages(20))
        await cluster.shards[1].client[db.name].messages.drop_index("awaiting_seq")
        (wrong,) = [one["what"] for one in (await tool.status())["findings"] if one["wrong"]]
        assert wrong == "setup is not complete: make index of messages: awaiting_seq"
        await tool.done(*SETUP)
        assert "awaiting_seq" in await cluster.shards[1].client[db.name].messages.index_information()
        assert (await tool("status"))[0] == 0

    async def test_media_chunks_are_sharded_by_file_once_there_are_any(
        self, db: Database, tool: ShardTool
    ) -> None:
        await tool.done(*SETUP)
        assert set((await tool.status())["collections"]) == {"messages", "fates"}
        chunks = await db.client[f"{db.name}_media"].create_collection("fs.chunks")
        await chunks.insert_many([{"files_id": str(uuid.uuid4()), "n": 0, "data": b"x"} for _ in range(5)])
        await tool.done(*SETUP)
        found = (await tool.status())["collections"]["fs.chunks"]
        assert found["key"] == {"files_id": 1}
        assert await chunks.count_documents({}) == 5
        assert "nothing to do" in await tool.done(*SETUP)

    async def test_another_shard_key_is_told_and_left_alone(self, db: Database, tool: ShardTool) -> None:
        await db.client.admin.command("shardCollection", f"{db.name}.messages", key={"seq": 1})
        code, out, said = await tool(*SETUP)
        assert code == 1
        assert "is sharded by seq, not by conversationId alone" in said
        assert f"done  shard {db.name}.fates by lane" in out
        assert "messages is not sharded as the relay needs it" in await tool.refused(
            "move", "s2", "--max", "4"
        )

    async def test_a_dead_shard_is_told_and_nothing_is_changed(
        self, cluster: Cluster, db: Database, tool: ShardTool
    ) -> None:
        await tool.done(*SETUP)
        before = await known(cluster)
        await cluster.shards[1].kill()
        try:
            living = ShardTool(cluster.forwarders[0].uri, db.name)
            code, out, _ = await living("status")
            assert code == 1
            assert "not every shard answers" in out
            said = await living.refused("presplit", "--ranges", "2", "--apply")
            assert "nothing is changed until all do" in said
        finally:
            await cluster.shards[1].start()
        assert await known(cluster) == before

        async def well() -> bool:
            return (await tool("status"))[0] == 0

        await until(well, 60, "the shard is found again")
