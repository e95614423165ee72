"""The books of several relay processes, one of which is killed."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Processes
from tests.support.device import WireDevice
from tests.support.load import Load
from tests.support.node import SECRET
from tests.support.process import Mongods, RelayProcess, ledger_of
from tests.support.valkey import open_valkey
from tests.support.waiting import until


async def balance(*nodes: RelayProcess, seconds: float) -> None:
    """The sum of the nodes' books becomes what waits in the store."""

    async def holds() -> bool:
        books = await asyncio.gather(*(ledger_of(node) for node in nodes))
        rows = [len(found["awaiting"]) async for found in nodes[0].db.messages.find({}, {"awaiting": 1})]
        return sum(one["waiting"] for one in books) == sum(rows)

    await until(holds, seconds, "the books balance")


@pytest.mark.faults
@pytest.mark.timeout(180)
async def test_the_books_balance_again_when_a_node_was_killed_under_load(
    mongods: Mongods, processes: Processes, tmp_path: Path
) -> None:
    uri = await mongods.start_set(1)
    async with open_valkey(tmp_path) as valkey:
        nodes = [
            processes(mongo_uri=uri, redis_url=valkey.url, pseudonym_key=SECRET, drain_seconds=2)
            for _ in range(3)
        ]
        for node in nodes:
            await node.start()
        one, two, three = nodes
        load = Load(one, pairs=6, rate=40, nodes=nodes)
        try:
            await load.start()
            await load.stored_since(len(load.stored) + 300, 15)
            # What it accepts just after a beat, nobody hears of.
            ann, conv = await some_wait(two)
            await next_beat(two)
            for n in range(10):
                await ann.sent(conv, f"at the end {n}")
            await two.kill()
            await load.stored_since(len(load.stored) + 300, 15)
            load.finish()
            await load.all_received(30)
            await until(lambda: carried_on(one, 2), 60, "nothing of the killed node is left to do")
            await balance(one, three, seconds=10)
        finally:
            await load.close()
        await two.start()
        await balance(*nodes, seconds=10)
        for node in nodes:
            node.signal(signal.SIGTERM)
            assert await node.wait(20) == 0
            await balance(*(other for other in nodes if other is not node), seconds=10)
            await node.start()
            await balance(*nodes, seconds=10)


async def carried_on(node: RelayProcess, living: int) -> bool:
    """So many nodes have books, and no recount is due."""
    accounts = await node.db.balances.count_documents({})
    return bool(accounts == living and await node.db.settings.find_one({"_id": "ledger recount"}) is None)


async def next_beat(node: RelayProcess) -> None:
    """Waits until every node's books have been published once more."""
    before = {row["_id"]: row["beats"] async for row in node.db.balances.find({})}

    async def beaten() -> bool:
        now = {row["_id"]: row["beats"] async for row in node.db.balances.find({})}
        return all(now[name] > beats for name, beats in before.items())

    await until(beaten, 15, "every node beats")


async def some_wait(node: RelayProcess) -> tuple[WireDevice, str]:
    """Messages wait for two people who do not come."""
    conv = await node.group("ann", ["bob", "cleo"], announced=True)
    for name in ("bob", "cleo"):
        await (await node.connect(name)).close()
    ann = await node.connect("ann")
    for n in range(10):
        await ann.sent(conv, str(n))
    return ann, conv


@pytest.mark.faults
@pytest.mark.timeout(60)
async def test_a_single_node_that_is_killed_and_started_again_has_right_books_at_once(
    mongods: Mongods, processes: Processes
) -> None:
    uri = await mongods.start_set(1)
    relay = processes(mongo_uri=uri, pseudonym_key=SECRET)
    await relay.start()
    conv = await relay.direct("ann", "bob")
    await (await relay.connect("bob")).close()
    ann = await relay.connect("ann")
    for n in range(5):
        await ann.sent(conv, str(n))
    await relay.kill()
    await relay.start()
    ledger = await ledger_of(relay)
    assert (ledger["accepted"], ledger["waiting"]) == (5, 5)
