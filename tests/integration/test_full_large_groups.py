"""Groups of more devices than fit into one stored message, in which some are full, over real sockets."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from relay.wire.ids import PARTS_KEY
from tests.support.device import WireDevice, new_id
from tests.support.node import Node, NodeFactory
from tests.support.waiting import until

QUOTA = 2
PEOPLE = [f"p{number}" for number in range(8)]


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    """Messages to more than three devices are stored in parts."""
    node = await nodes.start(inline_recipients=3, mailbox_messages=QUOTA, sweep_seconds=0.5)
    node.relay.context.quotas.lease = 0
    return node


async def crowd(node: Node, full: Sequence[str]) -> tuple[str, WireDevice, list[WireDevice]]:
    """A group, ann of it, and those who are not full. The full are away."""
    conv = await node.group("ann", PEOPLE)
    ann = await node.connect("ann")
    others = {user: await node.connect(user) for user in PEOPLE}
    for device in others.values():
        await device.expect("drained")
    for user in full:
        device = others.pop(user)
        await device.close()
        await until(lambda device=device: _gone(node, device), 3, "it is away")  # type: ignore[misc]
    for _ in range(QUOTA):
        stored = await ann.sent(conv)
        for device in others.values():
            await device.expect("msg", id=stored["id"])
            await device.ack(conv, stored["id"])
    await node.relay.context.quotas.run()
    latched = [row["_id"] async for row in node.db.devices.find({"fullSince": {"$exists": True}})]
    assert sorted(latched) == sorted(f"{user}/phone" for user in full)
    return conv, ann, list(others.values())


async def _gone(node: Node, device: WireDevice) -> bool:
    return node.relay.context.hub.get(device.key) is None


async def status(device: WireDevice, stored: dict[str, Any]) -> dict[str, Any]:
    ref = new_id()
    await device.put({"t": "status", "conv": stored["conv"], "ids": [stored["id"]], "ref": ref})
    found: dict[str, Any] = (await device.expect("status", ref=ref))["items"][0]
    return {name: value for name, value in found.items() if name != "id"}


async def is_gone(node: Node, stored: dict[str, Any]) -> None:
    async def nothing() -> bool:
        return not await node.db.messages.count_documents({"id": stored["id"]})

    await until(nothing, 5, "the message is gone")


async def balances(node: Node, trimmed: int) -> None:
    async def holds() -> bool:
        found = [row async for row in node.db.messages.find({}, {"awaiting": 1})]
        waiting = sum(len([key for key in row["awaiting"] if key != PARTS_KEY]) for row in found)
        return node.relay.context.ledger.waiting == waiting

    await until(holds, 5, "the ledger balances")
    ledger = node.relay.context.ledger
    assert ledger.count("trimmed") == trimmed
    ended = sum(ledger.count(name) for name in ("acknowledged", "expired", "withdrawn", "released"))
    assert ledger.count("accepted") == ended + trimmed + ledger.waiting


@pytest.mark.parametrize(
    "full",
    [["p1", "p6"], ["p3", "p4", "p5"], PEOPLE[:3], PEOPLE[3:], PEOPLE[:7], PEOPLE],
    ids=["some", "all of one part", "all of the head", "all but the head", "all but one", "all"],
)
async def test_who_is_full_is_left_out_and_the_message_ends_with_the_others(
    node: Node, full: list[str]
) -> None:
    conv, ann, others = await crowd(node, full)
    names = sorted(device.user for device in others)
    stored = await ann.sent(conv, "not for the full")
    again = await ann.sent(conv, "not for the full", id=stored["id"], again=True)
    assert again["seq"] == stored["seq"]
    if others:
        found = [row async for row in node.db.messages.find({"id": stored["id"]}).sort("_id", 1)]
        waiting = [key for row in found for key in row["awaiting"] if key != PARTS_KEY]
        assert sorted(waiting) == [f"{user}/phone" for user in names]
        assert [row.get("trimmed") for row in found] == [len(full), *[None] * (len(found) - 1)]
        assert await status(ann, stored) == {"awaiting": len(others), "delivered": []}
        for device in others[:1]:
            assert (await device.expect("msg", id=stored["id"]))["seq"] == stored["seq"]
            await device.ack(conv, stored["id"])
    if len(others) > 1:

        async def told() -> bool:
            return await status(ann, stored) == {
                "awaiting": len(others) - 1,
                "delivered": [others[0].user],
            }

        await until(told, 5, "one has it")
        for device in others[1:]:
            await device.expect("msg", id=stored["id"])
            await device.ack(conv, stored["id"])
    await is_gone(node, stored)
    fate = "delivered" if others else "trimmed"
    assert await status(ann, stored) == {"gone": True, "fate": fate, "delivered": names}
    assert (await ann.sent(conv, id=stored["id"], again=True))["seq"] == stored["seq"]
    assert not await node.db.messages.count_documents({"id": stored["id"]})
    await balances(node, len(full))
    back = await node.connect(full[-1])
    assert back.welcome["gap"]["why"] == "full"
    for _ in range(QUOTA):
        message = await back.expect("msg")
        assert message["id"] != stored["id"]
        await back.ack(conv, message["id"])
    assert (await back.expect("drained"))["count"] == QUOTA
    await balances(node, len(full))


async def test_a_withdrawn_message_of_which_some_were_left_out_ends_in_all_its_parts(node: Node) -> None:
    conv, ann, others = await crowd(node, ["p1", "p6"])
    stored = await ann.sent(conv)
    withdrawal = new_id()
    await ann.put(
        {
            "t": "send",
            "id": withdrawal,
            "conv": conv,
            "kind": "withdrawn",
            "replyTo": stored["id"],
            "body": None,
        }
    )
    await ann.expect("stored", id=withdrawal)
    await is_gone(node, stored)
    assert (await status(ann, stored))["fate"] == "withdrawn"
    for device in others:
        await device.ack(conv, withdrawal)
    await balances(node, 4)


async def test_a_large_group_counts_those_who_are_full_and_takes_small_bodies_only_from_both_doors(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(
        inline_recipients=3,
        mailbox_messages=QUOTA,
        max_recipients=8,
        large_group=7,
        large_group_body_bytes=100,
    )
    node.relay.context.quotas.lease = 0
    conv, ann, _ = await crowd(node, ["p0", "p1"])
    message = await ann.send(conv, "x" * 101)
    assert (await ann.expect("error", id=message))["code"] == "too_large"
    body = {"id": new_id(), "conv": conv, "kind": "text", "body": "x" * 101}
    code, answer = await node.request("POST", "/v1/messages", "ann", "phone", body)
    assert (code, answer["error"]["code"]) == (413, "too_large")
    first = await ann.sent(conv, "x" * 100)
    added = {"users": ["one", "more"]}
    assert (await node.request("POST", f"/v1/conversations/{conv}/members", "ann", "phone", added))[0] == 200
    message = await ann.send(conv)
    refusal = await ann.expect("error", id=message)
    assert (refusal["code"], refusal["message"]) == (
        "too_large",
        "this conversation has 10 recipient devices, the limit is 8",
    )
    assert (await ann.sent(conv, "x" * 100, id=first["id"], again=True))["seq"] == first["seq"]


async def test_who_blocked_the_sender_and_has_no_room_for_it_looks_as_if_the_message_waited(
    node: Node,
) -> None:
    conv = await node.group("ann", PEOPLE)
    assert (await node.request("POST", "/v1/contacts", "p0", "phone", {"user": "ann"}))[0] == 201
    assert (await node.request("PATCH", "/v1/contacts/ann", "p0", "phone", {"blocked": True}))[0] == 200
    # One of the head, and one of a part.
    for user in ("p1", "p5"):
        wanted = {"preferences": {"deliveredReceipts": False}}
        assert (await node.request("PATCH", "/v1/me", user, "phone", wanted))[0] == 200
    now = datetime.now(UTC)
    await node.db.users.update_one({"_id": "p0"}, {"$set": {"full": {"blocked": now}}})
    node.relay.context.audiences.changed(user="p0")
    ann = await node.connect("ann")
    others = [await node.connect(user) for user in PEOPLE[1:]]
    stored = await ann.sent(conv)
    assert await status(ann, stored) == {"awaiting": 8, "delivered": []}
    for device in others:
        await device.expect("msg", id=stored["id"])
        await device.ack(conv, stored["id"])
    await is_gone(node, stored)
    told = await status(ann, stored)
    assert (told["delivered"], told.get("gone")) == (["p2", "p3", "p4", "p6", "p7"], None)
    # Who acknowledged quietly waits with them, as they do while a message really waits.
    assert told["awaiting"] == 3
    await balances(node, 1)
