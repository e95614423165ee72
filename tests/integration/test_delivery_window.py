"""PROTOCOL 1 and 2: the credit window, redelivery, ``drained``, and a reader that is too slow."""

from __future__ import annotations

import asyncio
import contextlib
import json

from relay.routing.hub import Connected
from tests.support.chat import chatting
from tests.support.device import WireDevice, new_id
from tests.support.node import Node, NodeFactory
from tests.support.raw import TEXT, RawSocket


async def fill(device: WireDevice, conv: str, number: int, body: str = "x") -> list[str]:
    """Sends that many messages, as arrays; their ids once all are stored."""
    ids = [new_id() for _ in range(number)]
    for start in range(0, number, 200):
        part = ids[start : start + 200]
        await device.put(*({"t": "send", "id": i, "conv": conv, "kind": "text", "body": body} for i in part))
        for message in part:
            await device.expect("stored", id=message)
    return ids


async def take(device: WireDevice, number: int, seconds: float = 5) -> list[str]:
    """The ids of the next messages."""
    return [str((await device.expect("msg", seconds))["id"]) for _ in range(number)]


def connection(node: Node, key: str) -> Connected:
    found = node.relay.context.hub.get(key)
    assert found is not None
    return found


async def backlog(node: Node, number: int, body: str = "x") -> tuple[str, list[str]]:
    """So many messages of ann's wait for bob's phone, which is away."""
    conv = await node.direct("ann", "bob")
    await (await node.connect("bob")).close()
    ann = await node.connect("ann")
    ids = await fill(ann, conv, number, body)
    await ann.close()
    return conv, ids


async def test_after_256_unacknowledged_messages_nothing_more_comes_until_one_is_acknowledged(
    node: Node,
) -> None:
    conv, ids = await backlog(node, 300)
    bob = await node.connect("bob")
    assert await take(bob, 256) == ids[:256]
    await bob.nothing("msg", 0.4)
    await bob.ack(conv, ids[0])
    assert await take(bob, 1) == ids[256:257]
    await bob.nothing("msg", 0.2)
    await bob.ack(conv, *ids[1:257])
    assert await take(bob, 43) == ids[257:]
    await bob.ack(conv, *ids[257:])
    assert (await bob.expect("drained"))["count"] == 300


async def test_live_messages_beyond_the_window_are_not_queued_in_memory_and_come_with_credit(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(window=10)
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    assert bob.welcome["window"] == 10
    await bob.expect("drained")
    ids = await fill(ann, conv, 30)
    assert await take(bob, 10) == ids[:10]
    await bob.nothing("msg", 0.3)
    held = connection(node, "bob/phone")
    assert (len(held.delivery.in_flight), held.outbox.size) == (10, 0)
    for start in range(0, 30, 10):
        await bob.ack(conv, *ids[start : start + 10])
        if start < 20:
            assert await take(bob, 10) == ids[start + 10 : start + 20]
    live = await ann.sent(conv, "live again")
    assert await take(bob, 1) == [live["id"]]


async def test_credit_comes_back_over_http_too(nodes: NodeFactory) -> None:
    node = await nodes.start(window=5)
    conv, ids = await backlog(node, 12)
    bob = await node.connect("bob")
    assert await take(bob, 5) == ids[:5]
    await bob.nothing("msg", 0.2)
    status, answer = await node.request(
        "POST", "/v1/acks", "bob", "phone", {"acks": [{"conv": conv, "ids": ids[:5]}]}
    )
    assert (status, answer) == (200, {"done": True})
    assert await take(bob, 5) == ids[5:10]
    await bob.nothing("msg", 0.2)


async def test_credit_comes_back_when_messages_expire_or_are_withdrawn(nodes: NodeFactory) -> None:
    node = await nodes.start(window=2, expiry_seconds=0.2)
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    expiring = await ann.sent(conv, "expires", ttl=1)
    withdrawn = await ann.sent(conv, "withdrawn")
    assert await take(bob, 2) == [expiring["id"], withdrawn["id"]]
    third = await ann.sent(conv, "third")
    await bob.nothing("msg", 0.2)
    assert await take(bob, 1) == [third["id"]]
    withdrawal = await ann.sent(conv, None, kind="withdrawn", replyTo=withdrawn["id"])
    assert await take(bob, 1) == [withdrawal["id"]]


async def test_the_window_counts_bytes_as_well(nodes: NodeFactory) -> None:
    node = await nodes.start(window_bytes=50_000)
    conv, ids = await backlog(node, 12, "b" * 10_000)
    bob = await node.connect("bob")
    assert bob.welcome["windowBytes"] == 50_000
    assert await take(bob, 4) == ids[:4]
    await bob.nothing("msg", 0.3)
    await bob.ack(conv, *ids[:4])
    assert await take(bob, 4) == ids[4:8]
    await bob.nothing("msg", 0.2)


async def test_a_message_larger_than_the_window_of_bytes_comes_alone(nodes: NodeFactory) -> None:
    node = await nodes.start(window_bytes=1024)
    conv, ids = await backlog(node, 3, "b" * 5000)
    bob = await node.connect("bob")
    for message in ids:
        assert await take(bob, 1) == [message]
        await bob.nothing("msg", 0.1)
        await bob.ack(conv, message)


async def test_what_was_not_acknowledged_comes_again_on_the_next_connection(node: Node) -> None:
    conv, ids = await backlog(node, 10)
    bob = await node.connect("bob")
    assert await take(bob, 10) == ids
    await bob.ack(conv, *ids[::2])
    await bob.nothing("drained", 0.1)
    await bob.close()
    again = await node.connect("bob")
    assert await take(again, 5) == ids[1::2]
    await again.nothing("msg", 0.1)
    await again.ack(conv, *ids[1::2])
    assert (await again.expect("drained"))["count"] == 5
    third = await node.connect("bob")
    assert await third.next() == {"t": "drained", "count": 0}


async def test_drained_waits_for_the_last_durable_acknowledgement_and_is_sent_once(node: Node) -> None:
    conv, ids = await backlog(node, 5)
    bob = await node.connect("bob")
    await take(bob, 5)
    await bob.ack(conv, *ids[:4])
    await bob.nothing("drained", 0.2)
    await bob.ack(conv, ids[4])
    assert await bob.expect("drained") == {"t": "drained", "count": 5}
    ann = await node.connect("ann")
    stored = await ann.sent(conv)
    await bob.expect("msg")
    await bob.ack(conv, stored["id"])
    await bob.nothing("drained", 0.2)


async def test_drained_comes_under_steady_traffic_and_counts_only_what_waited_at_connect(node: Node) -> None:
    conv, ids = await backlog(node, 400)
    ann = await node.connect("ann")
    sent: list[str] = []

    async def traffic() -> None:
        while True:
            sent.append(await ann.send(conv, "live"))
            await asyncio.sleep(0.002)

    sender = asyncio.create_task(traffic(), name="traffic")
    bob = await node.connect("bob")
    arrived: list[str] = []
    try:
        async with asyncio.timeout(10):
            while (found := await bob.next())["t"] != "drained":
                if found["t"] == "msg":
                    arrived.append(found["id"])
                    await bob.ack(conv, found["id"], durable=False)
    finally:
        sender.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sender
    assert arrived[:400] == ids
    # Those that ann sent between its connect and the first look at the store waited, too.
    assert 400 <= found["count"] <= 400 + len(sent)
    assert found["count"] - 400 < 40


async def test_messages_reach_a_device_once_while_it_drains_and_others_keep_sending(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(window=20)
    conv, ids = await backlog(node, 150)
    ann = await node.connect("ann")
    bob = await node.connect("bob")
    live: list[str] = []

    async def send() -> None:
        for _ in range(100):
            live.append(await ann.send(conv, "live"))
            await asyncio.sleep(0.001)

    sender = asyncio.create_task(send(), name="sender")
    arrived: list[str] = []
    async with asyncio.timeout(15):
        while len(arrived) < 250:
            message = await bob.expect("msg")
            arrived.append(message["id"])
            await bob.ack(conv, message["id"], durable=False)
    await sender
    assert arrived[:150] == ids
    assert arrived[150:] == live
    await bob.nothing("msg", 0.2)


async def test_a_device_that_never_reads_is_bounded_and_delays_nobody(nodes: NodeFactory) -> None:
    node = await nodes.start(outbox_bytes=65_536, window=200)
    conv = await node.group("ann", ["bob", "cleo"])
    ann, cleo = await node.connect("ann"), await node.connect("cleo")
    stuck = await RawSocket.open(node, node.headers("bob", "phone"), receive_buffer=4096)
    async with asyncio.timeout(3):
        while node.relay.context.hub.get("bob/phone") is None:
            await asyncio.sleep(0.01)
    held = connection(node, "bob/phone")
    largest = 0
    async with chatting(node):
        for _ in range(150):
            stored = await ann.sent(conv, "b" * 40_000)
            await cleo.expect("msg", id=stored["id"])
            await cleo.ack(conv, stored["id"])
            largest = max(largest, held.outbox.size)
    assert largest < 65_536 + 100_000
    assert held.delivery.behind
    stuck.cut()
    again = await node.connect("bob")
    assert (await again.expect("msg"))["kind"] == "text"


async def test_a_device_that_asks_and_never_reads_is_not_read_any_further(nodes: NodeFactory) -> None:
    node = await nodes.start(outbox_bytes=65_536)
    stuck = await RawSocket.open(node, node.headers("bob", "phone"), receive_buffer=4096)
    async with asyncio.timeout(3):
        while node.relay.context.hub.get("bob/phone") is None:
            await asyncio.sleep(0.01)
    held = connection(node, "bob/phone")
    ask = json.dumps([{"t": "ping", "ref": "r" * 64}] * 256).encode()
    largest = 0

    async def ask_on() -> None:
        while True:
            await stuck.send(TEXT, ask)

    asking = asyncio.create_task(ask_on(), name="asking")
    async with chatting(node) as chat:
        for _ in range(20):
            await chat.goes_on(1)
            largest = max(largest, held.outbox.size)
        async with asyncio.timeout(5):
            while not held.outbox.full:
                await asyncio.sleep(0.01)
        await chat.goes_on(5)
    assert not asking.done()
    assert largest <= 65_536 + 2 * 256 * 120
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    stuck.cut()


async def test_a_device_that_never_reads_is_closed_when_it_gives_no_sign_of_life(nodes: NodeFactory) -> None:
    node = await nodes.start(heartbeat_seconds=0.5, outbox_bytes=65_536)
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    alive = asyncio.create_task(ann.expect("receipt", 10), name="alive")
    stuck = await RawSocket.open(node, node.headers("bob", "phone"), receive_buffer=4096)
    async with asyncio.timeout(3):
        while node.relay.context.hub.get("bob/phone") is None:
            await asyncio.sleep(0.01)
    for _ in range(25):
        await ann.send(conv, "b" * 40_000)
    async with asyncio.timeout(8):
        while node.relay.context.hub.get("bob/phone") is not None:
            await asyncio.sleep(0.05)
        while await node.db.messages.count_documents({}) < 25:
            await asyncio.sleep(0.05)
    alive.cancel()
    await asyncio.gather(alive, return_exceptions=True)
    assert await node.db.messages.count_documents({}) == 25
    stuck.cut()


async def test_drained_counts_a_message_once_even_when_its_first_acknowledgement_could_not_be_stored(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(send_deadline_seconds=0.4, commit_timeout_seconds=0.3)
    conv, ids = await backlog(node, 3)
    bob = await node.connect("bob")
    assert await take(bob, 3) == ids
    failing = {"failCommands": ["insert", "update", "delete"], "errorCode": 50, "appName": "relay"}
    admin = node.db.client.admin
    await admin.command({"configureFailPoint": "failCommand", "mode": "alwaysOn", "data": failing})
    try:
        await bob.put({"t": "ack", "conv": conv, "ids": ids, "ref": "a"})
        error = await bob.expect("error", ref="a")
    finally:
        await admin.command({"configureFailPoint": "failCommand", "mode": "off"})
    assert (error["code"], error["retry"]) == ("unavailable", True)
    assert await take(bob, 3) == ids
    await bob.ack(conv, *ids)
    assert (await bob.expect("drained"))["count"] == 3


async def test_credit_comes_back_for_what_another_node_acknowledged(nodes: NodeFactory) -> None:
    node, other = await nodes.start(window=2, sweep_seconds=0.3), await nodes.start()
    conv, ids = await backlog(node, 4)
    bob = await node.connect("bob")
    assert await take(bob, 2) == ids[:2]
    await bob.nothing("msg", 0.2)
    body = {"acks": [{"conv": conv, "ids": ids[:2]}]}
    assert (await other.request("POST", "/v1/acks", "bob", "phone", body))[0] == 200
    assert await take(bob, 2) == ids[2:]
    await bob.ack(conv, *ids[2:])
    await bob.expect("drained")
