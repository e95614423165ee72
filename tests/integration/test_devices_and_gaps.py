"""PROTOCOL 1 and 2: devices that come, go and come back; what they may have missed."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from tests.support.device import new_id
from tests.support.failpoints import failing
from tests.support.node import Node, NodeFactory
from tests.support.raw import RawSocket


async def sleep_long(node: Node, key: str, days: float = 40) -> int:
    """The device was last seen so long ago; returns when it became inactive, in milliseconds."""
    seen = datetime.now(UTC) - timedelta(days=days)
    seen = seen.replace(microsecond=seen.microsecond // 1000 * 1000)
    await node.db.devices.update_one({"_id": key}, {"$set": {"lastSeen": seen}})
    node.relay.context.hub.left.pop(key, None)
    node.relay.context.audiences.changed(user=key.partition("/")[0])
    return round((seen + timedelta(days=30)).timestamp() * 1000)


async def leave(node: Node, user: str, device: str = "phone") -> None:
    """Connects and disconnects: the device is known and away."""
    await (await node.connect(user, device)).close()
    async with asyncio.timeout(3):
        while node.relay.context.hub.get(f"{user}/{device}") is not None:
            await asyncio.sleep(0.01)


async def awaited(node: Node, message: str) -> list[str]:
    document = await node.db.messages.find_one({"id": message})
    return sorted(document["awaiting"])


async def until_gone(node: Node, message: str) -> None:
    async with asyncio.timeout(3):
        while await node.db.messages.find_one({"id": message}):
            await asyncio.sleep(0.02)


async def test_an_inactive_device_gets_no_new_messages_and_is_told_of_the_gap_until_it_has_drained(
    node: Node,
) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await leave(node, "bob", "laptop")
    before = await ann.sent(conv, "while it was active")
    await leave(node, "bob", "phone")
    since = await sleep_long(node, "bob/laptop")
    missed = await ann.sent(conv, "while it was inactive")
    assert await awaited(node, before["id"]) == ["bob/laptop"]
    assert await awaited(node, missed["id"]) == ["bob/phone"]
    laptop = await node.connect("bob", "laptop")
    assert laptop.welcome["gap"] == {"since": since, "why": "inactive"}
    assert (await laptop.expect("msg"))["id"] == before["id"]
    await laptop.close()
    undrained = await node.connect("bob", "laptop")
    assert undrained.welcome["gap"] == {"since": since, "why": "inactive"}
    await undrained.expect("msg")
    await undrained.ack(conv, before["id"])
    await undrained.expect("drained")
    async with asyncio.timeout(3):
        while "gap" in await node.db.devices.find_one({"_id": "bob/laptop"}):
            await asyncio.sleep(0.02)
    assert "gap" not in (await node.connect("bob", "laptop")).welcome
    later = await ann.sent(conv, "active again")
    assert await awaited(node, later["id"]) == ["bob/laptop", "bob/phone"]


async def test_a_gap_stays_open_until_the_device_has_surely_read_of_it(node: Node) -> None:
    await node.direct("ann", "bob")
    await leave(node, "bob")
    since = await sleep_long(node, "bob/phone")
    unread = await RawSocket.open(node, node.headers("bob", "phone"))
    await asyncio.sleep(0.3)
    unread.cut()
    assert (await node.connect("bob")).welcome["gap"] == {"since": since, "why": "inactive"}


async def test_a_gap_outlives_an_arrival_that_failed_half_way(node: Node) -> None:
    await node.direct("ann", "bob")
    await leave(node, "bob")
    since = await sleep_long(node, "bob/phone")
    async with failing(node, "update", "devices", errorCode=8):
        refused = await node.connect("bob", welcome=False)
        assert await refused.closed() == 1012
    assert (await node.connect("bob")).welcome["gap"] == {"since": since, "why": "inactive"}


async def test_a_message_queued_with_recipients_of_an_ended_lease_reaches_a_new_device(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    await leave(node, "bob")
    audiences = node.relay.context.audiences
    old = await audiences.resolve(conv)
    # Another node's, which this one has not heard of.
    phone = await node.db.devices.find_one({"_id": "bob/phone"})
    await node.db.devices.insert_one({**phone, "_id": "bob/tablet"})
    old.resolved -= 10
    new = await audiences.resolve(conv)
    assert "bob/tablet" in new.keys
    assert old.stale, "so what was queued with it is resolved again"
    await leave(node, "bob", "watch")
    assert new.stale, "a change is noted on what is cached"


async def test_a_device_counts_as_inactive_after_the_configured_time(nodes: NodeFactory) -> None:
    node = await nodes.start(device_inactive_days=1e-5)
    conv = await node.direct("ann", "bob")
    await leave(node, "bob")
    await asyncio.sleep(0.9)
    ann = await node.connect("ann")
    stored = await ann.sent(conv)
    assert await awaited(node, stored["id"]) == ["bob/*"]
    bob = await node.connect("bob")
    assert bob.welcome["gap"]["why"] == "inactive"
    assert (await bob.expect("msg"))["id"] == stored["id"]


async def test_a_new_device_has_no_gap_and_gets_what_is_sent_from_its_welcome_on(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, phone = await node.connect("ann"), await node.connect("bob")
    early = await ann.sent(conv, "before the tablet")
    tablet = await node.connect("bob", "tablet")
    assert "gap" not in tablet.welcome
    assert await tablet.expect("drained") == {"t": "drained", "count": 0}
    late = await ann.sent(conv, "after its welcome")
    assert (await tablet.expect("msg"))["id"] == late["id"]
    assert [(await phone.expect("msg"))["id"] for _ in range(2)] == [early["id"], late["id"]]
    assert await awaited(node, early["id"]) == ["bob/phone"]


async def test_messages_sent_during_a_devices_first_connection_reach_it_from_welcome_on(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await node.connect("bob", "phone")
    stop = asyncio.Event()
    stored: list[tuple[str, float]] = []
    loop = asyncio.get_running_loop()

    async def traffic() -> None:
        while not stop.is_set():
            at = loop.time()
            stored.append(((await ann.sent(conv))["id"], at))

    sender = asyncio.create_task(traffic(), name="traffic")
    await asyncio.sleep(0.05)
    tablet = await node.connect("bob", "tablet")
    welcomed = loop.time()
    async with asyncio.timeout(5):
        while not any(at > welcomed for _, at in stored):
            await asyncio.sleep(0.01)
    stop.set()
    await sender
    due = [message for message, at in stored if at > welcomed]
    assert due
    heard = set()
    while due[-1] not in heard:
        heard.add((await tablet.expect("msg"))["id"])
    assert set(due) <= heard


async def test_the_placeholder_is_cleared_by_whichever_device_acknowledges(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    stored = await ann.sent(conv)
    assert await awaited(node, stored["id"]) == ["bob/*"]
    phone, tablet = await node.connect("bob", "phone"), await node.connect("bob", "tablet")
    for device in (phone, tablet):
        assert (await device.expect("msg"))["id"] == stored["id"]
    await tablet.ack(conv, stored["id"])
    await until_gone(node, stored["id"])
    assert (await ann.expect("receipt"))["by"] == {"user": "bob", "device": "tablet"}
    await phone.ack(conv, stored["id"])
    laptop = await node.connect("bob", "laptop")
    assert await laptop.expect("drained") == {"t": "drained", "count": 0}
    assert node.relay.context.ledger.count("acknowledged") == 1
    await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
    assert (await ann.expect("status"))["items"] == [
        {"id": stored["id"], "gone": True, "fate": "delivered", "delivered": ["bob"]}
    ]


async def test_a_device_that_drained_a_placeholder_and_comes_again_does_not_get_it_twice(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    ann = await node.connect("ann")
    stored = await ann.sent(conv)
    assert await awaited(node, stored["id"]) == ["bob/*", "cleo/*"]
    bob = await node.connect("bob")
    await bob.expect("msg")
    await bob.ack(conv, stored["id"])
    assert await awaited(node, stored["id"]) == ["cleo/*"]
    again = await node.connect("bob", "tablet")
    assert await again.expect("drained") == {"t": "drained", "count": 0}
    document = await node.db.messages.find_one({"id": stored["id"]})
    assert [(e["user"], e["device"]) for e in document["deliveredTo"]] == [("bob", "phone")]


async def test_a_placeholder_of_a_user_whose_devices_are_inactive_reaches_the_one_that_returns(
    node: Node,
) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await leave(node, "bob", "phone")
    await leave(node, "bob", "tablet")
    since = await sleep_long(node, "bob/phone")
    await sleep_long(node, "bob/tablet", 50)
    stored = await ann.sent(conv)
    assert await awaited(node, stored["id"]) == ["bob/*"]
    phone = await node.connect("bob", "phone")
    assert phone.welcome["gap"] == {"since": since, "why": "inactive"}
    await phone.expect("msg")
    await phone.ack(conv, stored["id"])
    await until_gone(node, stored["id"])


async def test_a_live_message_for_the_placeholder_reaches_a_device_that_connected_meanwhile(
    node: Node,
) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await ann.sent(conv, "resolves the recipients")
    bob = await node.connect("bob")
    await bob.expect("msg")
    live = await ann.sent(conv, "live")
    assert (await bob.expect("msg", 1))["id"] == live["id"]


async def test_a_removed_member_gets_nothing_new(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    ann, bob, cleo = await node.connect("ann"), await node.connect("bob"), await node.connect("cleo")
    await node.db.memberships.delete_one({"_id": f"{conv} cleo"})
    node.relay.context.audiences.changed(conversation=conv)
    stored = await ann.sent(conv)
    await bob.expect("msg", id=stored["id"])
    assert await awaited(node, stored["id"]) == ["bob/phone"]
    await cleo.nothing("msg", 0.2)


async def test_a_change_made_elsewhere_is_seen_when_the_lease_runs_out(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    ann, cleo = await node.connect("ann"), await node.connect("cleo")
    await ann.sent(conv)
    await cleo.expect("msg")
    await node.db.memberships.delete_one({"_id": f"{conv} ann"})
    async with asyncio.timeout(7):
        while True:
            message = new_id()
            await ann.put(
                {"t": "send", "id": message, "conv": conv, "kind": "text", "body": "x", "ref": message}
            )
            found = await ann.next()
            while found.get("id") != message:
                found = await ann.next()
            if found["t"] == "error":
                break
            await asyncio.sleep(0.2)
    assert found["code"] == "not_member"
