"""Recipients that do not keep up cost themselves time, not the relay memory and not the others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from tests.faults.conftest import Processes
from tests.support.device import WireDevice, new_id
from tests.support.load import Load
from tests.support.node import Node, NodeFactory
from tests.support.process import metric
from tests.support.waiting import arriving

MB = 1 << 20


@pytest.mark.faults
async def test_a_reader_that_never_acknowledges_and_one_that_never_reads_leave_memory_and_others_alone(
    processes: Processes,
) -> None:
    relay = processes()
    await relay.start()
    await _chat(relay, "warm")
    alone = await _chat(relay, "alone")
    # The same flood twice: for two who keep up, then for two who do not.
    fast, _ = await _beside_a_flood(
        relay, "fast", [await _keeps_up(relay, name) for name in ("dora", "emil")]
    )
    before = relay.rss()
    slow, sent = await _beside_a_flood(
        relay, "slow", [await _never_acknowledges(relay, "bob"), await _never_reads(relay, "cleo")]
    )
    after = relay.rss()
    print(
        f"{sent} messages of 8 kB for slow readers; memory {before / MB:.0f} -> {after / MB:.0f} MB; others' p99 "
        f"{alone * 1000:.0f} ms alone, {fast * 1000:.0f} ms beside a flood for fast readers, {slow * 1000:.0f} ms "
        f"beside the same for slow ones: {slow / fast:.2f} times"
    )
    assert sent * 8192 > 4 * MB, "more was sent than their windows hold"
    assert (after - before) / MB < 60
    assert slow < 2


@pytest.mark.parametrize(("window", "size"), [(8, 100), (256, 60_000)], ids=["messages", "bytes"])
async def test_no_pages_are_read_for_a_reader_that_never_acknowledges(
    nodes: NodeFactory, window: int, size: int
) -> None:
    node = await nodes.start(window=window, sweep_seconds=600)
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    await bob.expect("drained")
    for _ in range(30):
        await ann.sent(conv, "x" * size)
    assert 1 < len(await arriving(bob, "msg")) < 30, "the window is full"
    before = await metric(node, "relay_drain_pages_total")
    await asyncio.sleep(1)
    pages = await metric(node, "relay_drain_pages_total") - before
    assert pages <= 5, f"{pages:.0f} queries in a second for nothing"


async def test_after_its_window_is_acknowledged_a_slow_reader_gets_the_rest_in_order(
    nodes: NodeFactory,
) -> None:
    node = await nodes.start(window=8, window_bytes=20_000)
    conv = await node.direct("ann", "bob")
    ann, bob = await node.connect("ann"), await node.connect("bob")
    sent = [(await ann.sent(conv, "x" * (50 * number)))["id"] for number in range(60)]
    held: list[str] = []
    while len(held) < len(sent):
        message = await bob.expect("msg")
        held.append(message["id"])
        await asyncio.sleep(0.005)
        await bob.ack(conv, message["id"], durable=False)
    assert held == sent
    await bob.nothing("msg", 0.2)


async def _chat(relay: Node, name: str) -> float:
    """Twenty pairs for two seconds; the 99th percentile of their `stored`, in seconds."""
    load = Load(relay, pairs=20, rate=10, name=name)
    await load.start()
    await asyncio.sleep(2)
    load.finish()
    await load.all_received(10)
    await load.close()
    return load.p99()


@dataclass(slots=True)
class _Reader:
    """Somebody who gets a flood: the conversation, and how to end it."""

    conv: str
    end: Callable[[], Awaitable[None]]


async def _beside_a_flood(relay: Node, name: str, readers: list[_Reader]) -> tuple[float, int]:
    """`_chat` while these readers are flooded: its percentile, and the number of messages of the flood."""
    ann = await relay.connect("ann")
    stop = asyncio.Event()
    flood = asyncio.create_task(_flood(ann, [reader.conv for reader in readers], stop), name="flood")
    took = await _chat(relay, name)
    stop.set()
    sent = await flood
    for reader in readers:
        await reader.end()
    await ann.close()
    return took, sent


async def _flood(ann: WireDevice, convs: list[str], stop: asyncio.Event) -> int:
    sent = 0
    while not stop.is_set():
        for conv in convs:
            await ann.put(*[_operation(conv) for _ in range(4)])
        for _ in range(4 * len(convs)):
            await ann.expect("stored", 10)
        sent += 4 * len(convs)
        await asyncio.sleep(0.02)
    return sent


def _operation(conv: str) -> dict[str, object]:
    return {"t": "send", "id": new_id(), "conv": conv, "kind": "text", "body": "x" * 8192}


async def _reads(relay: Node, user: str, *, acknowledges: bool) -> _Reader:
    conv = await relay.direct("ann", user)
    device = await relay.connect(user)

    async def read() -> None:
        while True:
            frame = await device.next(60)
            if acknowledges and frame["t"] == "msg":
                await device.ack(conv, frame["id"], durable=False)

    task = asyncio.create_task(read(), name=f"read {user}")

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    return _Reader(conv, end)


async def _keeps_up(relay: Node, user: str) -> _Reader:
    return await _reads(relay, user, acknowledges=True)


async def _never_acknowledges(relay: Node, user: str) -> _Reader:
    return await _reads(relay, user, acknowledges=False)


async def _never_reads(relay: Node, user: str) -> _Reader:
    """A connected device that reads nothing after its upgrade, with as small a receive buffer as there is."""

    conv = await relay.direct("ann", user)

    def small(_: object) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.setblocking(False)
        return made

    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=small))
    web_socket = await session.ws_connect(
        relay.url + "/v1/ws", headers=relay.headers(user, "phone"), autoping=False
    )
    # uvloop's transports are none of asyncio's classes.
    transport: Any = web_socket._conn.transport if web_socket._conn is not None else None
    transport.pause_reading()
    assert not transport.is_reading()
    return _Reader(conv, session.close)
