"""What is told live by two nodes, with a Redis between them, with one that is away, and without any."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.device import WireDevice
from tests.support.node import Node, NodeFactory
from tests.support.valkey import Valkey, open_valkey
from tests.support.waiting import until


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Valkey]:
    async with open_valkey(tmp_path) as running:
        yield running


async def two(nodes: NodeFactory, **settings: Any) -> tuple[Node, Node]:
    """They wait for each other's leases as long as they really would."""
    one, other = [await nodes.start(sweep_seconds=3600, leases=True, **settings) for _ in range(2)]
    return one, other


async def status_of(device: WireDevice, conv: str, message: str) -> Any:
    await device.put({"t": "status", "conv": conv, "ids": [message]})
    return (await device.expect("status"))["items"][0]


async def is_honoured(ann: WireDevice, devices: list[WireDevice], conv: str) -> None:
    """Nobody is told which of bob's devices have a message."""
    for device in devices:
        message = (await ann.sent(conv))["id"]
        await device.ack(conv, message)
        await ann.nothing("receipt", 0.5)
        assert await status_of(ann, conv, message) == {"id": message, "awaiting": 1, "delivered": []}


@pytest.mark.parametrize("redis", ["there", "away", pytest.param("none", marks=pytest.mark.faults)])
async def test_receipts_that_are_switched_off_are_off_at_every_node_when_that_is_answered(
    nodes: NodeFactory, server: Valkey, redis: str
) -> None:
    one, other = await two(nodes, **({} if redis == "none" else {"redis_url": server.url}))
    ann, tablet, phone = (
        await one.connect("ann"),
        await one.connect("bob", "tablet"),
        await other.connect("bob"),
    )
    conv = await one.direct("ann", "bob")
    if redis == "away":
        await server.kill()
    body = {"preferences": {"deliveredReceipts": False}}
    assert (await one.request("PATCH", "/v1/me", "bob", "tablet", body))[0] == 200
    if redis == "away":
        await server.start()

        async def back() -> bool:
            return all(node.relay.context.bus.shared for node in (one, other))

        await until(back, 20, "both nodes use Redis again")
    await is_honoured(ann, [phone, tablet], conv)
