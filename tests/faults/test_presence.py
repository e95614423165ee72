"""Who was connected to a node that is gone is not online for ever."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Processes
from tests.support.node import SECRET
from tests.support.process import Mongods
from tests.support.valkey import open_valkey


@pytest.mark.faults
@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_watchers_learn_that_a_node_and_all_who_were_connected_to_it_are_gone(
    mongods: Mongods, processes: Processes, tmp_path: Path, how: signal.Signals
) -> None:
    async with open_valkey(tmp_path) as valkey:
        uri = await mongods.start_set(1)
        one, two = nodes = [
            processes(mongo_uri=uri, redis_url=valkey.url, pseudonym_key=SECRET, drain_seconds=2)
            for _ in range(2)
        ]
        for node in nodes:
            await node.start()
        ann = await one.connect("ann")
        await two.connect("bob")
        await one.group("ann", ["bob", "cleo"], announced=True)
        await ann.put({"t": "presence", "users": ["bob"]})
        assert (await ann.expect("presence", user="bob"))["online"] is True
        two.signal(how)
        await two.wait(10)
        # The lines of a dead node are good for 90 s: it is known to be dead long before.
        gone = await ann.expect("presence", 45, user="bob")
        assert gone["online"] is False and gone["lastSeen"] > 0
        cleo = await one.connect("cleo")
        await cleo.put({"t": "presence", "users": ["bob"]})
        assert (await cleo.expect("presence", user="bob"))["online"] is False
