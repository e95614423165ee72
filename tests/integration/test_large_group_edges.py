"""Messages in parts, where they meet what else a person can do, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import zipfile
from typing import Any

import pytest

from relay.wire.ids import PARTS_KEY
from tests.support.device import Closed, WireDevice, new_id
from tests.support.node import Node, NodeFactory
from tests.support.waiting import until

PEOPLE = [f"p{number}" for number in range(8)]


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    """Messages to more than three devices are stored in parts: p0 to p2, p3 to p5, p6 and p7."""
    return await nodes.start(inline_recipients=3, sweep_seconds=0.5)


async def crowd(node: Node, *, announced: bool = False) -> tuple[str, WireDevice, dict[str, WireDevice]]:
    ann = await node.connect("ann")
    others = {user: await node.connect(user) for user in PEOPLE}
    for device in (ann, *others.values()):
        await device.expect("drained")
    return await node.group("ann", PEOPLE, announced=announced), ann, others


async def quiet(node: Node, user: str) -> None:
    wanted = {"preferences": {"deliveredReceipts": False}}
    assert (await node.request("PATCH", "/v1/me", user, "phone", wanted))[0] == 200


async def status(device: WireDevice, stored: dict[str, Any]) -> dict[str, Any]:
    ref = new_id()
    await device.put({"t": "status", "conv": stored["conv"], "ids": [stored["id"]], "ref": ref})
    found: dict[str, Any] = (await device.expect("status", ref=ref))["items"][0]
    return {name: value for name, value in found.items() if name != "id"}


async def balances(node: Node) -> None:
    async def holds() -> bool:
        found = [row async for row in node.db.messages.find({}, {"awaiting": 1})]
        waiting = sum(len([key for key in row["awaiting"] if key != PARTS_KEY]) for row in found)
        return node.relay.context.ledger.waiting == waiting

    await until(holds, 5, "the ledger balances")


async def test_who_acknowledged_quietly_is_awaited_also_when_their_part_has_ended(
    node: Node,
) -> None:
    for user in ("p3", "p0"):
        await quiet(node, user)
    conv, ann, others = await crowd(node)
    for device in others.values():
        await device.close()
    others = {user: await node.connect(user) for user in PEOPLE}
    stored = await ann.sent(conv)
    for user in ("p0", "p3", "p4", "p5"):
        await others[user].ack(conv, stored["id"])

    async def ended() -> bool:
        return bool(await node.db.messages.count_documents({"id": stored["id"]}) == 2)

    await until(ended, 5, "a part ends")
    assert await status(ann, stored) == {"awaiting": 6, "delivered": ["p4", "p5"]}


async def test_pages_of_a_conversation_hold_messages_in_parts_once(node: Node) -> None:
    conv, ann, others = await crowd(node)
    await others["p7"].close()
    sent = [(await ann.sent(conv, str(n)))["id"] for n in range(3)]
    for path in (f"/v1/conversations/{conv}/messages", "/v1/sync"):
        got, cursor = [], ""
        for _ in range(8):
            code, page = await node.request("GET", f"{path}?limit=1{cursor}", "p7", "phone")
            assert code == 200
            got += [one["id"] for one in page.get("messages", page.get("items"))]
            if page["next"] is None:
                break
            cursor = "&cursor=" + page["next"]
        assert got == sent


async def test_everybody_in_a_large_group_is_told_who_comes_and_goes(
    node: Node,
) -> None:
    conv, _, others = await crowd(node, announced=True)
    for device in others.values():
        created = await device.expect("msg")
        assert created["body"]["event"] == "created"
        await device.ack(conv, created["id"])
    members = f"/v1/conversations/{conv}/members"
    assert (await node.request("POST", members, "ann", "phone", {"users": ["zoe"]}))[0] == 200
    assert (await node.request("DELETE", f"{members}/p7", "ann", "phone"))[0] in (
        200,
        204,
    )
    for device in others.values():
        assert (await device.expect("msg"))["body"]["event"] == "added"
        removed = await device.expect("msg")
        assert (removed["body"]["event"], removed["body"]["users"]) == (
            "removed",
            ["p7"],
        )
    await balances(node)


async def test_who_is_removed_is_awaited_by_no_part(node: Node) -> None:
    conv, ann, others = await crowd(node)
    for device in others.values():
        await device.close()
    stored = await ann.sent(conv)
    for user in ("p7", "p1"):
        path = f"/v1/conversations/{conv}/members/{user}"
        assert (await node.request("DELETE", path, "ann", "phone"))[0] in (200, 204)

    async def released() -> bool:
        gone = {"$in": ["p7/phone", "p1/phone"]}
        return not await node.db.messages.count_documents({"id": stored["id"], "awaiting": gone})

    await until(released, 5, "released")
    assert await status(ann, stored) == {"awaiting": 6, "delivered": []}
    await balances(node)
    assert node.relay.context.ledger.count("released") == 2


async def test_a_sealed_message_in_parts_reaches_each_device_with_its_own_entry(
    node: Node,
) -> None:
    conv, ann, others = await crowd(node)
    code, known = await node.request("GET", f"/v1/conversations/{conv}/devices", "ann", "phone")
    assert code == 200
    sealed = {key: base64.b64encode(key.encode()).decode() for key in known["devices"] if key != "ann/phone"}
    await others["p6"].close()
    stored = await ann.sent(conv, None, sealed=sealed, devicesRev=known["devicesRev"])
    for user in PEOPLE:
        if user == "p6":
            others[user] = await node.connect(user)
        got = await others[user].expect("msg")
        assert got["sealed"] == sealed[f"{user}/phone"]
    rows = [row async for row in node.db.messages.find({"id": stored["id"]})]
    assert sorted(e["device"] for row in rows for e in row["sealed"]) == sorted(sealed)
    del sealed["p0/phone"]
    message = await ann.send(conv, None, sealed=sealed, devicesRev=known["devicesRev"])
    error = await ann.expect("error", id=message)
    assert (error["code"], error["missing"]) == ("device_mismatch", ["p0/phone"])


async def test_a_restart_opens_the_ledger_with_what_parts_hold(node: Node, nodes: NodeFactory) -> None:
    conv, ann, others = await crowd(node)
    await others["p7"].close()
    stored = await ann.sent(conv)
    await others["p0"].expect("msg", id=stored["id"])
    await others["p0"].ack(conv, stored["id"])
    await nodes.stop(node)
    again = await nodes.start(inline_recipients=3)
    assert again.relay.context.ledger.waiting == 7
    for user in PEOPLE[1:]:
        device = await again.connect(user)
        assert (await device.expect("msg"))["id"] == stored["id"]
        await device.ack(conv, stored["id"])
        assert (await device.expect("drained"))["count"] == 1
    assert again.relay.context.ledger.waiting == 0
    assert not await again.db.messages.count_documents({})


async def test_a_node_that_stops_with_parts_to_hand_out_loses_none(node: Node, nodes: NodeFactory) -> None:
    conv, ann, _ = await crowd(node)
    sent = [await ann.send(conv, str(number)) for number in range(60)]
    await ann.expect("stored", id=sent[0])
    stopping = asyncio.create_task(node.relay.stop())
    stored = [sent[0]]
    with contextlib.suppress(Closed):
        while True:
            one = await ann.next()
            if one["t"] == "stored":
                stored.append(one["id"])
    await stopping
    again = await nodes.start(inline_recipients=3)
    for user in PEOPLE:
        code, page = await again.request("GET", "/v1/sync", user, "phone")
        assert code == 200
        got = [one["id"] for one in page["messages"]]
        assert got[: len(stored)] == stored
        assert got == sent[: len(got)]


async def test_a_withdrawal_over_http_ends_every_part_and_names_nobody_who_was_quiet(
    node: Node,
) -> None:
    await quiet(node, "p3")
    conv, ann, others = await crowd(node)
    for device in others.values():
        await device.close()
    others = {user: await node.connect(user) for user in PEOPLE}
    stored = await ann.sent(conv)
    for user in ("p3", "p4", "p5", "p6"):
        await others[user].ack(conv, stored["id"])
    body = {
        "id": new_id(),
        "conv": conv,
        "kind": "withdrawn",
        "replyTo": stored["id"],
        "body": None,
    }
    assert (await node.request("POST", "/v1/messages", "ann", "phone", body))[0] == 201

    async def gone() -> bool:
        return not await node.db.messages.count_documents({"id": stored["id"]})

    await until(gone, 5, "gone")
    told = await status(ann, stored)
    assert told == {"gone": True, "fate": "withdrawn", "delivered": ["p4", "p5", "p6"]}
    for user in PEOPLE:
        got = await others[user].expect("msg", kind="withdrawn")
        await others[user].ack(conv, got["id"])
    await balances(node)


async def exported(node: Node, user: str, name: str) -> list[dict[str, Any]]:
    async with node.http.get(node.url + "/v1/me/export", headers=node.headers(user, "phone")) as response:
        archive = zipfile.ZipFile(io.BytesIO(await response.read()))
    found: list[dict[str, Any]] = json.loads(archive.read(f"relay-export/{name}.json"))
    return found


async def test_an_export_tells_of_a_message_in_parts_once_and_an_erasure_leaves_no_name_in_any(
    node: Node,
) -> None:
    await quiet(node, "p4")
    conv, ann, others = await crowd(node)
    tablet = await node.connect("p3", "tablet")
    stored = await ann.sent(conv)
    # p3's two devices and p4 are a part.
    for user in ("p3", "p4"):
        await others[user].ack(conv, stored["id"])
    await tablet.expect("msg", id=stored["id"])
    (waiting,) = await exported(node, "p3", "waiting")
    assert (waiting["id"], waiting["mailbox"]) == (stored["id"], "p3/tablet")
    (received,) = await exported(node, "p3", "received")
    assert [one["device"] for one in received["deliveredTo"]] == ["phone"]
    await tablet.ack(conv, stored["id"])
    (sent,) = await exported(node, "ann", "sent")
    assert (sent["id"], sent["awaiting"]) == (
        stored["id"],
        (await status(ann, stored))["awaiting"],
    )
    assert sent["awaiting"] == 7
    assert (await node.request("DELETE", "/v1/me", "p6", "phone"))[0] in (200, 204)
    async for row in node.db.messages.find({}):
        assert not any(key.startswith("p6/") for key in row["awaiting"])
        assert "p6" not in [one["user"] for one in row.get("deliveredTo", ())]
    await balances(node)
