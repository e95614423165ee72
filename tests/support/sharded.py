"""Relay nodes in a test's own process on a real cluster of two shards; a module that imports the fixtures has one cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.support.databases import Databases
from tests.support.device import WireDevice
from tests.support.node import Node, NodeFactory
from tests.support.on_cluster import ClusterDatabases

SHARDS = ("s1", "s2")


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two shards, and a router that is none of them."""
    async with Cluster(tmp_path_factory.mktemp("cluster"), routers=1) as found:
        yield found


@pytest.fixture(scope="module")
async def sharded(cluster: Cluster) -> Databases:
    """Databases of that cluster."""
    return ClusterDatabases(cluster)


@pytest.fixture
async def nodes(cluster: Cluster, sharded: ClusterDatabases, tmp_path: Path) -> AsyncIterator[NodeFactory]:
    """Starts relay nodes on that cluster."""
    await sharded.fill()
    factory = NodeFactory(cluster.uri, tmp_path, sharded)
    yield factory
    await factory.close()


async def talk(node: Node, shard: str, others: int = 1) -> str:
    """A conversation of ann and so many others that lies on this shard."""
    members = ["bob", *(f"p{number}" for number in range(others - 1))]
    while True:
        name = await node.group("ann", members)
        if (name < "8") == (shard == "s1"):
            return name


async def devices(node: Node) -> tuple[WireDevice, WireDevice]:
    """Ann's and bob's, which have nothing to drain."""
    found = await node.connect("ann"), await node.connect("bob")
    for device in found:
        await device.expect("drained")
    return found
