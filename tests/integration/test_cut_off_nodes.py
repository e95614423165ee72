"""Two nodes, one of which is cut off from Redis, wholly or only from what it has subscribed to. The sweep does not run by itself:
what arrives was told, or looked for because somebody asked for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.node import Node, NodeFactory
from tests.support.partition import Partition, partition
from tests.support.valkey import open_valkey
from tests.support.waiting import until


@dataclass(slots=True)
class House:
    """``one`` speaks with Valkey through ``proxy``."""

    one: Node
    other: Node
    proxy: Partition


@pytest.fixture
async def house(nodes: NodeFactory, tmp_path: Path) -> AsyncIterator[House]:
    async with open_valkey(tmp_path) as valkey, partition(valkey.port) as proxy:
        urls = [f"redis://127.0.0.1:{proxy.port}", valkey.url]
        one, other = [await nodes.start(redis_url=url, sweep_seconds=3600) for url in urls]
        yield House(one, other, proxy)
        # A node that ends says so, and waits for the answer.
        proxy.heal()


async def problem(node: Node) -> str:
    """What ``/readyz`` says of the bus."""
    async with node.http.get(node.url + "/readyz") as response:
        assert response.status == 200
        return str((await response.json()).get("problems", {}).get("bus", ""))


async def works(node: Node, wanted: bool) -> None:
    """Waits until the node says that its bus works, or does not."""

    async def so() -> bool:
        return node.relay.context.bus.shared is wanted and bool(await problem(node)) is not wanted

    await until(so, 20, f"the bus works: {wanted}")


async def test_a_node_that_hears_nothing_still_tells_others_and_catches_up_when_it_hears_again(
    house: House,
) -> None:
    one, other = house.one, house.other
    ann, bob = await one.connect("ann"), await other.connect("bob")
    conv = await one.direct("ann", "bob")
    house.proxy.cut_subscriptions()
    await works(one, False)
    assert "does not hear" in await problem(one)
    assert not await problem(other)
    told = await ann.sent(conv, "what is told goes out")
    await bob.expect("msg", 10, id=told["id"])
    await ann.put({"t": "typing", "conv": conv, "on": True})
    await bob.expect("typing", 10)
    missed = await bob.sent(conv, "not heard")
    await ann.nothing("msg")
    house.proxy.heal()
    await ann.expect("msg", 30, id=missed["id"])
    await works(one, True)


async def test_a_node_that_is_back_has_others_look_for_what_it_could_not_tell_them(house: House) -> None:
    one, other = house.one, house.other
    ann, bob = await one.connect("ann"), await other.connect("bob")
    conv = await one.direct("ann", "bob")
    house.proxy.cut()
    await works(one, False)
    unheard = await ann.sent(conv, "cannot be told")
    await bob.nothing("msg")
    assert not await problem(other), "the other node has noticed nothing"
    house.proxy.heal()
    await bob.expect("msg", 30, id=unheard["id"])
    await works(one, True)
    again = await ann.sent(conv, "told")
    await bob.expect("msg", 10, id=again["id"])


@pytest.mark.faults
async def test_a_node_cut_off_one_way_and_then_the_other_has_its_messages_delivered_each_time(
    house: House,
) -> None:
    one, other = house.one, house.other
    ann, bob = await one.connect("ann"), await other.connect("bob")
    conv = await one.direct("ann", "bob")
    for up, down in ((True, False), (False, True)):
        house.proxy.cut(up=up, down=down)
        await works(one, False)
        sent = [await ann.sent(conv, str(number)) for number in range(5)]
        house.proxy.heal()
        for message in sent:
            await bob.expect("msg", 30, id=message["id"])
        await bob.ack(conv, *(message["id"] for message in sent))
        await works(one, True)

    async def gone() -> bool:
        return bool(await one.db.messages.count_documents({}) == 0)

    await until(gone, 10, "nothing is left")
