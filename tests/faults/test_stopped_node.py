"""A node that stands still while the others go on: what it believed before is not what it acts on when it wakes up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from tests.faults.conftest import Processes
from tests.support.failpoints import failing
from tests.support.node import Node
from tests.support.process import Mongods
from tests.support.valkey import open_valkey
from tests.support.waiting import arriving, until

# A removal waits for the leases of a node that does not answer, which is 7 s.
REMOVAL_SECONDS = 15.0
# After so long without a sign of life nobody waits for a node any more.
FORGOTTEN_SECONDS = 20.5


@pytest.fixture(params=["without Redis", "with Redis"])
async def between(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[dict[str, Any]]:
    """The settings of nodes that have a Redis between them, or none."""
    if request.param == "without Redis":
        yield {}
        return
    async with open_valkey(tmp_path) as valkey:
        yield {"redis_url": valkey.url}


async def recipients(node: Node, message: str) -> set[str]:
    found = await node.db.messages.find_one({"id": message})
    return set() if found is None else {key.partition("/")[0] for key in found["awaiting"]}


@pytest.mark.faults
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("stopped", "removed"),
    [
        pytest.param(8.0, 0.0, id="for 8 s, within which others wait for it"),
        pytest.param(20.0, 11.0, id="for 20 s, after its beats have lapsed"),
        pytest.param(FORGOTTEN_SECONDS, FORGOTTEN_SECONDS, id="until nobody waits for it"),
    ],
)
async def test_a_node_that_was_stopped_during_a_removal_commits_nothing_for_who_was_removed(
    mongods: Mongods, processes: Processes, between: dict[str, Any], stopped: float, removed: float
) -> None:
    """It stands still for ``stopped`` seconds; the removal begins after ``removed``."""
    uri = await mongods.start_set(1)
    shared = {"mongo_uri": uri, "pseudonym_key": "shared by all nodes of a database, 32 bytes", **between}
    one, two = processes(**shared), processes(**shared, commits_in_flight=1)
    await one.start()
    await two.start()
    bob, cleo, _ = await asyncio.gather(two.connect("bob"), one.connect("cleo"), one.connect("ann"))
    conv = await one.group("ann", ["bob", "cleo"], announced=True)
    await bob.sent(conv, "warms the cache")
    async with failing(two, "insert", times=1, blockConnection=True, blockTimeMS=1500):
        committing = await bob.send(conv, "is being committed when the node is stopped")
        await asyncio.sleep(0.2)
        queued = await bob.send(conv, "has its recipients, and waits behind it")
        await asyncio.sleep(0.2)
        two.signal(signal.SIGSTOP)
        began = monotonic()
        try:
            unread = await bob.send(conv, "is not even read yet")

            async def committed() -> bool:
                return await recipients(one, committing) == {"ann", "cleo"}

            await until(committed, 5, "MongoDB went on")
            await asyncio.sleep(began + removed - monotonic())
            assert await one.db.messages.count_documents({"id": {"$in": [queued, unread]}}) == 0
            path = f"/v1/conversations/{conv}/members/cleo"
            async with asyncio.timeout(4 if removed >= FORGOTTEN_SECONDS else REMOVAL_SECONDS):
                assert (await one.request("DELETE", path, "ann", "phone"))[0] == 200
            assert await recipients(one, committing) == {"ann"}
            await asyncio.sleep(began + stopped - monotonic())
        finally:
            two.signal(signal.SIGCONT)

    async def stored() -> bool:
        return bool(await one.db.messages.count_documents({"id": {"$in": [queued, unread]}}) == 2)

    await until(stored, 15, "what the stopped node had left to do is done")
    for message in (committing, queued, unread):
        assert await recipients(one, message) == {"ann"}
    late = {queued, unread}
    assert not late & {frame["id"] for frame in await arriving(cleo, "msg", 1)}
