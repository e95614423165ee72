"""The database's primary shard, which has everything but the other shards' messages, stands still, and dies: while it is away little
works, nothing is lost, and all goes on by itself when it is back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults.conftest import Processes
from tests.faults.test_all_together import goes_on, house
from tests.support.load import Load
from tests.support.process import ledger_of
from tests.support.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


async def both_go_on(load: Load, seconds: float) -> None:
    await goes_on(load, seconds, shard="s1")
    await goes_on(load, seconds, shard="s2")


async def test_it_stands_still_and_dies_and_nothing_is_lost_or_left(
    processes: Processes, tmp_path: Path
) -> None:
    async with house(processes, tmp_path) as found:
        primary = found.cluster.shards[0]
        load = Load(found.nodes[0], pairs=16, rate=12, nodes=found.nodes, groups=(5, 80))
        await load.start()
        await both_go_on(load, 20)
        primary.stop()
        try:
            # Longer than leases last, and than a node may go on without a beat.
            await asyncio.sleep(16)
            stuck, refused = len(load.stored), load.retryable
            await asyncio.sleep(3)
            assert len(load.stored) == stuck, (
                "a message was stored to recipients whom nobody can have looked up"
            )
            assert load.retryable > refused, "senders are told to try again"
        finally:
            primary.resume()
        await both_go_on(load, 40)
        await primary.kill()
        try:
            await asyncio.sleep(5)
        finally:
            await primary.start()
        await both_go_on(load, 60)
        await load.settle(60)
        print(await load.verify())

        async def balanced() -> bool:
            return sum([(await ledger_of(node))["waiting"] for node in found.nodes]) == 0

        await until(balanced, 90, "the books of both nodes together say that nothing waits")
