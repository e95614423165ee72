"""Two nodes with a Redis between them: a device is counted by the node that it is connected to, and only while it is behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from relay.store.mailboxes import Count, Mailboxes
from tests.support.device import WireDevice
from tests.support.node import Node, NodeFactory
from tests.support.valkey import Valkey, open_valkey
from tests.support.waiting import exactly, until

QUOTA = 6


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Valkey]:
    async with open_valkey(tmp_path_factory.mktemp("valkey")) as running:
        yield running


async def two(nodes: NodeFactory, server: Valkey, **settings: Any) -> tuple[Node, Node]:
    """Mailboxes are counted as often as they are asked for."""
    found = []
    for _ in range(2):
        node = await nodes.start(**{"redis_url": server.url, "mailbox_messages": QUOTA, **settings})
        node.relay.context.quotas.lease = 0
        found.append(node)
    return found[0], found[1]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Mailboxes, str]]:
    """Which mailboxes were counted, and by whom."""
    found: list[tuple[Mailboxes, str]] = []
    count = Mailboxes.count

    async def and_note(self: Mailboxes, key: str, most: int) -> Count:
        found.append((self, key))
        return await count(self, key, most)

    monkeypatch.setattr(Mailboxes, "count", and_note)
    return found


def mailboxes(node: Node) -> Mailboxes:
    return node.relay.context.quotas._mailboxes


async def is_full(node: Node, full: bool) -> bool:
    found = await node.db.devices.find_one({"_id": "bob/phone"})
    return ("fullSince" in found) is full


async def is_away(node: Node, device: WireDevice) -> bool:
    """Whether nobody takes it for connected."""
    return await node.relay.context.bus.online([device.user]) == {}


async def test_a_device_that_is_live_at_another_node_is_not_counted(
    nodes: NodeFactory, server: Valkey, counted: list[tuple[Mailboxes, str]]
) -> None:
    here, there = await two(nodes, server)
    ann, bob = await here.connect("ann"), await there.connect("bob")
    await bob.expect("drained")
    conv = await here.group("ann", ["bob"])
    for number in range(2 * QUOTA):
        await ann.sent(conv, str(number))
        await here.relay.context.quotas.run()
    await exactly(bob, "msg", 2 * QUOTA)
    await there.relay.context.quotas.run()
    assert (mailboxes(here), "bob/phone") not in counted
    assert await is_full(here, False), "what waits for it is in flight"


async def test_a_device_that_is_behind_at_another_node_is_found_full_by_that_node(
    nodes: NodeFactory, server: Valkey, counted: list[tuple[Mailboxes, str]]
) -> None:
    here, there = await two(nodes, server, window=1)
    ann, bob = await here.connect("ann"), await there.connect("bob")
    await bob.expect("drained")
    conv = await here.group("ann", ["bob"])
    for number in range(QUOTA):
        await ann.sent(conv, str(number))
    await here.relay.context.quotas.run()
    await until(lambda: is_full(there, True), 10, "bob is full")
    assert (mailboxes(here), "bob/phone") not in counted
    for _ in range(QUOTA):
        message = await bob.expect("msg")
        await bob.ack(conv, message["id"])
    await until(lambda: is_full(there, False), 10, "bob has room")


async def test_a_device_that_has_left_another_node_is_counted_when_enough_was_sent_to_it(
    nodes: NodeFactory, server: Valkey
) -> None:
    here, there = await two(nodes, server)
    ann, bob = await here.connect("ann"), await there.connect("bob")
    await bob.expect("drained")
    conv = await here.group("ann", ["bob"])
    await ann.sent(conv, "to whom is live there")
    await here.relay.context.quotas.run()
    await bob.close()
    await until(lambda: is_away(here, bob), 10, "bob has left")
    for number in range(QUOTA - 1):
        await ann.sent(conv, str(number))
    await until(lambda: is_full(here, True), 10, "bob is full")
