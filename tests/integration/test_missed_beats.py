"""A node that lives, but whose beats do not come through: others take it for dead, so it must not act on what it believes."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from time import monotonic

import pytest

from relay.store.mongo import PyMongoError
from relay.store.peers import HELD_SECONDS, Peers
from tests.support.node import Node, NodeFactory

hung: set[str] = set()


@pytest.fixture
async def two(nodes: NodeFactory, monkeypatch: pytest.MonkeyPatch) -> tuple[Node, Node]:
    beat = Peers.beat

    async def beats(self: Peers) -> None:
        if self.id in hung:
            raise PyMongoError("no answer")
        await beat(self)

    hung.clear()
    monkeypatch.setattr(Peers, "beat", beats)
    one, other = [await nodes.start(sweep_seconds=3600) for _ in range(2)]
    return one, other


def peers(node: Node) -> Peers:
    found = getattr(node.relay.context.audiences.hold, "__self__", None)
    assert isinstance(found, Peers)
    return found


async def miss_beats(node: Node) -> None:
    """As if none had come through for a minute."""
    its = peers(node)
    hung.add(its.id)
    assert its._beaten is not None
    its._beaten -= 60
    past = datetime.now(UTC) - timedelta(minutes=1)
    await node.db.nodes.update_one({"_id": its.id}, {"$set": {"at": past}})


async def remove_bob(node: Node, conv: str) -> float:
    began = monotonic()
    status, _ = await node.request("DELETE", f"/v1/conversations/{conv}/members/bob", "ann", "phone")
    assert status == 200
    return monotonic() - began


async def test_what_it_resolved_before_a_removal_that_nobody_waited_to_tell_it_is_committed_to_nobody(
    two: tuple[Node, Node],
) -> None:
    one, other = two
    conv = await one.group("ann", ["bob", "cleo"])
    ann, bob = await other.connect("ann", "tablet"), await other.connect("bob")
    await ann.sent(conv, "warms the cache")
    await bob.expect("msg")
    await miss_beats(other)
    one.relay.context.invalidation.lease = 60.0
    assert await remove_bob(one, conv) < 30, "nobody is waited for"
    secret = await ann.send(conv, "without bob")
    await ann.nothing("stored", 1)
    hung.clear()
    await ann.expect("stored", 15, id=secret)
    document = await one.db.messages.find_one({"id": secret})
    assert document is not None
    assert sorted(key.split("/")[0] for key in document["awaiting"]) == ["ann", "cleo"]
    await bob.nothing("msg", 0.5)


async def test_one_that_beats_again_believes_nothing_of_before(two: tuple[Node, Node]) -> None:
    one, other = two
    conv = await one.group("ann", ["bob", "cleo"])
    ann = await other.connect("ann", "tablet")
    await ann.sent(conv, "warms the cache")
    believed = other.relay.context.audiences.get(conv)
    assert believed is not None
    await miss_beats(other)
    await remove_bob(one, conv)
    hung.clear()
    await peers(other).beat()
    assert not believed.fresh
    assert other.relay.context.audiences.get(conv) is None
    message = await ann.sent(conv, "without bob")
    document = await one.db.messages.find_one({"id": message["id"]})
    assert document is not None and "bob/*" not in document["awaiting"]


async def test_one_that_may_still_go_on_is_waited_for_though_it_seems_dead(two: tuple[Node, Node]) -> None:
    one, other = two
    conv = await one.group("ann", ["bob"])
    one.relay.context.invalidation.lease = 2.0
    past = datetime.now(UTC) - timedelta(seconds=HELD_SECONDS + 2)
    hung.add(peers(other).id)
    await other.db.nodes.update_one({"_id": peers(other).id}, {"$set": {"at": past}})
    assert peers(other).id not in await peers(one).others()
    assert await remove_bob(one, conv) >= 1.9


async def test_beats_that_come_late_forget_nothing(two: tuple[Node, Node]) -> None:
    _, other = two
    conv = await other.group("ann", ["bob"])
    ann = await other.connect("ann", "tablet")
    await ann.sent(conv, "warms the cache")
    its = peers(other)
    assert its._beaten is not None
    its._beaten -= HELD_SECONDS / 2
    believed = await other.relay.context.audiences.resolve(conv)
    await asyncio.gather(its.beat(), its.beat())
    assert believed.fresh
    assert its.held
