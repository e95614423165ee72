"""A Redis cluster of three masters without replicas, of which one dies: what it keeps is unknown meanwhile, and all else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.node import Node, NodeFactory
from tests.support.valkey import Valkey
from tests.support.valkey_cluster import master_of, valkey_cluster
from tests.support.waiting import until

OPTIONS = ("--cluster-require-full-coverage", "no", "--cluster-node-timeout", "5000")


@pytest.fixture
async def masters(tmp_path: Path) -> AsyncIterator[list[Valkey]]:
    async with valkey_cluster(tmp_path, options=OPTIONS) as running:
        yield running


class Pair:
    """Two nodes, and the master that is to die: neither node's channel is on it."""

    def __init__(self, one: Node, other: Node, dying: int) -> None:
        self.one, self.other, self.dying = one, other, dying
        self.resumed = 0
        for bus in self.buses:
            bus.resumed = self._resume(bus.resumed)

    @property
    def buses(self) -> list[Any]:
        return [node.relay.context.bus for node in (self.one, self.other)]

    def _resume(self, before: Any) -> Any:
        def resumed() -> None:
            self.resumed += 1
            before()

        return resumed

    def user(self, name: str, *, dying: bool) -> str:
        """A user whose line in the directory is on the master that is to die, or is not."""
        prefix = self.buses[0]._prefix
        names = (f"{name}{number}" for number in range(1000))
        return next(one for one in names if (master_of(f"{prefix}:at:{one}") == self.dying) is dying)

    async def named(self) -> bool:
        """Whether both nodes say that a part of Redis does not answer."""
        return all(["part of Redis" in (await problems(node)).get("bus", "") for node in self.nodes])

    async def well(self) -> bool:
        return not any([await problems(node) for node in self.nodes])

    @property
    def nodes(self) -> list[Node]:
        return [self.one, self.other]


async def problems(node: Node) -> dict[str, str]:
    async with node.http.get(node.url + "/readyz") as response:
        assert response.status == 200
        return dict((await response.json()).get("problems", {}))


async def start_pair(nodes: NodeFactory, masters: list[Valkey], *, announces: bool, sweep: int) -> Pair:
    """``announces``: the channel that all nodes hear is on the master that is to die, or is not."""
    common = master_of(f"relay:{nodes.database}:all")
    dying = common if announces else (common + 1) % len(masters)
    url = masters[(dying + 1) % len(masters)].url.replace("redis://", "redis+cluster://")
    fit: list[Node] = []
    while len(fit) < 2:
        node = await nodes.start(redis_url=url, sweep_seconds=sweep)
        bus: Any = node.relay.context.bus
        if master_of(bus._channel(bus._node)) == dying:
            await nodes.stop(node)
        else:
            fit.append(node)
    return Pair(fit[0], fit[1], dying)


@asynccontextmanager
async def watched(pair: Pair) -> AsyncIterator[None]:
    """The problem is named for as long as this lasts."""
    missed = 0

    async def look() -> None:
        nonlocal missed
        while True:
            missed += not await pair.named()
            await asyncio.sleep(0.05)

    task = asyncio.create_task(look())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert missed == 0


@pytest.mark.faults
@pytest.mark.timeout(180)
@pytest.mark.parametrize("announces", [False, True], ids=["no channel", "the channel of all"])
async def test_with_one_master_dead_users_of_the_others_get_messages_of_another_node_at_once(
    masters: list[Valkey], nodes: NodeFactory, announces: bool
) -> None:
    pair = await start_pair(nodes, masters, announces=announces, sweep=3600)
    one, other = pair.nodes
    ann = await one.connect(pair.user("ann", dying=False))
    bob = await other.connect(pair.user("bob", dying=False))
    dan = await other.connect(pair.user("dan", dying=True))
    conv = await one.group(ann.user, [bob.user, dan.user])
    sent = await ann.sent(conv, "all is well")
    for device in (bob, dan):
        await device.expect("msg", id=sent["id"])
    await masters[pair.dying].kill()
    began = pair.resumed
    dropped = pair.buses[0]._dropped._value.get()
    first = await ann.sent(conv, "where its devices are is remembered")
    await bob.expect("msg", id=first["id"])
    await until(pair.named, 15, "readyz names it")
    whereabouts = pair.buses[0]._publisher._whereabouts

    async def forgotten() -> bool:
        return not whereabouts.known([dan.user])

    await until(forgotten, 40, "it is not remembered any more")
    await dan.expect("msg", id=first["id"])
    late: list[str] = []
    async with watched(pair):
        for number in range(40):
            late.append((await ann.sent(conv, str(number)))["id"])
            await bob.expect("msg", id=late[-1])
            await asyncio.sleep(0.2)
        new = await other.connect(pair.user("eva", dying=False))
        direct = await one.direct(ann.user, new.user)
        await new.expect("msg", id=(await ann.sent(direct, "who comes now, too"))["id"])
        await dan.nothing("msg")
    assert pair.resumed == began, "nobody began anew"
    assert pair.buses[0]._dropped._value.get() - dropped >= len(late)
    await masters[pair.dying].start()
    for message in late:
        await dan.expect("msg", 30, id=message)
    await until(pair.well, 30, "all answers again")
    again = await ann.sent(conv, "all is well again")
    for device in (bob, dan):
        await device.expect("msg", id=again["id"])


@pytest.mark.faults
@pytest.mark.timeout(120)
async def test_users_of_a_dead_master_get_messages_of_another_node_by_the_sweep(
    masters: list[Valkey], nodes: NodeFactory
) -> None:
    pair = await start_pair(nodes, masters, announces=False, sweep=2)
    one, other = pair.nodes
    ann = await one.connect(pair.user("ann", dying=False))
    dan = await other.connect(pair.user("dan", dying=True))
    conv = await one.direct(ann.user, dan.user)
    await masters[pair.dying].kill()
    for number in range(3):
        sent = await ann.sent(conv, str(number))
        await dan.expect("msg", 15, id=sent["id"])
    # Where it was connected is unknown: it comes in all the same, and gets what comes.
    moved = await one.connect(dan.user)
    sent = await ann.sent(conv, "at the same node")
    await moved.expect("msg", id=sent["id"])


@pytest.mark.faults
@pytest.mark.timeout(120)
async def test_a_master_that_hangs_does_not_hold_up_users_of_the_others(
    masters: list[Valkey], nodes: NodeFactory
) -> None:
    pair = await start_pair(nodes, masters, announces=False, sweep=3600)
    one, other = pair.nodes
    ann = await one.connect(pair.user("ann", dying=False))
    bob = await other.connect(pair.user("bob", dying=False))
    dan = await other.connect(pair.user("dan", dying=True))
    conv = await one.group(ann.user, [bob.user, dan.user])
    masters[pair.dying].pause()
    try:
        sent = await ann.sent(conv, "this one waits for it")
        await bob.expect("msg", id=sent["id"])
        await until(pair.named, 15, "readyz names it")
        began = asyncio.get_running_loop().time()
        async with watched(pair):
            for number in range(40):
                sent = await ann.sent(conv, str(number))
                await bob.expect("msg", id=sent["id"])
        assert asyncio.get_running_loop().time() - began < 15, "none of them waited for it"
    finally:
        masters[pair.dying].resume()
    await dan.expect("msg", 30, id=sent["id"])
    await until(pair.well, 30, "all answers again")
