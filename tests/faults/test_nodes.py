"""Several relay processes with a Redis between them, and all that can happen to each of them under load."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Processes
from tests.support.load import Load
from tests.support.node import SECRET
from tests.support.process import Mongods, RelayProcess
from tests.support.valkey import Valkey, open_valkey


async def start_two(mongods: Mongods, processes: Processes, valkey: Valkey) -> list[RelayProcess]:
    uri = await mongods.start_set(1)
    settings: dict[str, Any] = {"pseudonym_key": SECRET, "sweep_seconds": 4, "drain_seconds": 2}
    nodes = [processes(mongo_uri=uri, redis_url=valkey.url, **settings) for _ in range(2)]
    for node in nodes:
        await node.start()
    return nodes


async def goes_on(load: Load, seconds: float = 15) -> None:
    """Far more messages are stored than were on the way."""
    await load.stored_since(len(load.stored) + 400, seconds)


@pytest.mark.faults
@pytest.mark.timeout(180)
async def test_nothing_is_lost_whatever_happens_to_nodes_and_redis_under_load(
    mongods: Mongods, processes: Processes, tmp_path: Path
) -> None:
    async with open_valkey(tmp_path) as valkey:
        one, two = nodes = await start_two(mongods, processes, valkey)
        load = Load(one, pairs=12, rate=30, nodes=nodes)
        await load.start()
        await goes_on(load)
        # A node dies with half of the connections.
        two.signal(signal.SIGKILL)
        await two.wait(5)
        await goes_on(load)
        await two.start()
        await goes_on(load)
        # A rolling restart.
        for node in nodes:
            node.signal(signal.SIGTERM)
            assert await node.wait(20) == 0
            await node.start()
            await goes_on(load)
        # Redis dies, is emptied, stands still.
        await valkey.kill()
        await goes_on(load)
        await valkey.start()
        await goes_on(load)
        await valkey.command("FLUSHALL")
        await goes_on(load)
        valkey.pause()
        await goes_on(load)
        valkey.resume()
        await goes_on(load)
        # A node stands still for longer than its leases.
        two.signal(signal.SIGSTOP)
        await asyncio.sleep(8)
        two.signal(signal.SIGCONT)
        await goes_on(load)
        await load.settle(40)
        print(await load.verify())
