"""Receipts, read cursors and typing over real sockets: who is told what, how often, and who is not."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
import time
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from relay.client import Device, Event, Live, Presence, ReadCursor, Typing
from relay.routing import typing as typing_module
from relay.session.connection import Connection
from tests.support.device import WireDevice, new_id
from tests.support.node import Node
from tests.support.waiting import arriving, exactly, until


async def prefer(node: Node, user: str, device: str = "phone", **preferences: bool) -> None:
    status, _ = await node.request("PATCH", "/v1/me", user, device, {"preferences": preferences})
    assert status == 200


async def status_of(device: WireDevice, conv: str, message: str) -> dict[str, Any]:
    await device.put({"t": "status", "conv": conv, "ids": [message]})
    found: dict[str, Any] = (await device.expect("status"))["items"][0]
    return found


async def reads(device: WireDevice, count: int = 0) -> list[tuple[str, str, int]]:
    found = await exactly(device, "read", count, 0.5)
    return [(one["conv"], one["user"], one["upTo"]) for one in found]


async def far_group(node: Node, members: int) -> str:
    """A group of so many, of whom only the first exist as devices."""
    return await node.group("ann", ["bob", *(f"m{number}" for number in range(members - 2))])


# -- receipts


async def test_ten_thousand_acknowledgements_of_one_device_come_as_a_handful_of_frames(node: Node) -> None:
    ann, bob = await node.connect("ann"), await node.connect("bob")
    conv = await node.direct("ann", "bob")
    await bob.close()
    ids = [new_id() for _ in range(10_000)]
    for start in range(0, len(ids), 250):
        part = ids[start : start + 250]
        await ann.put(*({"t": "send", "id": one, "conv": conv, "kind": "text", "body": "x"} for one in part))
    for _ in ids:
        await ann.expect("stored", 20)
    began = time.monotonic()
    for start in range(0, len(ids), 1000):
        status, _ = await node.request(
            "POST", "/v1/acks", "bob", "phone", {"acks": [{"conv": conv, "ids": ids[start : start + 1000]}]}
        )
        assert status == 200
    took = time.monotonic() - began
    told = await arriving(ann, "receipt")
    assert sorted(one for frame in told for one in frame["ids"]) == sorted(ids)
    assert len(told) <= 12 + took / 0.1
    assert len(told) <= 60


async def test_with_delivered_receipts_off_nobody_else_learns_of_the_delivery(node: Node) -> None:
    ann, bob, cleo = [await node.connect(user) for user in ("ann", "bob", "cleo")]
    tablet = await node.connect("bob", "tablet")
    conv = await node.group("ann", ["bob", "cleo"])
    await prefer(node, "bob", deliveredReceipts=False)
    message = (await ann.sent(conv))["id"]
    await bob.expect("msg", id=message)
    await bob.ack(conv, message)
    await ann.nothing("receipt")
    assert await status_of(ann, conv, message) == {"id": message, "awaiting": 2, "delivered": []}
    await cleo.ack(conv, message)
    assert (await ann.expect("receipt"))["by"]["user"] == "cleo"
    assert await status_of(ann, conv, message) == {"id": message, "awaiting": 1, "delivered": ["cleo"]}
    await tablet.ack(conv, message)
    await ann.nothing("receipt")
    gone = await status_of(ann, conv, message)
    assert gone == {"id": message, "gone": True, "fate": "delivered", "delivered": ["cleo"]}


async def test_an_export_does_not_tell_it_either(node: Node) -> None:
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await node.connect("bob", "tablet")
    conv = await node.direct("ann", "bob")
    await prefer(node, "bob", deliveredReceipts=False)
    message = (await ann.sent(conv))["id"]
    await bob.ack(conv, message)
    async with node.http.get(node.url + "/v1/me/export", headers=node.headers("ann", "phone")) as response:
        archive = zipfile.ZipFile(io.BytesIO(await response.read()))
    (sent,) = json.loads(archive.read("relay-export/sent.json"))
    assert (sent["id"], sent["awaiting"]) == (message, 1)


async def test_it_is_honoured_on_every_way_of_acknowledging_and_from_the_next_one_on(node: Node) -> None:
    ann, bob = await node.connect("ann"), await node.connect("bob")
    conv = await node.direct("ann", "bob")
    await prefer(node, "bob", deliveredReceipts=False)
    over_http, live, after_reconnect, on_again = [(await ann.sent(conv))["id"] for _ in range(4)]
    status, _ = await node.request(
        "POST", "/v1/acks", "bob", "phone", {"acks": [{"conv": conv, "ids": [over_http]}]}
    )
    assert status == 200
    await bob.ack(conv, live)
    bob = await node.connect("bob")
    await bob.ack(conv, after_reconnect)
    await ann.nothing("receipt")
    for message in (over_http, live, after_reconnect):
        assert (await status_of(ann, conv, message))["delivered"] == []
    await prefer(node, "bob", deliveredReceipts=True)
    await bob.ack(conv, on_again)
    assert (await ann.expect("receipt"))["ids"] == [on_again]
    assert (await status_of(ann, conv, on_again))["delivered"] == ["bob"]


async def test_own_other_devices_are_told_all_the_same(node: Node) -> None:
    phone, tablet = await node.connect("ann", "phone"), await node.connect("ann", "tablet")
    conv = await node.direct("ann", "bob")
    await prefer(node, "ann", deliveredReceipts=False)
    message = (await phone.sent(conv))["id"]
    await tablet.ack(conv, message)
    assert (await phone.expect("receipt"))["by"] == {"user": "ann", "device": "tablet"}
    await tablet.nothing("receipt")


# -- reading


async def test_reading_is_kept_and_told_to_the_members_and_own_other_devices(node: Node) -> None:
    ann, tablet, bob, eve = [
        await node.connect(*name) for name in (("ann", "phone"), ("ann", "tablet"), ("bob",), ("eve",))
    ]
    conv = await node.direct("ann", "bob")
    before = int(time.time() * 1000)
    await ann.put({"t": "read", "conv": conv, "upTo": 7, "ref": "r"})
    await ann.expect("done", ref="r")
    row = await node.db.memberships.find_one({"_id": f"{conv} ann"})
    assert row["readUpTo"] == 7, "done says that it is durable"
    for device in (tablet, bob):
        found = await device.expect("read")
        assert (found["conv"], found["user"], found["upTo"]) == (conv, "ann", 7)
        assert before - 5 <= found["at"] <= time.time() * 1000 + 5
    assert await reads(ann) == await reads(eve) == []


async def test_hundreds_of_marks_are_few_writes_and_few_frames(node: Node) -> None:
    ann, bob = await node.connect("ann"), await node.connect("bob")
    conv = await node.direct("ann", "bob")
    for start in range(0, 1000, 200):
        await ann.put(*({"t": "read", "conv": conv, "upTo": one} for one in range(start, start + 200)))
    found = await reads(bob)
    assert found[-1] == (conv, "ann", 999)
    assert len(found) <= 6
    assert [one[2] for one in found] == sorted(one[2] for one in found)


async def test_a_cursor_never_moves_back_and_standing_still_is_not_told(node: Node) -> None:
    ann, bob = await node.connect("ann"), await node.connect("bob")
    conv = await node.direct("ann", "bob")
    for up_to in (9, 3, 9):
        await ann.put({"t": "read", "conv": conv, "upTo": up_to, "ref": str(up_to)})
        await ann.expect("done", ref=str(up_to))
    assert await reads(bob, 1) == [(conv, "ann", 9)]


async def test_marks_over_http_are_told_in_the_same_way(node: Node) -> None:
    ann, tablet, bob = [await node.connect(*name) for name in (("ann",), ("ann", "tablet"), ("bob",))]
    conv = await node.direct("ann", "bob")
    body = {"acks": [], "reads": [{"conv": conv, "upTo": 5}, {"conv": new_id(), "upTo": 5}]}
    assert (await node.request("POST", "/v1/acks", "ann", "phone", body))[0] == 200
    assert await reads(bob, 1) == await reads(tablet, 1) == [(conv, "ann", 5)]
    assert await reads(ann) == []


async def test_marks_that_make_no_sense_are_refused_alone(node: Node) -> None:
    ann, eve, bob = [await node.connect(user) for user in ("ann", "eve", "bob")]
    conv = await node.direct("ann", "bob")
    ahead = (int(time.time() * 1000) + 3 * 3_600_000) << 10
    await eve.put({"t": "read", "conv": conv, "upTo": 5, "ref": "other's"})
    assert (await eve.expect("error", ref="other's"))["code"] == "not_member"
    await eve.put({"t": "read", "conv": "nowhere", "upTo": 5})
    assert (await eve.expect("error", conv="nowhere"))["code"] == "not_member"
    wrong: list[Any] = [-1, 1 << 53, "5", 5.5, None, ahead]
    await ann.put(
        *({"t": "read", "conv": conv, "upTo": value, "ref": str(n)} for n, value in enumerate(wrong)),
        {"t": "read", "conv": conv, "ref": "absent"},
        {"t": "read", "conv": conv, "upTo": 1, "ref": "right"},
    )
    for number in range(len(wrong)):
        assert (await ann.expect("error", ref=str(number)))["code"] == "bad_request", wrong[number]
    assert (await ann.expect("error", ref="absent"))["code"] == "bad_request"
    await ann.expect("done", ref="right")
    assert await reads(bob, 1) == [(conv, "ann", 1)]


async def test_in_a_large_group_only_own_devices_are_told(node: Node) -> None:
    ann, tablet, bob = [await node.connect(*name) for name in (("ann",), ("ann", "tablet"), ("bob",))]
    small, large = await far_group(node, 256), await far_group(node, 257)
    for conv in (small, large):
        await ann.put({"t": "read", "conv": conv, "upTo": 5})
        assert await reads(tablet, 1) == [(conv, "ann", 5)]
    assert await reads(bob, 1) == [(small, "ann", 5)]


async def test_with_read_receipts_off_nobody_else_sees_the_cursor(node: Node) -> None:
    ann, tablet, bob = [await node.connect(*name) for name in (("ann",), ("ann", "tablet"), ("bob",))]
    conv = await node.direct("ann", "bob")
    await prefer(node, "ann", readReceipts=False)
    await ann.put({"t": "read", "conv": conv, "upTo": 5})
    assert await reads(tablet, 1) == [(conv, "ann", 5)]
    assert await reads(bob) == []
    for user, seen in (("ann", [5]), ("bob", [])):
        _, found = await node.request("GET", "/v1/changes", user, "phone")
        assert [one["upTo"] for one in found["reads"]] == seen
    await prefer(node, "ann", readReceipts=True)
    _, found = await node.request("GET", "/v1/changes", "bob", "phone")
    assert [one["upTo"] for one in found["reads"]] == [5]


@pytest.mark.parametrize(("who", "whom"), [("ann", "bob"), ("bob", "ann")])
async def test_cursors_are_not_told_between_people_one_of_whom_has_blocked_the_other(
    node: Node, who: str, whom: str
) -> None:
    ann, bob, cleo = [await node.connect(name) for name in ("ann", "bob", "cleo")]
    conv = await node.group("ann", ["bob", "cleo"])
    assert (await node.request("POST", "/v1/contacts", who, "phone", {"user": whom}))[0] in (200, 201)
    assert (await node.request("PATCH", f"/v1/contacts/{whom}", who, "phone", {"blocked": True}))[0] == 200
    await ann.put({"t": "read", "conv": conv, "upTo": 5})
    assert await reads(cleo, 1) == [(conv, "ann", 5)]
    assert await reads(bob) == []
    for user, seen in (("ann", [5]), ("bob", []), ("cleo", [5])):
        _, found = await node.request("GET", "/v1/changes", user, "phone")
        assert [one["upTo"] for one in found["reads"]] == seen
    await bob.expect("drained")
    await bob.close()
    await backdate(node, "bob/phone", 600)
    assert await reads(await node.connect("bob")) == []


async def backdate(node: Node, key: str, seconds: float) -> None:
    """The device was last connected so long ago, as far as is noted."""
    ctx = node.relay.context

    async def noted() -> bool:
        return ctx.hub.get(key) is None

    await until(noted, 3, "the device has left")
    ctx.hub.left.pop(key, None)
    moment = datetime.now(UTC) - timedelta(seconds=seconds)
    await node.db.devices.update_one({"_id": key}, {"$set": {"liveAt": moment}})


async def test_a_device_that_returns_is_told_what_was_read_meanwhile_and_only_that(node: Node) -> None:
    ann, bob = await node.connect("ann"), await node.connect("bob")
    one, two, private = [await node.group("ann", ["bob", user]) for user in ("cleo", "dan", "eve")]
    large = await far_group(node, 257)
    old = datetime.now(UTC) - timedelta(hours=1)
    await bob.expect("drained")
    await bob.close()
    await backdate(node, "bob/phone", 600)
    await prefer(node, "eve", readReceipts=False)
    for conv, user, up_to in (
        (two, "ann", 3),
        (one, "cleo", 4),
        (one, "bob", 5),
        (private, "eve", 6),
        (large, "ann", 7),
        (large, "bob", 8),
    ):
        body = {"acks": [], "reads": [{"conv": conv, "upTo": up_to}]}
        # Asking over HTTP meanwhile is no connection that was told.
        assert (await node.request("POST", "/v1/acks", user, "phone", body))[0] == 200
    await node.db.memberships.update_one({"_id": f"{two} ann"}, {"$set": {"readAt": old}})
    bob = await node.connect("bob")
    frames: list[str] = []
    while len(frames) < 4:
        frames.append((await bob.next())["t"])
    assert frames == ["drained", "read", "read", "read"]
    bob = await node.connect("bob")
    assert sorted(await reads(bob, 3)) == sorted([(one, "cleo", 4), (one, "bob", 5), (large, "bob", 8)]), (
        "what was told within the margin is told again"
    )
    await bob.close()
    await backdate(node, "bob/phone", -60)
    assert await reads(await node.connect("bob")) == []
    await ann.close()


@pytest.mark.parametrize("how", ["silent", "reset"])
async def test_what_was_told_into_a_dead_socket_is_told_again_when_the_device_returns(
    node: Node, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    # The kernel knows that this socket was heard from a moment ago.
    monkeypatch.setattr(Connection, "listen", lambda *_: None)
    await node.connect("ann")
    bob = await node.connect("bob")
    conv = await node.direct("ann", "bob")
    await bob.expect("drained")
    ctx = node.relay.context
    connection = ctx.hub.get("bob/phone")
    assert connection is not None
    body = {"acks": [], "reads": [{"conv": conv, "upTo": 5}]}
    assert (await node.request("POST", "/v1/acks", "ann", "phone", body))[0] == 200
    await bob.expect("read")
    # That was half a minute ago, and the device, which has had nothing for longer, does not answer the ping.
    then = datetime.now(UTC)
    await node.db.devices.update_one({"_id": "bob/phone"}, {"$set": {"liveAt": then - timedelta(seconds=90)}})
    await node.db.memberships.update_one(
        {"_id": f"{conv} ann"}, {"$set": {"readAt": then - timedelta(seconds=30)}}
    )
    connection.pinged = True
    connection.heard -= 45 if how == "reset" else 55
    if how == "reset":
        transport = bob.socket.get_extra_info("socket")
        transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert bob.socket._response.connection is not None
        assert bob.socket._response.connection.transport is not None
        bob.socket._response.connection.transport.abort()

    async def noted() -> bool:
        device = await node.db.devices.find_one({"_id": "bob/phone"})
        return bool(device["liveAt"] > then - timedelta(seconds=89))

    await until(noted, 20, "that the device has left is noted")
    assert await reads(await node.connect("bob"), 1) == [(conv, "ann", 5)]


async def test_a_new_device_is_told_nothing_of_the_past(node: Node) -> None:
    await node.connect("ann")
    tablet = await node.connect("ann", "tablet")
    conv = await node.direct("ann", "bob")
    body = {"acks": [], "reads": [{"conv": conv, "upTo": 5}]}
    assert (await node.request("POST", "/v1/acks", "ann", "phone", body))[0] == 200
    await tablet.expect("read")
    bob = await node.connect("bob")
    assert await reads(bob) == []


# -- typing


async def typed(device: WireDevice, count: int = 0) -> list[tuple[str, bool]]:
    return [(one["user"], one["on"]) for one in await exactly(device, "typing", count)]


async def test_typing_is_told_to_the_other_members_until_it_ends(node: Node) -> None:
    ann, tablet, bob, eve = [
        await node.connect(*name) for name in (("ann",), ("ann", "tablet"), ("bob",), ("eve",))
    ]
    conv = await node.direct("ann", "bob")
    for on in (True, True, False, False):
        await ann.put({"t": "typing", "conv": conv, "on": on})
    assert await typed(bob, 2) == [("ann", True), ("ann", False)]
    for device in (ann, tablet, eve):
        assert await typed(device) == []
    assert await node.db.messages.count_documents({}) == 0


async def test_typing_ends_with_a_message_and_with_the_connection(node: Node) -> None:
    ann, bob = await node.connect("ann"), await node.connect("bob")
    conv = await node.direct("ann", "bob")
    await ann.put({"t": "typing", "conv": conv, "on": True})
    await ann.sent(conv)
    assert await typed(bob, 2) == [("ann", True), ("ann", False)]
    await ann.put({"t": "typing", "conv": conv, "on": True})
    await bob.expect("typing", on=True)
    body = {"id": new_id(), "conv": conv, "kind": "text", "body": "over HTTP"}
    assert (await node.request("POST", "/v1/messages", "ann", "phone", body))[0] == 201
    assert await typed(bob, 1) == [("ann", False)]
    await ann.put({"t": "typing", "conv": conv, "on": True})
    assert await typed(bob, 1) == [("ann", True)]
    await ann.close()
    assert await typed(bob, 1) == [("ann", False)]
    ann = await node.connect("ann")
    await ann.put({"t": "typing", "conv": conv, "on": True})
    await bob.expect("typing", on=True)
    # Another connection of the device takes over.
    await node.connect("ann")
    await bob.expect("typing", on=False)


async def test_typing_is_over_by_itself(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert typing_module.LASTS_SECONDS == 10
    monkeypatch.setattr(node.relay.context.live.typing, "_lasts", 0.5)
    ann, bob = await node.connect("ann"), await node.connect("bob")
    conv = await node.direct("ann", "bob")
    await ann.put({"t": "typing", "conv": conv, "on": True})
    await bob.expect("typing", on=True)
    assert (await bob.expect("typing", 2))["on"] is False


async def test_blocks_hide_typing_in_groups_and_stop_it_in_direct_talks(node: Node) -> None:
    ann, bob, cleo = [await node.connect(user) for user in ("ann", "bob", "cleo")]
    group = await node.group("ann", ["bob", "cleo"])
    direct = await node.direct("ann", "bob")
    assert (await node.request("PATCH", "/v1/contacts/ann", "bob", "phone", {"blocked": True}))[0] == 200
    for conv in (group, direct):
        await ann.put({"t": "typing", "conv": conv, "on": True})
    assert await typed(bob) == []
    assert await typed(cleo, 1) == [("ann", True)]
    await ann.nothing("error")
    await bob.put({"t": "typing", "conv": group, "on": True})
    await bob.put({"t": "typing", "conv": direct, "on": True, "ref": "d"})
    assert (await bob.expect("error", ref="d"))["code"] == "blocked"
    assert await typed(ann) == []


async def test_typing_elsewhere_or_too_often_is_refused_and_harms_nobody(node: Node) -> None:
    ann, eve, bob = [await node.connect(user) for user in ("ann", "eve", "bob")]
    conv, large = await node.direct("ann", "bob"), await far_group(node, 257)
    await eve.put({"t": "typing", "conv": conv, "on": True, "ref": "1"})
    await eve.put({"t": "typing", "conv": new_id(), "on": True, "ref": "2"})
    await eve.put({"t": "typing", "conv": conv, "on": "yes", "ref": "3"})
    codes = [(await eve.expect("error", ref=ref))["code"] for ref in "123"]
    assert codes == ["not_member", "not_member", "bad_request"]
    await ann.put({"t": "typing", "conv": large, "on": True})
    assert await typed(bob) == []
    for _ in range(10):
        await ann.put(*({"t": "typing", "conv": conv, "on": bool(n % 2)} for n in range(200)))
    error = await ann.expect("error")
    assert (error["code"], error["retry"]) == ("rate_limited", True)
    assert error["retryAfter"] > 0
    assert len(await typed(bob)) <= 40
    await ann.sent(conv)


# -- the device SDK


async def test_devices_of_the_sdk_read_type_and_watch(node: Node, tmp_path: Path) -> None:
    conv = await node.direct("ann", "bob")
    told: list[Event] = []
    ann = Device(node.url, tmp_path / "ann", lambda: node.token("ann", "sdk"), on_event=told.append)
    bob = Device(node.url, tmp_path / "bob", lambda: node.token("bob", "sdk"))
    async with ann, bob:
        await ann.drained()
        await bob.drained()
        await ann.watch(["bob", "nobody"])
        await bob.typing(conv)
        await bob.read(conv, 7)

        async def complete() -> bool:
            return {type(event) for event in told} >= {Typing, ReadCursor, Presence}

        await until(complete, 5, "every event has come")
    assert next(event for event in told if isinstance(event, Typing)) == Typing(conv, "bob", True)
    (cursor,) = [event for event in told if isinstance(event, ReadCursor)]
    assert (cursor.conv, cursor.user, cursor.up_to) == (conv, "bob", 7)
    seen = {event.user: event.online for event in told if isinstance(event, Presence)}
    assert seen == {"bob": True, "nobody": False}
    assert [event for event in told if isinstance(event, Live)] == []


async def test_a_node_that_stops_tells_what_is_pending_first(node: Node) -> None:
    ann, bob = await node.connect("ann"), await node.connect("bob")
    conv = await node.direct("ann", "bob")
    messages = [(await ann.sent(conv))["id"] for _ in range(3)]
    await bob.put(*({"t": "ack", "conv": conv, "ids": [one]} for one in messages))
    await bob.put({"t": "read", "conv": conv, "upTo": 5})
    await bob.put({"t": "ping"})
    await bob.expect("pong")
    stopping = asyncio.create_task(node.relay.stop())
    told = await arriving(ann, "receipt", 2)
    await stopping
    assert sorted(one for frame in told for one in frame["ids"]) == sorted(messages)
    row = await node.db.memberships.find_one({"_id": f"{conv} bob"})
    assert row["readUpTo"] == 5
