"""Relay nodes that are restarted one by one, on two shards and under load: where their devices go, and that nothing is lost on the
way."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.conftest import Processes
from tests.faults.test_all_together import goes_on, house
from tests.support.load import Load
from tests.support.node import Node
from tests.support.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
# Of a machine that does much else at the same time.
PATIENCE = 60


async def test_a_rolling_restart_loses_nothing_and_moves_the_devices_of_the_node_that_restarts_once(
    processes: Processes, tmp_path: Path
) -> None:
    async with house(processes, tmp_path) as found:
        load = Load(found.nodes[0], pairs=16, rate=8, nodes=found.nodes, groups=(5, 5))
        await load.start()
        await goes_on(load, PATIENCE)
        for node in found.nodes:
            before = {key: list(homes) for key, homes in load.homes.items()}
            here = [key for key, homes in before.items() if homes[-1] is node]
            assert here, "there are devices at every node"
            node.signal(signal.SIGTERM)
            assert await node.wait(20) == 0
            await node.start()

            async def are_back(here: Sequence[str] = here, before: dict[str, list[Node]] = before) -> bool:
                return all(len(load.homes[key]) > len(before[key]) for key in here)

            await until(are_back, PATIENCE, "the devices of the node that restarts are connected again")
            await goes_on(load, PATIENCE)
            moved = {key: len(homes) - len(before[key]) for key, homes in load.homes.items()}
            assert {key: times for key, times in moved.items() if times} == dict.fromkeys(here, 1)
        await load.settle(PATIENCE)
        print(await load.verify())
