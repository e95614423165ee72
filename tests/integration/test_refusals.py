"""Who may write to whom, and add whom: blocks, preferences, closed groups, and devices that a message was not sealed for."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.support.device import WireDevice, new_id
from tests.support.node import Node
from tests.support.waiting import arriving


async def ask(
    node: Node, user: str, method: str, path: str, body: Any = None, device: str = "phone"
) -> tuple[int, Any]:
    return await node.request(method, path, user, device, body)


async def block(node: Node, user: str, whom: str, *, blocked: bool = True) -> None:
    assert (await ask(node, user, "PATCH", f"/v1/contacts/{whom}", {"blocked": blocked}))[0] == 200


async def prefer(node: Node, user: str, **preferences: str) -> None:
    status, found = await ask(node, user, "PATCH", "/v1/me", {"preferences": preferences})
    assert status == 200, found


async def awaiting(node: Node, message: str) -> list[str]:
    found = await node.db.messages.find_one({"id": message})
    return [] if found is None else sorted(found["awaiting"])


async def refusal(device: WireDevice, conv: str, **fields: Any) -> str:
    """The code with which a message is refused."""
    message = await device.send(conv, **fields)
    return str((await device.expect("error", id=message))["code"])


async def status_of(device: WireDevice, conv: str, message: str) -> dict[str, Any]:
    await device.put({"t": "status", "conv": conv, "ids": [message]})
    (item,) = (await device.expect("status", conv=conv))["items"]
    return {name: value for name, value in item.items() if name != "id"}


# Blocks


async def test_a_blocked_persons_message_waits_for_nobody_and_looks_undelivered(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, tablet = await node.connect("ann"), await node.connect("ann", "tablet")
    bob = await node.connect("bob")
    before = await ann.sent(conv, "before")
    assert (await bob.expect("msg"))["id"] == before["id"]
    await bob.ack(conv, before["id"])
    await tablet.ack(conv, before["id"])
    await block(node, "bob", "ann")
    message = await ann.sent(conv, "blocked")
    assert await awaiting(node, message["id"]) == ["ann/tablet", "bob/!"]
    assert (await tablet.expect("msg", id=message["id"]))["body"] == "blocked"
    await tablet.ack(conv, message["id"])
    await bob.nothing("msg", 0.2)
    watch = await node.connect("bob", "watch")
    await watch.nothing("msg", 0.1)
    for device in ("phone", "watch"):
        for path in ("/v1/sync", f"/v1/conversations/{conv}/messages"):
            _, page = await ask(node, "bob", "GET", path, device=device)
            assert page.get("messages", page.get("items")) == [], path
    # An acknowledgement of what one did not get is none.
    await bob.ack(conv, message["id"])
    assert await awaiting(node, message["id"]) == ["bob/!"]
    assert await status_of(ann, conv, message["id"]) == {"awaiting": 1, "delivered": []}


async def test_a_block_looks_like_a_person_who_is_away(node: Node) -> None:
    """What the sender is told of a message to who blocks them, and to who was never here, is the same."""
    blocked, away = await node.direct("ann", "bob"), await node.direct("ann", "cleo")
    await node.connect("bob")
    await block(node, "bob", "ann")
    ann = await node.connect("ann")
    told = []
    for conv in (blocked, away):
        stored = await ann.sent(conv)
        told.append((set(stored), await status_of(ann, conv, stored["id"])))
    assert told[0] == told[1]


async def test_after_unblocking_what_was_blocked_does_not_come_and_what_is_new_does(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await block(node, "bob", "ann")
    lost = await ann.sent(conv, "lost")
    await block(node, "bob", "ann", blocked=False)
    later = await ann.sent(conv, "later")
    found = await bob.expect("msg")
    assert found["id"] == later["id"]
    await bob.ack(conv, later["id"])
    again = await node.connect("bob")
    assert await arriving(again, "msg", 0.2) == []
    tablet = await node.connect("bob", "tablet")
    assert await arriving(tablet, "msg", 0.2) == []
    assert await awaiting(node, lost["id"]) == ["bob/!"]


async def test_what_waits_for_who_blocked_expires(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await block(node, "bob", "ann")
    message = await ann.sent(conv, ttl=1)
    async with asyncio.timeout(10):
        while (await status_of(ann, conv, message["id"])).get("fate") != "expired":
            await asyncio.sleep(0.1)


async def test_who_blocks_cannot_write_to_whom_they_blocked(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    bob = await node.connect("bob")
    stored = await bob.sent(conv, "before")
    await block(node, "bob", "ann")
    assert await refusal(bob, conv) == "blocked"
    body = {"id": new_id(), "conv": conv, "kind": "text", "body": "x"}
    status, found = await ask(node, "bob", "POST", "/v1/messages", body)
    assert (status, found["error"]["code"]) == (403, "blocked")
    assert await bob.sent(conv, "before", id=stored["id"]) == stored, "what was stored is told again"
    await block(node, "bob", "ann", blocked=False)
    await bob.sent(conv, "after")


async def test_in_a_group_a_block_concerns_the_two_only(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    devices = {user: await node.connect(user) for user in ("ann", "bob", "cleo")}
    await block(node, "bob", "ann")
    of_ann = await devices["ann"].sent(conv, "ann's")
    assert await awaiting(node, of_ann["id"]) == ["bob/!", "cleo/phone"]
    of_bob = await devices["bob"].sent(conv, "bob's")
    assert await awaiting(node, of_bob["id"]) == ["ann/phone", "cleo/phone"]
    assert [one["body"] for one in await arriving(devices["cleo"], "msg", 0.2)] == ["ann's", "bob's"]
    assert await arriving(devices["bob"], "msg", 0.1) == []


async def test_who_was_removed_does_not_keep_messages_of_those_they_blocked_waiting(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    await block(node, "bob", "ann")
    message = await ann.sent(conv)
    assert (await ask(node, "ann", "DELETE", f"/v1/conversations/{conv}/members/bob"))[0] == 200
    assert await status_of(ann, conv, message["id"]) == {"gone": True, "fate": "released", "delivered": []}


# Preferences


async def test_who_takes_messages_from_contacts_only_is_left_alone_by_others(node: Node) -> None:
    before = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await ann.sent(before)
    await prefer(node, "bob", whoMayMessage="contacts")
    assert await refusal(ann, before) == "forbidden"
    status, found = await ask(
        node, "cleo", "POST", "/v1/conversations", {"type": "direct", "members": ["bob"]}
    )
    assert (status, found["error"]["code"], found["error"]["details"]) == (
        403,
        "forbidden",
        {"users": ["bob"]},
    )
    assert await node.direct("ann", "bob") == before, "what exists is found; writing is what is refused"
    assert await refusal(ann, before) == "forbidden"
    await ask(node, "bob", "POST", "/v1/contacts", {"user": "ann"})
    await ann.sent(before)
    assert await node.direct("ann", "bob") == before
    bob = await node.connect("bob")
    await bob.sent(before, "to somebody who takes messages from anyone")
    assert (await ask(node, "bob", "DELETE", "/v1/contacts/ann"))[0] == 200
    assert await refusal(ann, before) == "forbidden"
    await prefer(node, "bob", whoMayMessage="anyone")
    await ann.sent(before)


async def test_who_may_be_added_by_contacts_only_is_not_added_by_others(node: Node) -> None:
    conv = await node.group("ann", ["cleo"])
    await prefer(node, "bob", whoMayAdd="contacts")
    add = f"/v1/conversations/{conv}/members"
    for path, body in (
        ("/v1/conversations", {"type": "group", "members": ["cleo", "bob"]}),
        (add, {"users": ["dan", "bob"]}),
    ):
        status, found = await ask(node, "ann", "POST", path, body)
        assert (status, found["error"]["code"], found["error"]["details"]) == (
            403,
            "forbidden",
            {"users": ["bob"]},
        )
    assert await node.db.memberships.count_documents({"user": {"$in": ["bob", "dan"]}}) == 0
    await ask(node, "bob", "POST", "/v1/contacts", {"user": "ann"})
    assert (await ask(node, "ann", "POST", add, {"users": ["dan", "bob"]}))[0] == 200
    assert (await ask(node, "ann", "POST", "/v1/conversations", {"type": "group", "members": ["bob"]}))[
        0
    ] == 201
    await node.direct("dan", "bob")


async def test_nobody_is_added_to_a_group_by_whom_they_blocked(node: Node) -> None:
    conv = await node.group("ann", ["cleo"])
    await ask(node, "bob", "GET", "/v1/me")
    await block(node, "bob", "ann")
    status, found = await ask(node, "ann", "POST", f"/v1/conversations/{conv}/members", {"users": ["bob"]})
    assert (status, found["error"]["code"]) == (403, "forbidden")
    assert (await ask(node, "ann", "POST", "/v1/conversations", {"type": "group", "members": ["bob"]}))[
        0
    ] == 403


async def test_in_a_closed_group_only_admins_and_moderators_write(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    devices = {user: await node.connect(user) for user in ("ann", "bob", "cleo")}
    await ask(node, "ann", "PATCH", f"/v1/conversations/{conv}/members/cleo", {"role": "moderator"})
    kept = await devices["bob"].sent(conv, "before")
    path = f"/v1/conversations/{conv}"
    assert (await ask(node, "cleo", "PATCH", path, {"settings": {"whoMayPost": "moderators"}}))[0] == 200
    assert await refusal(devices["bob"], conv) == "forbidden"
    assert await devices["bob"].sent(conv, "before", id=kept["id"]) == kept
    for user in ("ann", "cleo"):
        await devices[user].sent(conv)
    await ask(node, "ann", "PATCH", f"{path}/members/cleo", {"role": "member"})
    assert await refusal(devices["cleo"], conv) == "forbidden"
    await ask(node, "ann", "PATCH", path, {"settings": {"whoMayPost": "members"}})
    for user in ("bob", "cleo"):
        await devices[user].sent(conv)


# Sealed for whom


async def known(node: Node, user: str, conv: str) -> tuple[str, list[str]]:
    status, found = await ask(node, user, "GET", f"/v1/conversations/{conv}/devices")
    assert status == 200
    return found["devicesRev"], found["devices"]


async def mismatch(device: WireDevice, conv: str, **fields: Any) -> dict[str, Any]:
    message = await device.send(conv, None, **fields)
    error = await device.expect("error", id=message)
    assert error["code"] == "device_mismatch", error
    return {name: error[name] for name in ("missing", "extra", "stale", "devicesRev")}


def sealed(*keys: str) -> dict[str, str]:
    return dict.fromkeys(keys, "YQ==")


async def test_a_sealed_message_is_for_the_present_devices_exactly(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await node.connect("bob")
    rev, devices = await known(node, "ann", conv)
    assert devices == ["ann/phone", "bob/phone"]
    await ann.sent(conv, None, sealed=sealed("bob/phone"), devicesRev=rev)
    await node.connect("bob", "tablet")
    await node.connect("ann", "tablet")
    now, devices = await known(node, "ann", conv)
    assert now != rev
    expected = {"missing": ["ann/tablet", "bob/tablet"], "extra": [], "stale": [], "devicesRev": now}
    assert await mismatch(ann, conv, sealed=sealed("bob/phone"), devicesRev=rev) == expected
    assert await mismatch(ann, conv, sealed=sealed("bob/phone")) == expected
    assert await mismatch(ann, conv, sealed=sealed("ann/tablet", "bob/phone", "bob/tablet", "bob/old")) == {
        **expected,
        "missing": [],
        "extra": ["bob/old"],
    }
    everyone = sealed("ann/tablet", "bob/phone", "bob/tablet")
    await ann.sent(conv, None, sealed=everyone, devicesRev=now)
    await ann.sent(conv, None, sealed=everyone)
    # A message with a sender key has no entry for each device, but was made for these.
    assert await mismatch(ann, conv, devicesRev=rev) == {**expected, "missing": []}
    await ann.sent(conv, "encrypted for all", devicesRev=now)


async def test_a_relinked_device_is_stale_until_it_was_fetched(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    keys: dict[str, Any] = {
        "identityKey": "aWQ=",
        "registrationId": 1,
        "signedPreKey": {"id": 1, "key": "a2V5", "signature": "c2ln"},
        "oneTimePreKeys": [],
    }
    assert (await ask(node, "bob", "PUT", "/v1/keys", keys))[0] == 200
    rev, _ = await known(node, "ann", conv)
    await ann.sent(conv, None, sealed=sealed("bob/phone"), devicesRev=rev)
    again = {**keys, "identityKey": "aWQy", "registrationId": 2}
    assert (await ask(node, "bob", "PUT", "/v1/keys", again))[0] == 200
    now, devices = await known(node, "ann", conv)
    assert (now != rev, devices) == (True, ["ann/phone", "bob/phone"])
    for fields in ({"sealed": sealed("bob/phone")}, {}):
        assert await mismatch(ann, conv, devicesRev=rev, **fields) == {
            "missing": [],
            "extra": [],
            "stale": ["bob/phone"],
            "devicesRev": now,
        }
    await ann.sent(conv, None, sealed=sealed("bob/phone"), devicesRev=now)
    assert bob.key == "bob/phone"


async def test_a_blocked_senders_list_of_devices_looks_unblocked(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    before = await known(node, "ann", conv)
    await block(node, "bob", "ann")
    assert await known(node, "ann", conv) == before
    rev, devices = before
    assert devices == ["ann/phone", "bob/phone"]
    message = await ann.sent(conv, None, sealed=sealed("bob/phone"), devicesRev=rev)
    assert await awaiting(node, message["id"]) == ["bob/!"]
    await node.connect("bob", "tablet")
    assert (await mismatch(ann, conv, sealed=sealed("bob/phone"), devicesRev=rev))["missing"] == [
        "bob/tablet"
    ]
    await bob.nothing("msg", 0.1)
