"""The relay on a sharded cluster: which shards its operations touch, and what it does where several are concerned."""

from __future__ import annotations

import asyncio
import time
import uuid

import pytest

from relay.store.mongo import Mongo
from relay.store.timekeeping import READINGS
from relay.wire.clock import steady_ns
from tests.cluster import Cluster
from tests.support.node import Node, NodeFactory
from tests.support.sharded import SHARDS, cluster, devices, nodes, sharded, talk
from tests.support.touched import touching
from tests.support.waiting import until

__all__ = ["cluster", "nodes", "sharded"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    """A node whose jobs, which ask all shards, do not come in between."""
    return await nodes.start(sweep_seconds=3600, expiry_seconds=3600, inline_recipients=4)


@pytest.mark.parametrize("shard", SHARDS)
async def test_sending_touches_the_conversations_shard_alone(
    cluster: Cluster, node: Node, shard: str
) -> None:
    conv = await talk(node, shard)
    ann, bob = await devices(node)
    async with touching(cluster, node.db.name) as touched:
        for _ in range(3):
            await ann.sent(conv)
            await bob.expect("msg")
    assert touched.shards() == {shard}


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("others", [1, 3])
async def test_acknowledging_touches_the_conversations_shard_alone(
    cluster: Cluster, node: Node, shard: str, others: int
) -> None:
    conv = await talk(node, shard, others)
    ann, bob = await devices(node)
    ids = [(await ann.sent(conv))["id"] for _ in range(3)]
    for _ in ids:
        await bob.expect("msg")
    async with touching(cluster, node.db.name) as touched:
        await bob.ack(conv, *ids)
    assert touched.shards() == {shard}


@pytest.mark.parametrize("shard", SHARDS)
async def test_a_message_in_parts_touches_its_conversations_shard_alone(
    cluster: Cluster, node: Node, shard: str
) -> None:
    conv = await talk(node, shard, 11)
    ann, bob = await devices(node)
    async with touching(cluster, node.db.name) as touched:
        stored = await ann.sent(conv)
        await bob.expect("msg")
        await bob.ack(conv, stored["id"])
    assert await node.db.messages.count_documents({"id": stored["id"]}) > 2
    assert touched.shards() == {shard}


@pytest.mark.parametrize("shard", SHARDS)
async def test_status_resends_and_withdrawals_touch_the_conversations_shard_alone(
    cluster: Cluster, node: Node, shard: str
) -> None:
    conv = await talk(node, shard, 3)
    ann, bob = await devices(node)
    stored = await ann.sent(conv, "first")
    await bob.expect("msg")
    async with touching(cluster, node.db.name) as touched:
        await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]], "ref": "s"})
        await ann.expect("status", ref="s")
        again = await ann.sent(conv, "first", id=stored["id"], again=True)
        assert again["seq"] == stored["seq"]
        await ann.put(
            {"t": "send", "id": str(uuid.uuid4()), "conv": conv, "kind": "withdrawn", "replyTo": stored["id"]}
        )
        await ann.expect("stored")
        await until(lambda: _gone(node, conv, stored["id"]), 5, "the withdrawn message is gone")
    assert touched.shards() == {shard}


async def _gone(node: Node, conv: str, message: str) -> bool:
    return await node.db.messages.find_one({"conversationId": conv, "id": message}) is None


@pytest.mark.parametrize("shard", SHARDS)
async def test_a_page_of_one_conversation_touches_its_shard_alone(
    cluster: Cluster, node: Node, shard: str
) -> None:
    conv = await talk(node, shard)
    ann = await node.connect("ann")
    sent = await ann.sent(conv)
    async with touching(cluster, node.db.name) as touched:
        status, page = await node.request("GET", f"/v1/conversations/{conv}/messages", "bob", "phone")
    assert (status, [one["id"] for one in page["items"]]) == (200, [sent["id"]])
    assert touched.shards() == {shard}


async def test_a_backlog_on_several_shards_is_drained_in_order(cluster: Cluster, node: Node) -> None:
    talks = [await talk(node, shard) for shard in SHARDS]
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    sent = [(await ann.sent(talks[number % 2]))["id"] for number in range(20)]
    async with touching(cluster, node.db.name) as touched:
        bob = await node.connect("bob")
        got = [await bob.expect("msg") for _ in sent]
    assert [one["id"] for one in got] == sent
    assert touched.shards("messages") == set(SHARDS)
    for one in got:
        await bob.ack(one["conv"], one["id"], durable=False)
    await bob.expect("drained")
    assert await node.db.messages.count_documents({}) == 0


async def test_a_node_takes_another_time_to_live_to_every_shard(cluster: Cluster, nodes: NodeFactory) -> None:
    await nodes.start(message_ttl_days=1)
    for shard in cluster.shards:
        indexes = await shard.client[nodes.database].messages.index_information()
        assert indexes["createdAt_ttl"]["expireAfterSeconds"] == 86_400


async def test_chunks_that_move_under_load_lose_nothing_and_count_nothing_twice(
    cluster: Cluster, node: Node
) -> None:
    talks = [await talk(node, SHARDS[number % 2]) for number in range(8)]
    ann, bob = await devices(node)
    sent: list[str] = []
    got: list[str] = []

    async def send() -> None:
        for number in range(600):
            sent.append(await ann.send(talks[number % len(talks)]))
            await ann.expect("stored", id=sent[-1])

    async def receive() -> None:
        while len(set(got)) < 600:
            one = await bob.expect("msg", 20)
            got.append(one["id"])
            await bob.ack(one["conv"], one["id"], durable=False)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        tasks.create_task(receive())
        for low, high, to in (("0", "8", 1), ("8", None, 0), ("0", "8", 0), ("8", None, 1)):
            await cluster.move(low, high, to, database=node.db.name)
    assert sorted(set(got)) == sorted(sent)
    # What was in doubt while a chunk was locked may come again, and is acknowledged again.
    assert len(got) - len(sent) <= 30

    async def none() -> bool:
        return await node.db.messages.find_one({}) is None

    await until(none, 20, "all that was acknowledged is gone")
    ledger = node.relay.context.ledger
    assert (ledger.count("accepted"), ledger.count("acknowledged"), ledger.waiting) == (600, 600, 0)


async def test_the_time_is_that_of_the_shard_that_holds_the_nodes(cluster: Cluster, node: Node) -> None:
    mongo = Mongo(cluster.uri, node.db.name)
    try:
        async with touching(cluster, node.db.name) as touched:
            readings = await mongo.readings(READINGS)
    finally:
        mongo.close()
    assert touched.shards("nodes", names=("aggregate",)) == {SHARDS[0]}
    assert len(readings) == READINGS
    now = time.time_ns() - steady_ns()
    assert all(abs(one.ahead - now) <= one.error + 1_000_000_000 for one in readings)
