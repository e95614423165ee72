"""What ends through two nodes at the same moment is booked once: the sum of the books is what waits, without a recount."""

from __future__ import annotations

import asyncio
from typing import Any

from models.housekeeping import Setting
from relay.jobs.expiry import Expiry
from relay.store.ledger import OUTCOMES
from relay.wire.ids import user_of
from tests.support.device import WireDevice
from tests.support.failpoints import failing
from tests.support.node import Node, NodeFactory

# Long enough that both nodes have read before either writes, on a busy machine, too.
HELD: dict[str, Any] = {"blockConnection": True, "blockTimeMS": 700, "times": 2}
TTL = 3600


async def over_http(node: Node, conv: str, message: str, *devices: str) -> None:
    """These devices acknowledge a message over HTTP through this node, all at once."""
    body = {"acks": [{"conv": conv, "ids": [message]}]}
    answers = await asyncio.gather(
        *(
            node.request("POST", "/v1/acks", user_of(device), device[len(user_of(device)) + 1 :], body)
            for device in devices
        )
    )
    assert [status for status, _ in answers] == [200] * len(devices)


async def over_socket(device: WireDevice, conv: str, message: str) -> None:
    """A device acknowledges a message over its connection."""
    await device.put({"t": "ack", "conv": conv, "ids": [message], "ref": message})
    await device.expect("acked", ref=message)


async def balanced(*nodes: Node, **booked: int) -> None:
    """The books hold what waits, no recount is due, and so much was booked under these names."""
    rows = [row async for row in nodes[0].db.messages.find({}, {"awaiting": 1})]
    books = [node.relay.context.ledger for node in nodes]
    counts: dict[str, int] = {name: sum(one.count(name) for one in books) for name in OUTCOMES}
    assert sum(one.waiting for one in books) == sum(len(row["awaiting"]) for row in rows), counts
    assert {name: counts[name] for name in booked} == booked
    assert not any(one.mistrusted for one in books)
    assert await Setting.get_motor_collection().find_one({"_id": "ledger recount"}) is None


async def group_of(
    node: Node, *others: str, on: Node | None = None
) -> tuple[str, WireDevice, list[WireDevice]]:
    """A group of ann, connected to this node, and others, connected there or ``on`` another one."""
    conv = await node.group("ann", list(others))
    ann = await node.connect("ann")
    return conv, ann, [await (on or node).connect(other) for other in others]


async def test_a_device_that_acknowledges_through_two_nodes_at_once_is_counted_once(
    nodes: NodeFactory,
) -> None:
    one, other = await nodes.start(), await nodes.start()
    conv, ann, (bob, _) = await group_of(one, "bob", "cleo")
    stored = await ann.sent(conv)
    await bob.expect("msg", id=stored["id"])
    async with failing(one, "update", **HELD):
        await asyncio.gather(
            over_socket(bob, conv, stored["id"]), over_http(other, conv, stored["id"], "bob/phone")
        )
    await balanced(one, other, accepted=2, acknowledged=1)
    await over_http(other, conv, stored["id"], "cleo/phone")
    await balanced(one, other, accepted=2, acknowledged=2)


async def test_a_last_acknowledgement_through_two_nodes_at_once_is_counted_once(nodes: NodeFactory) -> None:
    one, other = await nodes.start(), await nodes.start()
    conv, ann, (bob, _) = await group_of(one, "bob", "cleo")
    stored = await ann.sent(conv)
    await bob.expect("msg", id=stored["id"])
    await over_http(one, conv, stored["id"], "cleo/phone")
    async with failing(one, "delete", **HELD):
        await asyncio.gather(
            over_socket(bob, conv, stored["id"]), over_http(other, conv, stored["id"], "bob/phone")
        )
    assert not await one.db.messages.count_documents({})
    await balanced(one, other, accepted=2, acknowledged=2)


async def test_what_one_node_ends_while_another_takes_a_device_off_it_is_counted_once(
    nodes: NodeFactory,
) -> None:
    one, other = await nodes.start(), await nodes.start()
    conv, ann, (bob, _) = await group_of(one, "bob", "cleo")
    stored = await ann.sent(conv)
    await bob.expect("msg", id=stored["id"])
    # Bob's is written at once by his node, which knows that cleo still awaits it; the other one knows of both.
    async with failing(one, "delete", **HELD):
        ending = asyncio.create_task(over_http(other, conv, stored["id"], "bob/phone", "cleo/phone"))
        await asyncio.sleep(0.2)
        await over_socket(bob, conv, stored["id"])
        await ending
    assert not await one.db.messages.count_documents({})
    await balanced(one, other, accepted=2, acknowledged=2)


async def test_two_devices_of_who_had_none_that_come_to_two_nodes_are_counted_once(
    nodes: NodeFactory,
) -> None:
    one, other = await nodes.start(), await nodes.start()
    conv = await one.group("ann", ["bob", "cleo"])
    ann = await one.connect("ann")
    stored = await ann.sent(conv)
    phone, tablet = await one.connect("bob", "phone"), await other.connect("bob", "tablet")
    for device in (phone, tablet):
        await device.expect("msg", id=stored["id"])
    async with failing(one, "update", **HELD):
        await asyncio.gather(*(over_socket(device, conv, stored["id"]) for device in (phone, tablet)))
    await balanced(one, other, accepted=2, acknowledged=1)


async def test_messages_that_two_nodes_find_due_are_counted_as_expired_once(nodes: NodeFactory) -> None:
    one, other = await nodes.start(), await nodes.start()
    conv, ann, _ = await group_of(one, "bob", "cleo")
    for _ in range(5):
        await ann.sent(conv, ttl=TTL)
    contexts = [node.relay.context for node in (one, other)]
    later = contexts[0].clock.now() + 2 * TTL * 1000
    async with failing(one, "delete", **HELD):
        await asyncio.gather(
            *(Expiry(context.messages, context.endings, lambda: later).run() for context in contexts)
        )
    await balanced(one, other, accepted=10, expired=10)


async def test_an_acknowledgement_while_another_node_expires_the_message_is_counted_once(
    nodes: NodeFactory,
) -> None:
    one, other = await nodes.start(), await nodes.start()
    conv, ann, (bob, _) = await group_of(one, "bob", "cleo")
    stored = await ann.sent(conv, ttl=TTL)
    await bob.expect("msg", id=stored["id"])
    context = other.relay.context
    later = context.clock.now() + 2 * TTL * 1000
    async with failing(one, "delete", **HELD):
        expiring = asyncio.create_task(Expiry(context.messages, context.endings, lambda: later).run())
        await asyncio.sleep(0.2)
        await over_socket(bob, conv, stored["id"])
        await expiring
    assert not await one.db.messages.count_documents({})
    await balanced(one, other, accepted=2, acknowledged=1, expired=1)
