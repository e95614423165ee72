"""How a node leaves: ``bye``, 1012, nothing lost. In this process; killing real ones is another suite's."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from tests.support.device import Closed, WireDevice, new_id
from tests.support.node import Node, NodeFactory
from tests.support.raw import TEXT, RawSocket


async def everything(device: WireDevice) -> tuple[list[dict[str, object]], int | None]:
    """What a device hears until the relay closes its socket, and the close code."""
    heard = []
    try:
        while True:
            heard.append(await device.next(10))
    except Closed as closed:
        return heard, closed.code


async def test_every_connection_gets_bye_with_a_spread_and_is_closed_with_1012(nodes: NodeFactory) -> None:
    node = await nodes.start()
    devices = [await node.connect(f"user-{n}") for n in range(12)]
    hearing = [asyncio.create_task(everything(device), name=device.key) for device in devices]
    await asyncio.sleep(0.05)
    await node.relay.stop()
    waits = []
    for heard, code in await asyncio.gather(*hearing):
        assert code == 1012
        (bye,) = [frame for frame in heard if frame["t"] == "bye"]
        assert set(bye) == {"t", "retryAfter"}
        waits.append(bye["retryAfter"])
    assert all(isinstance(wait, int) and 0 < wait <= 30_000 for wait in waits)
    assert len(set(waits)) > 4


async def test_while_it_drains_readyz_says_503_and_what_was_taken_is_still_stored(nodes: NodeFactory) -> None:
    node = await nodes.start(drain_seconds=6)
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    async with node.http.get(node.url + "/readyz") as answer:
        assert (answer.status, await answer.json()) == (200, {"status": "ready", "problems": {}})
    slow = {
        "failCommands": ["insert"],
        "namespace": f"{node.db.name}.messages",
        "blockConnection": True,
        "blockTimeMS": 1200,
    }
    await node.db.client.admin.command(
        {"configureFailPoint": "failCommand", "mode": {"times": 1}, "data": slow}
    )
    message = await ann.send(conv, "under way")
    await ann.put({"t": "ping"})
    await ann.expect("pong")
    stopping = asyncio.create_task(node.relay.stop(), name="stopping")
    await ann.expect("bye")
    async with node.http.get(node.url + "/readyz") as answer:
        assert (answer.status, (await answer.json())["status"]) == (503, "draining")
    async with node.http.get(node.url + "/livez") as answer:
        assert answer.status == 200
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await node.http.ws_connect(node.url + "/v1/ws", headers=node.headers("bob", "phone"))
    assert refused.value.status == 503
    late = {"id": new_id(), "conv": conv, "kind": "text", "body": "too late"}
    status, found = await node.request("POST", "/v1/messages", "ann", "phone", late)
    assert (status, found["error"]["code"]) == (503, "unavailable")
    too_late = await ann.send(conv, "too late, too")
    error = await ann.expect("error", id=too_late)
    assert (error["code"], error["retry"]) == ("unavailable", True)
    await ann.expect("stored", id=message)
    assert await ann.closed() == 1012
    await stopping
    assert await node.db.messages.distinct("id") == [message]


async def text_with(socket: RawSocket, part: bytes) -> bytes:
    while part not in (found := await socket.until(TEXT)).payload:
        pass
    return found.payload


async def test_every_message_taken_before_the_end_is_stored_or_refused_and_none_is_both(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(commits_in_flight=1, commit_messages=50, drain_seconds=8)
    conv = await node.direct("ann", "bob")
    ann = await node.connect("ann")
    ids = [new_id() for _ in range(1500)]
    hearing = asyncio.create_task(everything(ann), name="ann")
    for start in range(0, 1500, 250):
        part = ids[start : start + 250]
        await ann.put(*({"t": "send", "id": i, "conv": conv, "kind": "text", "body": "x"} for i in part))
    async with asyncio.timeout(5):
        while not node.relay.context.ledger.count("accepted"):
            await asyncio.sleep(0)
    database = node.db
    await node.relay.stop()
    heard, code = await hearing
    assert code == 1012
    stored = {frame["id"] for frame in heard if frame["t"] == "stored"}
    refused = {frame["id"] for frame in heard if frame["t"] == "error"}
    kept = {document["id"] async for document in database.messages.find({}, {"id": 1})}
    assert stored == kept
    assert not stored & refused
    assert {frame["code"] for frame in heard if frame["t"] == "error"} <= {"unavailable"}
    assert {frame["retry"] for frame in heard if frame["t"] == "error"} <= {True}
    assert stored


async def test_what_waits_is_delivered_by_the_next_node(nodes: NodeFactory) -> None:
    first = await nodes.start()
    conv = await first.direct("ann", "bob")
    ann = await first.connect("ann")
    await (await first.connect("bob")).close()
    stored = await ann.sent(conv)
    await first.relay.stop()
    second: Node = await nodes.start()
    bob = await second.connect("bob")
    assert (await bob.expect("msg"))["id"] == stored["id"]
    again = await second.connect("ann")
    assert await again.sent(conv, id=stored["id"], again=True) == stored
    await bob.ack(conv, stored["id"])
    assert (await again.expect("receipt"))["ids"] == [stored["id"]]
    assert second.relay.context.ledger.waiting == 0


async def test_stopping_leaves_no_task_of_the_relay_behind(nodes: NodeFactory) -> None:
    before = asyncio.all_tasks()
    node = await nodes.start()
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    stored = await ann.sent(conv)
    await bob.expect("msg", id=stored["id"])
    hearing = [asyncio.create_task(everything(device), name=device.key) for device in (ann, bob)]
    await node.relay.stop()
    await asyncio.gather(*hearing)
    await asyncio.sleep(0.05)
    left = {repr(task) for task in asyncio.all_tasks() - before if not task.done()}
    # The tests' own client of a cluster watches its servers; the relay's driver does so in threads.
    assert {task for task in left if "/pymongo/" not in task} == set()


async def test_a_node_with_stubborn_clients_stops_within_its_time(nodes: NodeFactory) -> None:
    node = await nodes.start(drain_seconds=1)
    stubborn = [await RawSocket.open(node, node.headers(f"user-{n}", "phone")) for n in range(5)]
    for socket in stubborn:
        await text_with(socket, b"welcome")
    unauthenticated = await RawSocket.open(node, {})
    async with asyncio.timeout(5):
        await node.relay.stop()
    for socket in (*stubborn, unauthenticated):
        socket.cut()
