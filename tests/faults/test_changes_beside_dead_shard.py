"""One of two shards does not answer: whom a change waits for, and whom not."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster import Cluster
from tests.faults.test_dead_shard import without_s2
from tests.support.node import Node, NodeFactory
from tests.support.sharded import SHARDS, cluster, devices, nodes, sharded, talk
from tests.support.waiting import until

__all__ = ["cluster", "nodes", "sharded"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    return await nodes.start(send_deadline_seconds=30, commit_timeout_seconds=15)


async def attempt_at_s2(node: Node) -> asyncio.Future[None]:
    """What is being committed on the second shard."""
    lanes = node.relay.context.sends._lanes

    def attempts() -> list[asyncio.Future[None]]:
        return [one for commits in lanes["s2"].commits for one in commits._attempts] if "s2" in lanes else []

    async def begun() -> bool:
        return bool(attempts())

    await until(begun, 10, "it is tried")
    return attempts()[0]


async def test_changes_of_other_conversations_and_people_do_not_wait_for_what_hangs(
    cluster: Cluster, node: Node
) -> None:
    here, there = [await talk(node, shard, 2) for shard in SHARDS]
    ann, _ = await devices(node)
    zoe = await node.group("zoe", ["dan"])
    while zoe >= "8":
        zoe = await node.group("zoe", ["dan"])
    invalidation = node.relay.context.invalidation
    async with without_s2(cluster, node):
        await ann.send(there)
        hanging = await attempt_at_s2(node)
        # A removal, and a new device.
        assert (await node.request("DELETE", f"/v1/conversations/{here}/members/bob", "ann", "phone"))[
            0
        ] == 200
        assert (await node.request("DELETE", f"/v1/conversations/{zoe}/members/dan", "zoe", "phone"))[
            0
        ] == 200
        await node.connect("dan", "tablet")
        assert not hanging.done(), "none of them has waited for it"
        # It may still be committed to those who were members, and to the devices that they had.
        concerned = [
            asyncio.ensure_future(invalidation.tell(conversations=[there])),
            asyncio.ensure_future(invalidation.tell(users=["bob"])),
        ]
        done, _ = await asyncio.wait(concerned, timeout=1)
        assert not done
        assert not hanging.done()
        await asyncio.wait_for(asyncio.gather(*concerned), 60)
        assert hanging.done()
