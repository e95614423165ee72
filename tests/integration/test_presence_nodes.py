"""Presence over nodes whose Redis goes away: whatever hint is lost, watchers learn it in bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.device import WireDevice
from tests.support.node import Node, NodeFactory
from tests.support.valkey import Valkey, open_valkey
from tests.support.waiting import until


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Valkey]:
    async with open_valkey(tmp_path) as running:
        yield running


@pytest.fixture
async def two(nodes: NodeFactory, server: Valkey) -> tuple[Node, Node]:
    one, other = [await nodes.start(redis_url=server.url, sweep_seconds=3600) for _ in range(2)]
    return one, other


async def shared(two: tuple[Node, Node], wanted: bool) -> None:
    async def holds() -> bool:
        return all(node.relay.context.bus.shared is wanted for node in two)

    await until(holds, 20, f"both nodes use Redis: {wanted}")


async def watched(one: Node, *users: str) -> WireDevice:
    """Ann, who watches these people at this node, and has been told that they are as they are."""
    ann = await one.connect("ann")
    for user in users:
        await one.direct("ann", user)
    await ann.put({"t": "presence", "users": list(users), "ref": "w"})
    await ann.expect("done", ref="w")
    return ann


@pytest.mark.parametrize("way", ["killed", pytest.param("standing still", marks=pytest.mark.faults)])
async def test_who_comes_and_goes_at_another_node_while_redis_is_away_is_told_when_it_is_back(
    two: tuple[Node, Node], server: Valkey, way: str
) -> None:
    one, other = two
    bob = await other.connect("bob")
    stays = await other.connect("dan")
    ann = await watched(one, "bob", "cleo", "dan")
    assert (await ann.expect("presence", user="bob"))["online"] is True
    assert (await ann.expect("presence", user="cleo"))["online"] is False
    assert (await ann.expect("presence", user="dan"))["online"] is True
    if way == "killed":
        await server.kill()
    else:
        server.pause()
    await shared(two, False)
    await bob.close()
    await other.connect("cleo")
    # What is told of them is told, and lost, within this.
    await asyncio.sleep(4)
    if way == "killed":
        await server.start()
    else:
        server.resume()
    await shared(two, True)
    assert (await ann.expect("presence", 20, user="bob"))["online"] is False
    assert (await ann.expect("presence", 20, user="cleo"))["online"] is True
    await ann.nothing("presence", 2)
    await stays.put({"t": "ping"})
    await stays.expect("pong")
