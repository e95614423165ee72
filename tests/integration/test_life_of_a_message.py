"""A message's life, seen on the wire and in the database: stored, delivered, acknowledged, gone."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.device import new_id
from tests.support.node import Node, NodeFactory


async def count(node: Node) -> int:
    return int(await node.db.messages.count_documents({}))


async def gone(node: Node, seconds: float = 3) -> None:
    async with asyncio.timeout(seconds):
        while await count(node):
            await asyncio.sleep(0.02)


async def test_a_message_to_a_connected_device_is_stored_delivered_acknowledged_and_gone(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    stored = await ann.sent(conv, "hello", ref="r1")
    assert stored["ref"] == "r1"
    message = await bob.expect("msg")
    assert message == {
        "t": "msg",
        "id": stored["id"],
        "conv": conv,
        "seq": stored["seq"],
        "at": stored["at"],
        "from": {"user": "ann", "device": "phone"},
        "kind": "text",
        "body": "hello",
    }
    assert await count(node) == 1
    await bob.ack(conv, stored["id"])
    await gone(node)
    receipt = await ann.expect("receipt")
    assert receipt["ids"] == [stored["id"]]
    assert receipt["by"] == {"user": "bob", "device": "phone"}


async def test_a_message_is_deleted_only_after_the_last_device_acknowledges(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    tablet = await node.connect("ann", "tablet")
    ann, phone, laptop = (
        await node.connect("ann"),
        await node.connect("bob"),
        await node.connect("bob", "laptop"),
    )
    stored = await ann.sent(conv)
    for device in (phone, laptop, tablet):
        assert (await device.expect("msg"))["id"] == stored["id"]
    await phone.ack(conv, stored["id"])
    await tablet.ack(conv, stored["id"])
    document = await node.db.messages.find_one({})
    assert document["awaiting"] == ["bob/laptop"]
    assert {(entry["user"], entry["device"]) for entry in document["deliveredTo"]} == {
        ("bob", "phone"),
        ("ann", "tablet"),
    }
    await laptop.ack(conv, stored["id"])
    await gone(node)


async def test_a_member_without_a_device_is_awaited_and_their_first_device_drains_it(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    stored = await ann.sent(conv)
    assert (await node.db.messages.find_one({}))["awaiting"] == ["bob/*"]
    bob = await node.connect("bob")
    assert (await bob.expect("msg"))["id"] == stored["id"]
    await bob.ack(conv, stored["id"])
    assert (await bob.expect("drained"))["count"] == 1
    await gone(node)


async def test_a_resend_is_answered_with_the_first_seq_while_it_waits_and_after_it_is_gone(
    node: Node,
) -> None:
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    first = await ann.sent(conv, "once")
    again = await ann.sent(conv, "once", id=first["id"])
    assert (again["seq"], again["at"]) == (first["seq"], first["at"])
    await bob.expect("msg")
    await bob.ack(conv, first["id"])
    late = await ann.sent(conv, "once", id=first["id"], again=True)
    assert (late["seq"], late["at"]) == (first["seq"], first["at"])
    assert await count(node) == 0
    await bob.nothing("msg")


async def test_the_same_id_from_another_device_is_a_conflict(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    first = await ann.sent(conv)
    await bob.send(conv, "mine", id=first["id"])
    assert (await bob.expect("error", id=first["id"]))["code"] == "id_conflict"


async def test_status_tells_people_and_then_fates(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    ann, bob, cleo = await node.connect("ann"), await node.connect("bob"), await node.connect("cleo")
    stored = await ann.sent(conv)
    unknown = new_id()

    async def items(device: Any) -> list[dict[str, Any]]:
        await device.put({"t": "status", "conv": conv, "ids": [stored["id"], unknown], "ref": "s"})
        found = await device.expect("status", ref="s")
        return list(found["items"])

    nobody = {"id": unknown, "gone": True, "fate": "unknown", "delivered": []}
    assert await items(ann) == [{"id": stored["id"], "awaiting": 2, "delivered": []}, nobody]
    await bob.expect("msg")
    await bob.ack(conv, stored["id"])
    assert await items(ann) == [{"id": stored["id"], "awaiting": 1, "delivered": ["bob"]}, nobody]
    assert (await items(bob))[0]["fate"] == "unknown"
    await cleo.expect("msg")
    await cleo.ack(conv, stored["id"])
    assert await items(ann) == [
        {"id": stored["id"], "gone": True, "fate": "delivered", "delivered": ["bob", "cleo"]},
        nobody,
    ]


async def test_the_fate_names_everybody_also_when_the_last_one_drained_it_later(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    ann, bob = await node.connect("ann"), await node.connect("bob")
    stored = await ann.sent(conv)
    await bob.expect("msg")
    await bob.ack(conv, stored["id"])
    cleo = await node.connect("cleo")
    await cleo.expect("msg")
    await cleo.ack(conv, stored["id"])
    await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
    assert (await ann.expect("status"))["items"][0]["delivered"] == ["bob", "cleo"]


async def test_a_withdrawal_deletes_the_original_where_it_waits_and_is_itself_delivered(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    await node.connect("bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    stored = await ann.sent(conv, "oops")
    await bob.expect("msg", id=stored["id"])
    withdrawal = await ann.sent(conv, None, kind="withdrawn", replyTo=stored["id"])
    told = await bob.expect("msg", id=withdrawal["id"])
    assert (told["kind"], told["replyTo"], told["body"]) == ("withdrawn", stored["id"], None)
    async with asyncio.timeout(3):
        while await node.db.messages.find_one({"id": stored["id"]}):
            await asyncio.sleep(0.02)
    await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
    assert (await ann.expect("status"))["items"][0]["fate"] == "withdrawn"
    mine = await bob.sent(conv, "bob's own")
    await ann.send(conv, None, kind="withdrawn", replyTo=mine["id"])
    assert (await ann.expect("error"))["code"] == "forbidden"


async def test_a_message_past_its_time_is_not_delivered_and_its_fate_is_on_record(nodes: NodeFactory) -> None:
    node = await nodes.start(expiry_seconds=3600)
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    stored = await ann.sent(conv, "soon gone", ttl=1)
    kept = await ann.sent(conv, "kept")
    await asyncio.sleep(1.1)
    bob = await node.connect("bob")
    assert (await bob.expect("msg"))["id"] == kept["id"]
    await bob.nothing("msg")
    await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
    assert (await ann.expect("status"))["items"][0]["fate"] == "expired"


async def test_the_ledger_balances(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    ann, bob, cleo = await node.connect("ann"), await node.connect("bob"), await node.connect("cleo")
    delivered = await ann.sent(conv, "1")
    expired = await ann.sent(conv, "2", ttl=1)
    withdrawn = await ann.sent(conv, "3")
    await ann.sent(conv, "4")
    for device in (bob, cleo):
        await device.expect("msg", id=delivered["id"])
        await device.ack(conv, delivered["id"])
    await bob.ack(conv, expired["id"])
    await ann.sent(conv, None, kind="withdrawn", replyTo=withdrawn["id"])
    ledger = node.relay.context.ledger
    async with asyncio.timeout(5):
        while ledger.count("expired") < 1 or ledger.count("withdrawn") < 2:
            await asyncio.sleep(0.05)
    assert ledger.count("accepted") == 10
    assert ledger.count("acknowledged") == 3
    assert ledger.count("expired") == 1
    assert ledger.count("withdrawn") == 2
    assert ledger.waiting == 4
    found = [document async for document in node.db.messages.find({}, {"awaiting": 1})]
    assert sum(len(document["awaiting"]) for document in found) == 4
