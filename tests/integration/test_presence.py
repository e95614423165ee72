"""Presence over real sockets: who is told, of whom, when, and what hostile lists get."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from relay.routing import presence as module
from relay.session.connection import Connection
from tests.support.device import WireDevice
from tests.support.node import Node, NodeFactory
from tests.support.waiting import exactly

# Two heartbeats of silence close a connection; in between it is not fresh.
HEARTBEAT = 10


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    """A node that tells soon of those who went offline."""
    assert module.GRACE_SECONDS == 3
    found = await nodes.start()
    found.relay.context.live.presence._grace = 0.3
    return found


async def watch(device: WireDevice, *users: str) -> list[dict[str, Any]]:
    """Watches, and what is told of it at once."""
    await device.put({"t": "presence", "users": list(users), "ref": "w"})
    await device.expect("done", ref="w")
    found = []
    for _ in dict.fromkeys(users):
        found.append(await device.expect("presence"))
    return found


async def told(device: WireDevice, count: int = 0) -> list[tuple[str, bool]]:
    return [(one["user"], one["online"]) for one in await exactly(device, "presence", count, 0.7)]


async def list_contact(node: Node, owner: str, user: str) -> None:
    status, _ = await node.request("POST", "/v1/contacts", owner, "phone", {"user": user})
    assert status in (200, 201)


async def shown(node: Node, viewer: str, user: str) -> tuple[bool | None, int | None]:
    status, found = await node.request("GET", f"/v1/users/{user}", viewer, "phone")
    assert status == 200
    return found["online"], found["lastSeen"]


async def test_watchers_are_told_now_and_on_change_and_others_see_the_same(node: Node) -> None:
    ann = await node.connect("ann")
    await node.direct("ann", "bob")
    assert [(one["user"], one["online"]) for one in await watch(ann, "bob")] == [("bob", False)]
    bob = await node.connect("bob")
    assert await told(ann, 1) == [("bob", True)]
    assert (await shown(node, "ann", "bob"))[0] is True
    before = int(time.time() * 1000)
    await bob.close()
    found = await ann.expect("presence")
    assert found["online"] is False
    assert (await shown(node, "ann", "bob")) == (False, found["lastSeen"])
    assert before - 3000 <= found["lastSeen"] <= time.time() * 1000


async def test_only_contacts_and_members_are_seen(node: Node) -> None:
    ann, *others = [await node.connect(user) for user in ("ann", "bob", "cleo", "dan", "eve")]
    await list_contact(node, "bob", "ann")
    await list_contact(node, "ann", "eve")
    await node.group("cleo", ["ann"])
    found = {one["user"]: one for one in await watch(ann, "bob", "cleo", "dan", "eve", "nobody", "ann")}
    assert {user for user, one in found.items() if one["online"]} == {"ann", "bob", "cleo"}
    for user in ("dan", "eve", "nobody"):
        assert (found[user]["online"], found[user]["lastSeen"]) == (False, None)
    for one in others:
        await one.close()
    assert sorted(await told(ann, 2)) == [("bob", False), ("cleo", False)]


async def test_blocks_contacts_and_members_take_effect_at_once(node: Node) -> None:
    ann, bob = await node.connect("ann"), await node.connect("bob")
    assert (await watch(ann, "bob"))[0]["lastSeen"] is None
    await list_contact(node, "bob", "ann")
    assert await told(ann, 1) == [("bob", True)]

    async def change(method: str, path: str, user: str, body: Any = None) -> None:
        status, found = await node.request(method, path, user, "phone", body)
        assert status in (200, 201), found

    await change("PATCH", "/v1/contacts/ann", "bob", {"blocked": True})
    found = await ann.expect("presence")
    assert (found["online"], found["lastSeen"]) == (False, (await shown(node, "ann", "bob"))[1])
    assert found["lastSeen"] is not None, "who is blocked sees somebody who went away"
    await bob.close()
    bob = await node.connect("bob")
    assert await told(ann) == [], "and nothing of what they do since"
    await change("PATCH", "/v1/contacts/ann", "bob", {"blocked": False})
    assert await told(ann, 1) == [("bob", True)]
    await change("DELETE", "/v1/contacts/ann", "bob")
    found = await ann.expect("presence")
    assert (found["online"], found["lastSeen"]) == (False, None)
    group = await node.group("cleo", ["ann"], announced=True)
    await change("POST", f"/v1/conversations/{group}/members", "cleo", {"users": ["bob"]})
    assert await told(ann, 1) == [("bob", True)]
    await change("DELETE", f"/v1/conversations/{group}/members/bob", "bob")
    assert await told(ann, 1) == [("bob", False)]


async def test_a_reconnect_does_not_flicker(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.relay.context.live.presence, "_grace", 3)
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await node.direct("ann", "bob")
    await watch(ann, "bob")
    for _ in range(3):
        await bob.close()
        await asyncio.sleep(0.2)
        bob = await node.connect("bob")
    again = await node.connect("bob")
    assert await bob.closed() == 4409
    assert await told(ann) == []
    await again.close()


async def test_hostile_lists_are_refused_and_leave_the_old_one(node: Node) -> None:
    ann = await node.connect("ann")
    await node.direct("ann", "bob")
    await watch(ann, "bob")
    await ann.put({"t": "presence", "users": [f"u{number}" for number in range(10_000)], "ref": "many"})
    assert (await ann.expect("error", ref="many"))["code"] == "too_large"
    for wrong in (["a b"], ["$relay"], [5], "bob", None, ["x" * 129], {"bob": 1}, ["bob\n"]):
        await ann.put({"t": "presence", "users": wrong, "ref": "wrong"})
        assert (await ann.expect("error", ref="wrong"))["code"] == "bad_request", wrong
    bob = await node.connect("bob")
    assert await told(ann, 1) == [("bob", True)]
    found = await watch(ann, *(f"u{number}" for number in range(256)))
    assert len(found) == 256
    assert not any(one["online"] for one in found)
    await bob.close()
    assert await told(ann) == []
    await ann.put({"t": "presence", "users": [], "ref": "none"})
    await ann.expect("done", ref="none")
    assert node.relay.context.live.presence.watched == 0


async def test_lists_end_with_their_connection_and_are_counted(node: Node) -> None:
    ann = await node.connect("ann")
    await watch(ann, "bob", "cleo")
    async with node.http.get(node.url + "/metrics") as response:
        text = await response.text()
    assert "relay_presence_watches 2.0" in text
    assert 'relay_live_frames_total{event="presence"} 2.0' in text
    again = await node.connect("ann")
    assert await ann.closed() == 4409
    await asyncio.sleep(0.2)
    presence = node.relay.context.live.presence
    assert (presence.watched, presence._watchers) == (0, {})
    await again.close()


async def test_too_many_lists_are_rate_limited(nodes: NodeFactory) -> None:
    node = await nodes.start(rate_presence="3/minute")
    ann = await node.connect("ann")
    await ann.put(*({"t": "presence", "users": ["bob"], "ref": str(number)} for number in range(4)))
    error = await ann.expect("error", ref="3")
    assert (error["code"], error["retry"]) == ("rate_limited", True)


async def test_a_socket_that_is_silent_is_not_online_anywhere(
    nodes: NodeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel knows that this socket was heard from a moment ago.
    monkeypatch.setattr(Connection, "listen", lambda *_: None)
    node = await nodes.start(heartbeat_seconds=HEARTBEAT)
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await node.direct("ann", "bob")
    await node.request("POST", "/v1/contacts", "ann", "phone", {"user": "bob"})
    await watch(ann, "bob")
    connection = node.relay.context.hub.get("bob/phone")
    assert connection is not None

    async def seen() -> tuple[bool | None, list[str], list[bool]]:
        _, online = await node.request("GET", "/v1/contacts/online", "ann", "phone")
        _, devices = await node.request("GET", "/v1/auth/devices", "bob", "phone")
        return (
            (await shown(node, "ann", "bob"))[0],
            [one["user"] for one in online["items"]],
            [one["online"] for one in devices["items"]],
        )

    assert await seen() == (True, ["bob"], [True])
    # The socket is open, and nothing has come for longer than a heartbeat and 5 s: not even the answer to the ping.
    connection.pinged = True
    connection.heard -= HEARTBEAT + 6
    assert await seen() == (False, [], [False])
    assert await told(ann, 1) == [("bob", False)]
    assert node.relay.context.hub.get("bob/phone") is connection
    await bob.put({"t": "ping"})
    await bob.expect("pong")
    assert await told(ann, 1) == [("bob", True)]
    assert await seen() == (True, ["bob"], [True])
