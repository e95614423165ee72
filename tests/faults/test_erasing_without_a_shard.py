"""Somebody is erased while one of two shards does not answer: all but what lies there is done meanwhile, and nothing twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from handlers import changing
from tests.cluster import Cluster
from tests.faults.test_dead_shard import without_s2
from tests.integration.test_personal import ANN, KEY, assert_gone, erase, pseudonym
from tests.support.device import WireDevice
from tests.support.node import Node, NodeFactory
from tests.support.sharded import SHARDS, cluster, nodes, sharded
from tests.support.waiting import until

__all__ = ["cluster", "nodes", "sharded"]

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

BACK_SECONDS = 120
FEW = 3
"""So many groups, of each kind on each shard."""


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    return await nodes.start(pseudonym_key=KEY, send_deadline_seconds=3, commit_timeout_seconds=1)


async def groups_of(node: Node, by: str, others: list[str]) -> dict[str, set[str]]:
    """A few groups on either shard."""
    found: dict[str, set[str]] = {shard: set() for shard in SHARDS}
    while any(len(some) < FEW for some in found.values()):
        name = await node.group(by, others)
        found["s1" if name < "8" else "s2"].add(name)
    return found


async def write(bob: WireDevice, ann: WireDevice, conv: str) -> None:
    """Two messages to ann, of which she has one, and which wait for others."""
    for acknowledged in (True, False):
        sent = await bob.sent(conv)
        await ann.expect("msg", id=sent["id"])
        if acknowledged:
            await ann.ack(conv, sent["id"])


async def acts(node: Node) -> Counter[tuple[str, str | None, str]]:
    """How often what was done on whom in which conversation, as the trail says."""
    rows = node.db.audit.find({"details.conversation": {"$exists": True}})
    return Counter([(row["act"], row["targetKey"], row["details"]["conversation"]) async for row in rows])


async def naming_ann(database: Any) -> set[str]:
    """The collections that name her, but for what runs out by itself."""
    found: set[str] = set()
    for name in set(await database.list_collection_names()) - {"fates"}:
        async for document in database[name].find():
            told = name == "messages" and document["sender"]["user"] == "$relay"
            if ANN in repr(document["awaiting"] if told else document):
                found.add(name)
    return found


async def test_all_but_what_lies_on_the_dead_shard_is_done_and_nothing_twice(
    cluster: Cluster, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changing, "_LEFT_AT_ONCE", 2)
    for user in ("bob", "cleo"):
        await node.request("GET", "/v1/me", user, "phone")
    ann, bob = await node.connect(ANN), await node.connect("bob")
    own = await groups_of(node, ANN, ["bob", "cleo"])
    joined = await groups_of(node, "bob", [ANN, "cleo"])
    # Nobody is told of leaving a direct conversation: that can be done, wherever its messages lie.
    number = 0
    while await node.direct(ANN, f"friend{number}") < "8":
        number += 1
    for shard in SHARDS:
        await write(bob, ann, min(own[shard]))
    living = cluster.shards[0].client[node.db.name].messages
    assert await living.count_documents({"awaiting": f"{ANN}/phone"}) == 1
    assert await living.count_documents({"deliveredTo.user": ANN}) == 1
    async with without_s2(cluster, node):
        assert await erase(node) == (200, {"done": True})

        async def planned() -> int:
            ahead = {"mailbox": ANN, "conversationId": None, "passes": 0}
            return int(await node.db.releases.count_documents(ahead))

        async def done() -> bool:
            """Nothing on the shard that lives names her but what is still to be done."""
            left = await naming_ann(cluster.shards[0].client[node.db.name])
            return (
                left == {"users", "devices", "erasures", "releases", "memberships"}
                and {row["conversationId"] async for row in node.db.memberships.find({"user": ANN})}
                == own["s2"] | joined["s2"]
            )

        await until(done, 40, "what can be done is done")
        assert await living.count_documents({"deliveredTo.user": pseudonym()}) == 1
        noted = await acts(node)
        assert {conversation for _, _, conversation in noted} == own["s1"] | joined["s1"]
        assert max(noted.values()) == 1
        # The request and the job may both have begun.
        assert 1 <= (ahead := await planned()) <= 2
        # Longer than two rounds of the job take.
        await asyncio.sleep(12)
        assert await acts(node) == noted
        assert await planned() == ahead, "not one more at every round"

    async def over() -> bool:
        return not await node.db.erasures.count_documents({}) and not await node.db.releases.count_documents(
            {}
        )

    await until(over, BACK_SECONDS, "the erasure has ended, and what it released was looked at again")
    noted = await acts(node)
    assert {conversation for _, _, conversation in noted} == set().union(*own.values(), *joined.values())
    assert max(noted.values()) == 1
    await assert_gone(node)
