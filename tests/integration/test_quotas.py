"""DESIGN 1.7 and 1.8: how many messages wait for one device, and what becomes of those that find no room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.client import Device, Gap
from relay.store.mailboxes import Count, Mailboxes
from tests.support.device import WireDevice
from tests.support.failpoints import failing
from tests.support.node import Node, NodeFactory
from tests.support.waiting import arriving, until

QUOTA = 6


async def start(nodes: NodeFactory, **settings: Any) -> Node:
    node = await nodes.start(**{"mailbox_messages": QUOTA, **settings})
    node.relay.context.quotas.lease = 0
    return node


@pytest.fixture
async def node(nodes: NodeFactory) -> AsyncIterator[Node]:
    node = await start(nodes)
    yield node
    await balances(node)


async def count(node: Node) -> None:
    """What was sent is counted now, not within a second."""
    await node.relay.context.quotas.run()


async def leave(node: Node, user: str, device: str = "phone") -> None:
    """Connects and disconnects: the device is known and away."""
    await gone(node, await node.connect(user, device))


async def gone(node: Node, device: WireDevice) -> None:
    await device.close()
    async with asyncio.timeout(3):
        while node.relay.context.hub.get(device.key) is not None:
            await asyncio.sleep(0.01)


async def full(node: Node) -> list[str]:
    return sorted([row["_id"] async for row in node.db.devices.find({"fullSince": {"$exists": True}})])


async def awaited(node: Node, stored: dict[str, Any]) -> list[str] | None:
    document = await node.db.messages.find_one({"id": stored["id"]})
    return None if document is None else sorted(document["awaiting"])


async def waiting(node: Node, key: str) -> int:
    return int(await node.db.messages.count_documents({"awaiting": key}))


async def balances(node: Node) -> None:
    """The ledger says of everything accepted what became of it, and what still waits."""

    async def holds() -> bool:
        found = [row async for row in node.db.messages.find({}, {"awaiting": 1})]
        return node.relay.context.ledger.waiting == sum(len(row["awaiting"]) for row in found)

    await until(holds, 5, "the ledger balances")


async def status(device: WireDevice, stored: dict[str, Any]) -> dict[str, Any]:
    await device.put({"t": "status", "conv": stored["conv"], "ids": [stored["id"]], "ref": "s"})
    found: dict[str, Any] = (await device.expect("status", ref="s"))["items"][0]
    return {name: value for name, value in found.items() if name != "id"}


async def fill(node: Node, sender: WireDevice, conv: str, number: int = QUOTA) -> list[dict[str, Any]]:
    found = [await sender.sent(conv, str(n)) for n in range(number)]
    await count(node)
    return found


async def drain(device: WireDevice, number: int) -> list[dict[str, Any]]:
    """Takes and acknowledges so many messages."""
    found = []
    for _ in range(number):
        message = await device.expect("msg")
        await device.ack(message["conv"], message["id"])
        found.append(message)
    return found


async def refused(sender: WireDevice, conv: str, **fields: Any) -> dict[str, Any]:
    message = await sender.send(conv, **fields)
    return await sender.expect("error", id=message)


def trimmed(node: Node) -> int:
    return node.relay.context.ledger.count("trimmed")


async def test_a_full_device_is_left_out_until_half_is_drained_and_finds_its_gap_until_it_has_drained(
    node: Node,
) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    await leave(node, "cleo")
    before = await fill(node, ann, conv, QUOTA - 1)
    assert await full(node) == []
    last = (await fill(node, ann, conv, 1))[0]
    assert await full(node) == ["bob/phone", "cleo/phone"]
    cleo = await node.connect("cleo")
    await drain(cleo, QUOTA)
    await until(lambda: _is(full(node), ["bob/phone"]), 3, "cleo, who has drained, is not full")
    left_out = await ann.sent(conv, "bob has no room")
    assert await awaited(node, left_out) == ["cleo/phone"]
    assert trimmed(node) == 1
    assert await status(ann, left_out) == {"awaiting": 1, "delivered": []}
    await drain(cleo, 1)
    await until(lambda: _is(awaited(node, left_out), None), 3, "all who had room have it")
    assert await status(ann, left_out) == {"gone": True, "fate": "delivered", "delivered": ["cleo"]}

    bob = await node.connect("bob")
    gap = bob.welcome["gap"]
    assert gap["why"] == "full"
    assert last["at"] <= gap["since"] <= left_out["at"]
    got = await drain(bob, QUOTA)
    assert [message["id"] for message in got] == [stored["id"] for stored in (*before, last)]
    assert (await bob.expect("drained"))["count"] == QUOTA
    await until(lambda: _is(full(node), []), 3, "bob has drained")
    later = await ann.sent(conv, "there is room again")
    assert (await bob.expect("msg"))["id"] == later["id"]
    await bob.ack(conv, later["id"])

    async def closed() -> bool:
        return "gap" not in await node.db.devices.find_one({"_id": "bob/phone"})

    await until(closed, 3, "the gap is closed")
    assert "gap" not in (await node.connect("bob")).welcome


async def _is(asked: Any, wanted: Any) -> bool:
    return bool(await asked == wanted)


async def test_a_latched_device_stays_so_until_no_more_than_half_waits(nodes: NodeFactory) -> None:
    node = await start(nodes, window=1)
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    await fill(node, ann, conv)
    bob = await node.connect("bob")
    await drain(bob, QUOTA // 2 - 1)
    await fill(node, ann, conv, 1)
    assert await full(node) == ["bob/phone"]
    assert trimmed(node) == 1
    await drain(bob, 1)
    assert await waiting(node, "bob/phone") == QUOTA // 2
    await until(lambda: _is(full(node), []), 3, "half is acknowledged")
    await fill(node, ann, conv, 1)
    assert await waiting(node, "bob/phone") == QUOTA // 2 + 1
    assert trimmed(node) == 1
    await balances(node)


async def test_a_device_that_drains_over_http_is_no_longer_full(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    stored = await fill(node, ann, conv)
    acks = {"acks": [{"conv": conv, "ids": [one["id"] for one in stored]}]}
    assert (await node.request("POST", "/v1/acks", "bob", "phone", acks))[0] == 200
    await until(lambda: _is(full(node), []), 3, "bob has drained")
    reached = await ann.sent(conv)
    assert await awaited(node, reached) == ["bob/phone"]
    assert (await node.connect("bob")).welcome["gap"]["why"] == "full"


async def test_what_is_left_out_while_the_device_drains_shows_its_gap_once_more(nodes: NodeFactory) -> None:
    node = await start(nodes, window=1)
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    await fill(node, ann, conv)
    bob = await node.connect("bob")
    since = bob.welcome["gap"]["since"]
    await drain(bob, 1)
    missed = (await fill(node, ann, conv, 1))[0]
    await drain(bob, QUOTA - 1)
    await bob.expect("drained")
    await until(lambda: _is(full(node), []), 3, "bob has drained")
    await asyncio.sleep(0.3)
    again = await node.connect("bob")
    assert again.welcome["gap"] == {"since": since, "why": "full"}
    assert missed["at"] > since
    await again.put({"t": "ping"})
    await again.expect("drained")

    async def closed() -> bool:
        return "gap" not in await node.db.devices.find_one({"_id": "bob/phone"})

    await until(closed, 3, "the gap is closed")
    await balances(node)


async def test_a_latch_that_arises_during_a_connection_shows_its_gap_at_the_next_welcome(
    nodes: NodeFactory,
) -> None:
    node = await start(nodes, window=1)
    conv = await node.group("ann", ["bob"])
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await bob.expect("drained")
    await fill(node, ann, conv)
    assert await full(node) == ["bob/phone"], "a device that is behind is counted"
    await fill(node, ann, conv, 1)
    assert trimmed(node) == 1
    await drain(bob, QUOTA)
    again = await node.connect("bob")
    assert again.welcome["gap"]["why"] == "full"
    await balances(node)


async def test_a_connected_live_device_is_never_counted(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await bob.expect("drained")
    await fill(node, ann, conv, 3 * QUOTA)
    assert len(await arriving(bob, "msg", 0.2)) == 3 * QUOTA
    assert await full(node) == []
    assert "bob/phone" not in node.relay.context.quotas._known


async def test_a_direct_message_is_refused_only_when_every_device_of_the_other_is_full(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await leave(node, "bob", "tablet")
    first = await fill(node, ann, conv)
    assert await full(node) == ["bob/tablet"]
    refusal = await refused(ann, conv)
    assert (refusal["code"], refusal["retry"]) == ("mailbox_full", True)
    assert refusal["retryAfter"] > 0
    again = await ann.sent(conv, "0", id=first[0]["id"])
    assert again["seq"] == first[0]["seq"], "what was stored before is answered as before"
    assert trimmed(node) == 0, "what is refused was never accepted"

    phone = await node.connect("bob", "phone")
    reached = await ann.sent(conv, "the forgotten tablet does not make bob unreachable")
    assert (await phone.expect("msg"))["id"] == reached["id"]
    assert await awaited(node, reached) == ["bob/phone"]
    assert trimmed(node) == 1
    await phone.ack(conv, reached["id"])
    assert await status(ann, reached) == {"gone": True, "fate": "delivered", "delivered": ["bob"]}


async def test_the_refusal_is_the_same_over_http_and_counted(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await leave(node, "bob")
    await fill(node, ann, conv)
    body = {"id": "00000000-0000-4000-8000-000000000001", "conv": conv, "kind": "text", "body": "x"}
    code, found = await node.request("POST", "/v1/messages", "ann", "phone", body)
    assert (code, found["error"]["code"]) == (429, "mailbox_full")
    lines = node.relay.context.metrics.render().decode().splitlines()
    assert 'relay_limits_reached_total{limit="mailbox"} 2.0' in lines


async def test_a_full_person_is_told_who_types_though_no_message_is_taken(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await leave(node, "bob")
    await fill(node, ann, conv)
    bob = await node.connect("bob")
    assert (await refused(ann, conv))["code"] == "mailbox_full"
    await ann.put({"t": "typing", "conv": conv, "on": True, "ref": "t"})
    assert (await bob.expect("typing"))["user"] == "ann"
    await ann.nothing("error", 0.05)


async def test_the_owner_of_a_full_phone_can_still_write_from_it(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    await leave(node, "bob")
    await fill(node, ann, conv)
    bob = await node.connect("bob")
    await drain(ann, 0)
    assert (await bob.sent(conv, "I am back"))["conv"] == conv
    assert (await ann.expect("msg"))["body"] == "I am back"


async def test_a_person_without_a_device_has_the_same_quota_and_their_next_device_the_gap(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    group = await node.group("ann", ["bob", "cleo"])
    ann = await node.connect("ann")
    await fill(node, ann, conv)
    assert (await refused(ann, conv))["code"] == "mailbox_full"
    left_out = await ann.sent(group)
    assert await awaited(node, left_out) == ["cleo/*"]
    assert trimmed(node) == 1
    # Noted after bob's arrival it would be told once more.
    await count(node)
    bob = await node.connect("bob")
    assert bob.welcome["gap"]["why"] == "full"
    assert bob.welcome["gap"]["since"] <= left_out["at"]
    await drain(bob, QUOTA)
    await bob.expect("drained")
    reached = await ann.sent(conv)
    assert (await bob.expect("msg"))["id"] == reached["id"]

    async def closed() -> bool:
        return "gap" not in await node.db.devices.find_one({"_id": "bob/phone"})

    await until(closed, 3, "the gap is closed")
    assert "gap" not in (await node.connect("bob")).welcome
    assert "gap" not in (await node.connect("bob", "tablet")).welcome


async def test_a_blocked_sender_cannot_tell_that_nothing_is_kept_for_the_blocker_any_more(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    group = await node.group("ann", ["bob", "cleo"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    assert (await node.request("POST", "/v1/contacts", "bob", "phone", {"user": "ann"}))[0] in (200, 201)
    assert (await node.request("PATCH", "/v1/contacts/ann", "bob", "phone", {"blocked": True}))[0] == 200
    kept = (await fill(node, ann, conv))[0]
    assert await awaited(node, kept) == ["bob/!"]
    assert (await node.db.users.find_one({"_id": "bob"}))["full"]["blocked"]
    left_out = await ann.sent(conv, "not refused")
    assert trimmed(node) == 1
    await until(lambda: _is(awaited(node, left_out), None), 3, "nobody awaits it")
    assert await status(ann, left_out) == await status(ann, kept) == {"awaiting": 1, "delivered": []}
    cleo = await node.connect("cleo")
    shared = await ann.sent(group)
    assert await status(ann, shared) == {"awaiting": 2, "delivered": []}
    await drain(cleo, 1)
    await until(lambda: _is(awaited(node, shared), None), 3, "cleo has it")
    assert await status(ann, shared) == {"awaiting": 1, "delivered": ["cleo"]}
    assert "gap" not in (await node.connect("bob")).welcome


async def test_whom_somebody_blocked_is_refused_when_everybody_is(node: Node) -> None:
    conv = await node.direct("ann", "bob")
    other = await node.direct("cleo", "bob")
    ann, cleo = await node.connect("ann"), await node.connect("cleo")
    await leave(node, "bob")
    await node.request("POST", "/v1/contacts", "bob", "phone", {"user": "ann"})
    await node.request("PATCH", "/v1/contacts/ann", "bob", "phone", {"blocked": True})
    await fill(node, cleo, other)
    assert (await refused(cleo, other))["code"] == "mailbox_full"
    assert (await refused(ann, conv))["code"] == "mailbox_full"


async def test_a_group_message_for_full_devices_only_is_stored_and_its_fate_is_trimmed(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    await leave(node, "cleo")
    await fill(node, ann, conv)
    stored = await ann.sent(conv, "nobody has room")
    await until(lambda: _is(awaited(node, stored), None), 3, "it is gone")
    assert await status(ann, stored) == {"gone": True, "fate": "trimmed", "delivered": []}
    assert trimmed(node) == 2
    again = await ann.sent(conv, "nobody has room", id=stored["id"], again=True)
    assert again["seq"] == stored["seq"]
    assert trimmed(node) == 2
    tablet = await node.connect("ann", "tablet")
    own = await ann.sent(conv, "only my tablet has room")
    assert (await tablet.expect("msg"))["id"] == own["id"]
    await tablet.ack(conv, own["id"])
    assert await status(ann, own) == {"gone": True, "fate": "trimmed", "delivered": []}


async def test_a_leftover_that_nobody_had_room_for_is_trimmed_when_it_is_swept(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    await fill(node, ann, conv)
    ctx = node.relay.context
    ended = ctx.endings.discard
    ctx.endings.discard = lambda *_, **__: None  # type: ignore[method-assign]
    stored = await ann.sent(conv)
    ctx.endings.discard = ended  # type: ignore[method-assign]
    assert await awaited(node, stored) == []
    await ctx.endings.remove(
        await ctx.messages.leftovers(10), "delivered", deadline=asyncio.get_running_loop().time() + 5
    )
    assert (await status(ann, stored))["fate"] == "trimmed"


async def test_a_latch_outlives_its_node_and_is_seen_by_others(nodes: NodeFactory) -> None:
    node = await start(nodes)
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    await fill(node, ann, conv)
    other = await start(nodes)
    ann_there = await other.connect("ann", "tablet")
    left_out = await ann_there.sent(conv, "through the other node")
    assert await awaited(other, left_out) == ["ann/phone"]
    assert trimmed(other) == 1
    await nodes.stop(node)
    bob = await other.connect("bob")
    assert bob.welcome["gap"]["why"] == "full"
    await drain(bob, QUOTA)
    await bob.expect("drained")
    await until(lambda: _is(full(other), []), 3, "the other node unlatches it")
    reached = await ann_there.sent(conv, "room again")
    assert (await bob.expect("msg"))["id"] == reached["id"]
    await bob.ack(conv, reached["id"])
    await balances(other)


async def test_what_was_left_out_before_other_nodes_knew_better_reopens_the_gap(nodes: NodeFactory) -> None:
    here, there = await start(nodes), await start(nodes)
    conv = await here.group("ann", ["bob"])
    ann, tablet = await here.connect("ann"), await there.connect("ann", "tablet")
    await leave(here, "bob")
    await fill(here, ann, conv)
    await tablet.sent(conv, "now the other node holds the latch")
    await count(there)
    bob = await here.connect("bob")
    await drain(bob, QUOTA)
    await bob.expect("drained")

    async def closed() -> bool:
        found = await here.db.devices.find_one({"_id": "bob/phone"})
        return "fullSince" not in found and "gap" not in found

    await until(closed, 3, "the gap is closed")
    late = await tablet.sent(conv, "left out all the same")
    assert await awaited(there, late) == ["ann/phone"]
    await count(there)
    again = await here.connect("bob")
    assert again.welcome["gap"] == {"since": late["at"], "why": "full"}
    assert "bob/phone" not in await full(there)
    reached = await tablet.sent(conv, "and now it is told")
    assert "bob/phone" in (await awaited(there, reached) or [])


async def test_a_device_that_drains_while_it_is_being_latched_does_not_stay_latched(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    for n in range(QUOTA):
        await ann.sent(conv, str(n))
    latch = Mailboxes.latch

    async def slowly(self: Mailboxes, *args: Any) -> None:
        bob = await node.connect("bob")
        await drain(bob, QUOTA)
        await latch(self, *args)

    monkeypatch.setattr(Mailboxes, "latch", slowly)
    await count(node)
    assert await full(node) == []
    stored = await ann.sent(conv, "to bob")
    assert await awaited(node, stored) == ["bob/phone"]


async def test_who_drains_a_mailbox_that_another_node_has_latched_meanwhile_is_full_no_more(
    nodes: NodeFactory,
) -> None:
    here, there = await start(nodes), await start(nodes, window=1)
    conv = await here.group("ann", ["bob"])
    ann = await here.connect("ann")
    await leave(here, "bob")
    await fill(here, ann, conv, QUOTA - 1)
    bob = await there.connect("bob")
    assert "gap" not in bob.welcome
    # For the node that the sender is at bob is away.
    await fill(here, ann, conv, 1)
    assert await full(here) == ["bob/phone"]
    await drain(bob, QUOTA)
    await until(lambda: _is(full(there), []), 10, "bob has room")
    here.relay.context.audiences.changed(user="bob")
    assert "bob/phone" in (await awaited(here, await ann.sent(conv, "to bob")) or [])


async def test_who_drains_by_http_what_another_node_has_latched_meanwhile_is_full_no_more(
    nodes: NodeFactory,
) -> None:
    here, there = await start(nodes), await start(nodes)
    conv = await here.group("ann", ["bob"])
    ann = await here.connect("ann")
    await leave(there, "bob")
    stored = await fill(here, ann, conv, QUOTA - 1)
    assert (await there.request("GET", f"/v1/conversations/{conv}/messages", "bob", "phone"))[0] == 200
    stored += await fill(here, ann, conv, 1)
    assert await full(here) == ["bob/phone"]
    await count(there)
    acks = {"acks": [{"conv": conv, "ids": [one["id"] for one in stored]}]}
    assert (await there.request("POST", "/v1/acks", "bob", "phone", acks))[0] == 200
    await until(lambda: _is(full(there), []), 10, "bob has room")


async def test_a_message_that_was_under_way_while_its_mailbox_was_latched_does_not_keep_it_latched(
    nodes: NodeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await start(nodes, window=1)
    conv = await node.group("ann", ["bob"])
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await bob.expect("drained")
    latch = Mailboxes.latch

    async def and_one_more(self: Mailboxes, *args: Any) -> None:
        await latch(self, *args)
        await ann.sent(conv, "to whom had room a moment before")

    with monkeypatch.context() as patch:
        patch.setattr(Mailboxes, "latch", and_one_more)
        await fill(node, ann, conv)
    assert await full(node) == ["bob/phone"]
    assert await waiting(node, "bob/phone") == QUOTA + 1
    await drain(bob, 2)
    await count(node)
    assert await full(node) == ["bob/phone"], "more than half waits"
    await drain(bob, QUOTA - 1)
    await until(lambda: _is(full(node), []), 10, "bob has room")


async def test_a_mailbox_that_another_node_has_unlatched_is_found_full_again(nodes: NodeFactory) -> None:
    here, there = await start(nodes), await start(nodes)
    conv = await here.group("ann", ["bob"])
    ann, tablet = await here.connect("ann"), await there.connect("ann", "tablet")
    await leave(here, "bob")
    await fill(here, ann, conv)
    await tablet.sent(conv, "the other node learns that bob is full")
    await count(there)
    bob = await here.connect("bob")
    await drain(bob, QUOTA)
    await bob.expect("drained")

    async def has_room() -> bool:
        return "bob/phone" not in await full(here)

    await until(has_room, 3, "bob has drained")
    await gone(here, bob)
    there.relay.context.audiences.changed(user="bob")
    await fill(there, tablet, conv)
    assert "bob/phone" in await full(there)


async def test_a_count_or_a_latch_that_fails_changes_nothing(node: Node) -> None:
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    for n in range(QUOTA):
        await ann.sent(conv, str(n))
    async with failing(node, "aggregate", "messages", errorCode=8):
        await count(node)
    assert await full(node) == []
    await count(node)
    assert await full(node) == ["bob/phone"]


async def test_a_removed_member_whose_mailbox_is_full_is_not_told_and_has_a_gap(node: Node) -> None:
    conv = await node.group("ann", ["bob", "cleo"])
    ann = await node.connect("ann")
    await node.connect("cleo")
    await leave(node, "bob")
    await fill(node, ann, conv)
    other = await node.group("ann", ["bob", "cleo"])
    code, _ = await node.request("DELETE", f"/v1/conversations/{other}/members/bob", "ann", "phone")
    assert code == 200
    assert trimmed(node) == 1
    assert await waiting(node, "bob/phone") == QUOTA
    assert (await node.connect("bob")).welcome["gap"]["why"] == "full"


async def test_what_is_far_below_its_quota_is_not_counted_again(
    nodes: NodeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await start(nodes, mailbox_messages=100)
    asked: list[str] = []
    counted = Mailboxes.count

    async def count_and_note(self: Mailboxes, key: str, most: int) -> Count:
        asked.append(key)
        return await counted(self, key, most)

    monkeypatch.setattr(Mailboxes, "count", count_and_note)
    conv = await node.group("ann", ["bob"])
    ann = await node.connect("ann")
    await leave(node, "bob")
    for _ in range(4):
        await fill(node, ann, conv, 10)
    assert asked == ["bob/phone"]
    await fill(node, ann, conv, 10)
    assert asked == ["bob/phone"]
    await fill(node, ann, conv, 1)
    assert asked == ["bob/phone"] * 2, "more than half may wait now"
    node.relay.context.quotas.lease = 5
    await fill(node, ann, conv, 1)
    assert asked == ["bob/phone"] * 2, "within the lease"


async def test_large_groups_take_small_bodies_only_and_resends_are_answered(nodes: NodeFactory) -> None:
    node = await nodes.start(large_group=2, large_group_body_bytes=100)
    small, large = await node.group("ann", ["bob", "cleo"]), await node.group("ann", ["bob", "cleo", "dora"])
    ann = await node.connect("ann")
    await ann.sent(small, "x" * 101)
    await ann.sent(large, "x" * 100)
    refusal = await refused(ann, large, body="x" * 101)
    assert (refusal["code"], refusal["retry"]) == ("too_large", False)
    body = {"id": "00000000-0000-4000-8000-000000000001", "conv": large, "kind": "text", "body": "é" * 51}
    code, found = await node.request("POST", "/v1/messages", "ann", "phone", body)
    assert (code, found["error"]["code"]) == (413, "too_large")
    lines = node.relay.context.metrics.render().decode().splitlines()
    assert 'relay_limits_reached_total{limit="group_body"} 2.0' in lines


async def test_a_large_message_that_was_stored_before_its_group_grew_is_answered_as_before(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(large_group=2, large_group_body_bytes=100)
    conv = await node.group("ann", ["bob", "cleo"])
    ann = await node.connect("ann")
    first = await ann.sent(conv, "x" * 101)
    code, _ = await node.request(
        "POST", f"/v1/conversations/{conv}/members", "ann", "phone", {"users": ["dora"]}
    )
    assert code == 200
    again = await ann.sent(conv, "x" * 101, id=first["id"], again=True)
    assert again["seq"] == first["seq"]


async def test_the_device_keeps_what_is_refused_and_sends_it_in_order_when_there_is_room(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.store.audience.FULL_RETRY_MS", 500)
    conv = await node.direct("ann", "bob")
    await fill(node, await node.connect("ann", "tablet"), conv)
    events: list[Any] = []
    before = refusals(node)
    async with Device(node.url, tmp_path / "ann", lambda: node.token("ann", "phone")) as ann:
        for n in range(5):
            await ann.send(conv, f"kept {n}")
        await asyncio.sleep(2)
        assert ann.queued == 5
        assert 5 <= refusals(node) - before <= 5 * 5, "it does not spin"
        async with Device(
            node.url, tmp_path / "bob", lambda: node.token("bob", "phone"), on_event=events.append
        ) as bob:
            await asyncio.wait_for(ann.settled(), 15)

            async def arrived() -> bool:
                return len(await bob.storage.history(conv)) == QUOTA + 5

            await until(arrived, 5, "bob has everything")
            history = await bob.storage.history(conv)
    assert [message.body for message in history[-5:]] == [f"kept {n}" for n in range(5)]
    assert [event.why for event in events if isinstance(event, Gap)] == ["full"]


def refusals(node: Node) -> int:
    for line in node.relay.context.metrics.render().decode().splitlines():
        if line.startswith('relay_errors_total{code="mailbox_full"} '):
            return int(float(line.rpartition(" ")[2]))
    return 0
