"""One of two shards does not answer: what becomes of its conversations, and that nobody else notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.support.device import WireDevice, new_id
from tests.support.node import Node, NodeFactory
from tests.support.sharded import SHARDS, cluster, devices, nodes, sharded, talk
from tests.support.waiting import arriving, until

__all__ = ["cluster", "nodes", "sharded"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    return await nodes.start(send_deadline_seconds=3, commit_timeout_seconds=1, inline_recipients=4)


@asynccontextmanager
async def without_s2(cluster: Cluster, node: Node) -> AsyncIterator[None]:
    """While this lasts the second shard stands still, and the node knows."""
    cluster.shards[1].stop()
    try:
        await until(lambda: knows(node, True), 15, "the node notices")
        yield
    finally:
        cluster.shards[1].resume()
    await until(lambda: knows(node, False), 15, "the node notices that it is back")


async def knows(node: Node, down: bool) -> bool:
    async with node.http.get(node.url + "/readyz") as response:
        found = await response.json()
    problems: dict[str, str] = found.get("problems", {})
    return ("shards" in problems) == down


async def answer(device: WireDevice, message: str, seconds: float) -> dict[str, Any]:
    """The ``stored`` or ``error`` of this message."""
    async with asyncio.timeout(seconds):
        while True:
            frame = await device.next(seconds)
            if frame.get("id") == message and frame["t"] in ("stored", "error"):
                return frame


async def test_its_conversations_are_unavailable_and_others_do_not_notice(
    cluster: Cluster, node: Node
) -> None:
    here, there = [await talk(node, shard) for shard in SHARDS]
    ann, bob = await devices(node)
    loop = asyncio.get_running_loop()
    async with without_s2(cluster, node):
        tried = [await ann.send(there)]
        for _ in range(20):
            began = loop.time()
            sent = await ann.sent(here)
            await bob.expect("msg", id=sent["id"])
            await bob.ack(here, sent["id"])
            assert loop.time() - began < 1, "a message of a living shard waits for nothing"
        lane = node.relay.context.sends._lanes["s2"]
        first = await answer(ann, tried[0], 10)
        assert (first["t"], first.get("code"), first.get("retry")) == ("error", "unavailable", True)
        # Later it is known: who sends there is told at once, and the store is not asked but now and then.
        while not lane.breaker.is_open:
            tried.append(await ann.send(there))
            assert (await answer(ann, tried[-1], 10))["code"] == "unavailable"
        assert not node.relay.context.sends._lanes["s1"].breaker.is_open
        ids = [new_id() for _ in range(50)]
        began = loop.time()
        await ann.put(
            *({"t": "send", "id": one, "conv": there, "kind": "text", "body": "hello"} for one in ids)
        )
        # The first of them finds out whether it still is so.
        refused = [await ann.expect("error", 10) for _ in ids[1:]]
        assert {(one["code"], one["retry"]) for one in refused} == {("unavailable", True)}
        assert loop.time() - began < 1
    unanswered = {*tried, *ids}
    while unanswered:
        await ann.put(
            *(
                {"t": "send", "id": one, "conv": there, "kind": "text", "body": "hello", "again": True}
                for one in unanswered
            )
        )
        unanswered -= {one["id"] for one in await arriving(ann, "stored", 1)}
    got = {(await bob.expect("msg", 10))["id"] for _ in [*tried, *ids]}
    assert got == {*tried, *ids}
    await bob.ack(there, *got)
    assert not await node.db.messages.count_documents({})


async def answer_again(device: WireDevice, conv: str, message: str) -> dict[str, Any]:
    await device.send(conv, id=message, again=True)
    return await answer(device, message, 10)


async def test_resends_that_must_ask_it_harm_nobody_else(cluster: Cluster, node: Node) -> None:
    here, moved = await talk(node, "s1"), await talk(node, "s1")
    ann, bob = await devices(node)
    cleo = await node.connect("cleo")
    sent = await ann.sent(moved)
    await bob.expect("msg", id=sent["id"])
    await bob.ack(moved, sent["id"])
    # It has moved, so what became of its messages may be on record on either shard.
    for to in (1, 0):
        await cluster.move(moved, moved + "0", to, database=node.db.name)
    mine = await node.direct("cleo", "dan")
    while mine >= "8" or mine == moved:
        mine = await node.group("cleo", ["dan"])

    async def follows() -> bool:
        return node.relay.context.fates._shards.lanes_of_fates(moved) is None

    await until(follows, 20, "the node has read the routing table again")
    async with without_s2(cluster, node):
        loop = asyncio.get_running_loop()
        over = loop.time() + 6
        while loop.time() < over:
            await ann.send(moved, id=sent["id"], again=True)
            began = loop.time()
            await cleo.sent(mine)
            assert loop.time() - began < 1.5
            await ann.send(here)
            await asyncio.sleep(0.1)
        assert not node.relay.context.sends._lanes["s1"].breaker.is_open
    assert (await ann.sent(moved, id=sent["id"], again=True))["seq"] == sent["seq"]


async def test_drains_go_on_for_the_others_and_drained_is_withheld(cluster: Cluster, node: Node) -> None:
    here, there = [await talk(node, shard) for shard in SHARDS]
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    waiting = [(await ann.sent(conv))["id"] for conv in (here, there, here, there)]
    async with without_s2(cluster, node):
        bob = await node.connect("bob")
        got = [await bob.expect("msg", 10) for _ in range(2)]
        assert [one["id"] for one in got] == waiting[::2]
        await bob.ack(here, *waiting[::2])
        # It is live for what the others bring.
        live = await ann.sent(here)
        await bob.expect("msg", 10, id=live["id"])
        await bob.ack(here, live["id"])
        await bob.nothing("drained", 1)
    got = [await bob.expect("msg", 10) for _ in range(2)]
    assert [one["id"] for one in got] == waiting[1::2]
    await bob.nothing("drained")
    await bob.ack(there, *waiting[1::2])
    assert (await bob.expect("drained", 10))["count"] == 4
    assert not await node.db.messages.count_documents({})


async def test_a_device_with_nothing_there_is_told_drained_when_the_shard_is_back(
    cluster: Cluster, node: Node
) -> None:
    await (await node.connect("bob")).close()
    async with without_s2(cluster, node):
        bob = await node.connect("bob")
        await bob.nothing("drained", 1.5)
    assert (await bob.expect("drained", 10))["count"] == 0


async def test_what_was_acknowledged_meanwhile_comes_again_or_is_gone(cluster: Cluster, node: Node) -> None:
    here, there = [await talk(node, shard) for shard in SHARDS]
    ann, bob = await devices(node)
    sent = await ann.sent(there)
    await bob.expect("msg", id=sent["id"])
    async with without_s2(cluster, node):
        await bob.ack(there, sent["id"], durable=False)
        # As long as it is not durable the message is in flight: others come all the same.
        other = await ann.sent(here)
        await bob.expect("msg", id=other["id"])
        await bob.ack(here, other["id"])
        await asyncio.sleep(4)

    async def gone() -> bool:
        for again in await arriving(bob, "msg", 0.2):
            assert again["id"] == sent["id"]
            await bob.ack(there, sent["id"])
        return not await node.db.messages.count_documents({})

    await until(gone, 15, "nothing is left")
    await ann.put({"t": "status", "conv": there, "ids": [sent["id"]], "ref": "s"})
    found = await ann.expect("status", ref="s")
    assert (found["items"][0]["fate"], found["items"][0]["delivered"]) == ("delivered", ["bob"])


async def test_jobs_go_on_for_the_shards_that_live(cluster: Cluster, nodes: NodeFactory) -> None:
    node = await nodes.start(expiry_seconds=0.2, sweep_seconds=1, commit_timeout_seconds=1)
    here, there = [await talk(node, shard) for shard in SHARDS]
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    async with without_s2(cluster, node):
        await ann.sent(here, ttl=1)
        await ann.sent(here)
        # Acknowledged, but a node died before it deleted it.
        found = await cluster.shards[0].client[node.db.name].messages.find_one({"expiresAt": None})
        assert found is not None
        await node.db.messages.update_one(
            {"_id": found["_id"], "conversationId": here}, {"$set": {"awaiting": []}}
        )

        async def gone() -> bool:
            return not await cluster.shards[0].client[node.db.name].messages.count_documents({})

        await until(gone, 15, "what was due and what was left over is gone")
    assert there


QUOTA = 6


async def with_a_quota(nodes: NodeFactory) -> Node:
    """Mailboxes hold six messages, and are counted as often as they are asked for."""
    node = await nodes.start(mailbox_messages=QUOTA, commit_timeout_seconds=1)
    node.relay.context.quotas.lease = 0
    return node


async def is_full(node: Node, full: bool) -> bool:
    """It is on record, and the node goes by it."""
    found = await node.db.devices.find_one({"_id": "bob/phone"})
    return ("fullSince" in found) is full and node.relay.context.quotas.is_full("bob/phone") is full


async def bob_is_away(node: Node) -> None:
    bob = await node.connect("bob")
    await bob.close()
    await until(lambda: _away(node, bob), 3, "bob is away")


async def latched(node: Node, ann: WireDevice, conv: str) -> list[str]:
    """What fills the mailbox of bob, who is away."""
    sent = [(await ann.sent(conv))["id"] for _ in range(QUOTA)]
    await until(lambda: is_full(node, True), 5, "bob's mailbox is full")
    return sent


async def _away(node: Node, device: WireDevice) -> bool:
    return node.relay.context.hub.get(device.key) is None


async def awaited(cluster: Cluster, node: Node, message: str) -> bool:
    """Whether bob awaits this message of the first shard."""
    found = await cluster.shards[0].client[node.db.name].messages.find_one({"id": message})
    return found is not None and "bob/phone" in found["awaiting"]


async def test_who_has_drained_the_living_shards_is_full_no_more(
    cluster: Cluster, nodes: NodeFactory
) -> None:
    node = await with_a_quota(nodes)
    here, there = [await talk(node, shard) for shard in SHARDS]
    ann = await node.connect("ann")
    await bob_is_away(node)
    waiting = await latched(node, ann, here)
    async with without_s2(cluster, node):
        bob = await node.connect("bob")
        got = [(await bob.expect("msg", 10))["id"] for _ in waiting]
        await bob.ack(here, *got)
        await until(lambda: is_full(node, False), 10, "bob has room")
        sent = await ann.sent(here)
        await bob.expect("msg", 10, id=sent["id"])
        await bob.ack(here, sent["id"])
    assert there


async def test_a_mailbox_is_found_full_by_what_waits_on_the_living_shards(
    cluster: Cluster, nodes: NodeFactory
) -> None:
    node = await with_a_quota(nodes)
    here = await talk(node, "s1")
    ann = await node.connect("ann")
    await bob_is_away(node)
    async with without_s2(cluster, node):
        await latched(node, ann, here)
        # What was resolved a moment before is still on its way.
        await node.relay.context.invalidation.tell(users=["bob"])
        assert not await awaited(cluster, node, (await ann.sent(here))["id"])


async def test_a_mailbox_full_of_what_waits_on_a_dead_shard_takes_what_others_bring_and_is_counted_again_later(
    cluster: Cluster, nodes: NodeFactory
) -> None:
    node = await with_a_quota(nodes)
    here, there = [await talk(node, shard) for shard in SHARDS]
    ann = await node.connect("ann")
    await bob_is_away(node)
    await latched(node, ann, there)
    async with without_s2(cluster, node):
        # Asks whether bob is full still.
        await ann.sent(here)
        await until(lambda: is_full(node, False), 10, "bob has room for what the first shard brings")
        assert await awaited(cluster, node, (await ann.sent(here))["id"])
    await ann.sent(here)
    await until(lambda: is_full(node, True), 10, "all that waits is counted again")


async def test_a_node_that_starts_meanwhile_serves_the_others(cluster: Cluster, nodes: NodeFactory) -> None:
    node = await nodes.start(commit_timeout_seconds=1)
    here = await talk(node, "s1")
    async with without_s2(cluster, node):
        other = await nodes.start(commit_timeout_seconds=1)
        ann, bob = await other.connect("ann"), await other.connect("bob")
        sent = await ann.sent(here)
        await bob.expect("msg", id=sent["id"])
        await bob.ack(here, sent["id"])


async def test_a_shard_that_dies_and_starts_again_is_used_again(cluster: Cluster, node: Node) -> None:
    here, there = [await talk(node, shard) for shard in SHARDS]
    ann, bob = await devices(node)
    await cluster.shards[1].kill()
    try:
        sent = await ann.sent(here)
        await bob.expect("msg", id=sent["id"])
        message = await ann.send(there)
        assert (await answer(ann, message, 15))["code"] == "unavailable"
    finally:
        await cluster.shards[1].start()

    async def stored() -> bool:
        return bool((await answer_again(ann, there, message))["t"] == "stored")

    await until(stored, 40, "it is stored again")
    await bob.expect("msg", 15, id=message)
