"""Changes of conversations that cannot be carried out, as their shard does not answer: each is done once, and others go on."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from handlers import changing
from relay.store import revisions as module
from relay.store.mongo import PyMongoError
from relay.store.revisions import Proposal
from relay.wire.errors import RelayError
from tests.cluster import Cluster
from tests.faults.test_dead_shard import without_s2
from tests.support.node import Node, NodeFactory
from tests.support.sharded import cluster, nodes, sharded, talk
from tests.support.waiting import until

__all__ = ["cluster", "nodes", "sharded"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    return await nodes.start(send_deadline_seconds=1, commit_timeout_seconds=0.5)


async def pending(node: Node, conv: str) -> dict[str, Any] | None:
    found = await node.db.conversations.find_one({"_id": conv})
    assert found is not None
    change: dict[str, Any] | None = found.get("pending")
    return change


async def acts(node: Node, conv: str) -> list[str]:
    return [one["act"] async for one in node.db.audit.find({"details.conversation": conv})]


async def stamps(node: Node, conv: str) -> dict[str, Any]:
    return {one["user"]: one["updatedAt"] async for one in node.db.memberships.find({"conversationId": conv})}


async def test_a_change_is_noted_released_and_told_once_however_often_it_is_tried(
    cluster: Cluster, node: Node
) -> None:
    there = await talk(node, "s2", 3)
    ctx = node.relay.context
    planned = set[str]()
    async with without_s2(cluster, node):
        status, _ = await node.request("DELETE", f"/v1/conversations/{there}/members/bob", "ann", "phone")
        assert status == 503
        before = await stamps(node, there)
        for _ in range(3):
            revision = module._pending(await node.db.conversations.find_one({"_id": there}))
            assert revision is not None
            with pytest.raises((RelayError, PyMongoError)):
                await changing.carry_out(ctx, revision)
            planned |= {one["_id"] async for one in node.db.releases.find({"conversationId": there})}
        assert await acts(node, there) == ["member.remove"]
        assert len(planned) == 1
        assert await stamps(node, there) == before
    # What it waits for now is not the shard.
    await node.db.conversations.update_one({"_id": there}, {"$unset": {"pending.dueAt": ""}})

    async def over() -> bool:
        return await pending(node, there) is None

    await until(over, 30, "it is carried out")
    assert await acts(node, there) == ["member.remove"]
    assert await stamps(node, there) == before
    assert await node.db.messages.count_documents({"conversationId": there, "kind": "system"}) == 1


async def test_changes_that_cannot_be_finished_keep_nobody_from_finishing_others(
    cluster: Cluster, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So many are looked at in one round.
    monkeypatch.setattr(module, "_REPAIR", 2)
    stuck = [await talk(node, "s2") for _ in range(5)]
    here = await talk(node, "s1")
    ctx = node.relay.context

    async def begin(conv: str) -> None:
        await ctx.revisions.begin(conv, "ann", [], lambda _: Proposal("changed", fields={"name": "new"}))

    tried: list[str] = []
    real = changing.carry_out

    async def carry_out(context: Any, revision: Any, **how: Any) -> None:
        tried.append(revision.conversation)
        await real(context, revision, **how)

    async with without_s2(cluster, node):
        for conv in stuck:
            await begin(conv)
        await begin(here)
        monkeypatch.setattr(changing, "carry_out", carry_out)

        async def over() -> bool:
            return await pending(node, here) is None

        await until(over, 15, "the change on the shard that answers is carried out")
        assert not set(stuck).intersection(tried), "it is known that these cannot be"
        assert all([await pending(node, conv) for conv in stuck])

    async def all_over() -> bool:
        return not any([await pending(node, conv) for conv in stuck])

    await until(all_over, 30, "and the others when it is back")
    assert await node.db.audit.count_documents({"act": "conversation.change"}) == 6


async def test_a_change_that_fails_is_tried_ever_more_seldom_and_comes_after_those_that_were_not_tried(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REPAIR", 1)
    ctx = node.relay.context
    stuck, later = await talk(node, "s1"), await talk(node, "s1")
    real = changing._announce

    async def announce(context: Any, revision: Any) -> None:
        if revision.conversation == stuck:
            raise RelayError("unavailable", "not now")
        await real(context, revision)

    monkeypatch.setattr(changing, "_announce", announce)
    for conv in (stuck, later):
        await ctx.revisions.begin(conv, "ann", [], lambda _: Proposal("changed", fields={"name": "new"}))

    async def over() -> bool:
        return await pending(node, later) is None

    await until(over, 15, "the other one is carried out")
    waits: list[float] = []
    while len(waits) < 3:
        found = await pending(node, stuck)
        assert found is not None
        if found.get("tries", 0) > len(waits):
            waits.append((found["dueAt"] - datetime.now(UTC)).total_seconds())
            # Now it is due.
            await node.db.conversations.update_one({"_id": stuck}, {"$set": {"pending.dueAt": found["at"]}})
        await asyncio.sleep(0.05)
    assert waits[0] < waits[2] <= 1.25 * 20
    assert await acts(node, stuck) == ["conversation.change"]
