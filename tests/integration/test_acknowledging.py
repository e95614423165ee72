"""PROTOCOL 2: ``ack``, ``acked``, receipts; who counts and who does not."""

from __future__ import annotations

import asyncio

from tests.support.device import WireDevice, new_id
from tests.support.node import Node


async def pair(node: Node) -> tuple[str, WireDevice, WireDevice]:
    conv = await node.direct("ann", "bob")
    return conv, await node.connect("ann"), await node.connect("bob")


async def count(node: Node) -> int:
    return int(await node.db.messages.count_documents({}))


async def until_none(node: Node) -> None:
    async with asyncio.timeout(3):
        while await count(node):
            await asyncio.sleep(0.02)


async def test_an_ack_with_a_ref_is_answered_once_it_is_durable(node: Node) -> None:
    conv, ann, bob = await pair(node)
    ids = [(await ann.sent(conv))["id"] for _ in range(3)]
    for _ in ids:
        await bob.expect("msg")
    await bob.put({"t": "ack", "conv": conv, "ids": ids, "ref": "a"})
    assert await bob.expect("acked") == {"t": "acked", "conv": conv, "ids": ids, "ref": "a"}
    assert await count(node) == 0


async def test_an_ack_without_a_ref_is_answered_by_nothing(node: Node) -> None:
    conv, ann, bob = await pair(node)
    stored = await ann.sent(conv)
    await bob.expect("msg")
    await bob.ack(conv, stored["id"], durable=False)
    await until_none(node)
    await bob.nothing("acked", 0.1)


async def test_unknown_repeated_and_empty_acks_are_answered_alike(node: Node) -> None:
    conv, ann, bob = await pair(node)
    stored = await ann.sent(conv)
    await bob.expect("msg")
    for ids in ([new_id()], [], [stored["id"], stored["id"]], [stored["id"]]):
        await bob.put({"t": "ack", "conv": conv, "ids": ids, "ref": "r"})
        assert (await bob.expect("acked", ref="r"))["ids"] == ids
    await bob.put({"t": "ack", "conv": "elsewhere", "ids": [new_id()], "ref": "r"})
    await bob.expect("acked", ref="r")
    assert await count(node) == 0
    assert node.relay.context.ledger.count("acknowledged") == 1


async def test_an_ack_holds_up_to_a_thousand_ids(node: Node) -> None:
    conv, _, bob = await pair(node)
    await bob.put({"t": "ack", "conv": conv, "ids": [new_id() for _ in range(1000)], "ref": "1"})
    await bob.expect("acked", ref="1")
    await bob.put({"t": "ack", "conv": conv, "ids": [new_id() for _ in range(1001)], "ref": "2"})
    error = await bob.expect("error", ref="2")
    assert (error["code"], error["conv"], error["retry"]) == ("too_large", conv, False)


async def test_an_ack_of_the_right_id_in_the_wrong_conversation_changes_nothing(node: Node) -> None:
    conv, ann, bob = await pair(node)
    other = await node.group("ann", ["bob"])
    stored = await ann.sent(conv)
    await bob.expect("msg")
    await bob.ack(other, stored["id"])
    assert await count(node) == 1
    await bob.ack(conv, stored["id"])
    await until_none(node)


async def test_neither_a_stranger_nor_the_sender_can_acknowledge_for_another(node: Node) -> None:
    conv, ann, bob = await pair(node)
    cleo = await node.connect("cleo")
    stored = await ann.sent(conv)
    await bob.expect("msg")
    for device in (cleo, ann):
        await device.ack(conv, stored["id"])
        status, _ = await node.request(
            "POST", "/v1/acks", device.user, "phone", {"acks": [{"conv": conv, "ids": [stored["id"]]}]}
        )
        assert status == 200
    document = await node.db.messages.find_one({"id": stored["id"]})
    assert document["awaiting"] == ["bob/phone"]
    assert "deliveredTo" not in document
    await ann.nothing("receipt", 0.1)


async def test_a_message_may_be_acknowledged_before_it_was_delivered(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    message = await ann.send(conv)
    await ann.expect("stored", id=message)
    await bob.ack(conv, message)
    await until_none(node)


async def test_a_receipt_reaches_all_devices_of_the_sender_with_exactly_the_promised_fields(
    node: Node,
) -> None:
    conv, ann, bob = await pair(node)
    tablet = await node.connect("ann", "tablet")
    ids = [(await ann.sent(conv))["id"] for _ in range(3)]
    for _ in ids:
        await bob.expect("msg")
    await bob.ack(conv, *ids)
    for device in (ann, tablet):
        receipt = await device.expect("receipt")
        assert set(receipt) == {"t", "conv", "ids", "by", "at"}
        assert receipt["conv"] == conv
        assert sorted(receipt["ids"]) == sorted(ids)
        assert receipt["by"] == {"user": "bob", "device": "phone"}
    await bob.nothing("receipt", 0.1)


async def test_every_device_that_has_a_message_makes_one_receipt(node: Node) -> None:
    conv, ann, phone = await pair(node)
    laptop = await node.connect("bob", "laptop")
    stored = await ann.sent(conv)
    for device in (phone, laptop):
        await device.expect("msg")
        await device.ack(conv, stored["id"])
        await device.ack(conv, stored["id"])
        assert (await ann.expect("receipt"))["by"] == {"user": "bob", "device": device.device}
    await ann.nothing("receipt", 0.1)
    await until_none(node)


async def test_a_message_to_nobody_else_is_stored_and_done_at_once(node: Node) -> None:
    conv = await node.group("ann", [])
    ann = await node.connect("ann")
    stored = await ann.sent(conv, "a note to nobody")
    await until_none(node)
    await ann.put({"t": "status", "conv": conv, "ids": [stored["id"]]})
    assert (await ann.expect("status"))["items"] == [
        {"id": stored["id"], "gone": True, "fate": "delivered", "delivered": []}
    ]


async def test_malformed_acks_are_refused_and_acknowledge_nothing(node: Node) -> None:
    conv, ann, bob = await pair(node)
    stored = await ann.sent(conv)
    await bob.expect("msg")
    good = stored["id"]
    for wrong in (
        {"conv": conv, "ids": good},
        {"conv": conv, "ids": [good, 1]},
        {"conv": conv, "ids": [good, {"$ne": None}]},
        {"conv": conv, "ids": {"$in": [good]}},
        {"conv": conv, "ids": [good, "x"]},
        {"conv": {"$ne": None}, "ids": [good]},
        {"conv": conv},
        {"ids": [good]},
        {"conv": conv, "ids": [good], "all": True},
        {"conv": conv, "ids": None},
    ):
        await bob.put({"t": "ack", "ref": "w", **wrong})
        assert (await bob.expect("error", ref="w"))["code"] == "bad_request", wrong
    document = await node.db.messages.find_one({"id": good})
    assert document["awaiting"] == ["bob/phone"]
