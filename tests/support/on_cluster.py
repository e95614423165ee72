"""The suites on a sharded cluster, and which of their tests have no meaning there: ``RELAY_TEST_MONGO=cluster``."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Generator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from pymongo import AsyncMongoClient
from pymongo.errors import OperationFailure

from tests.cluster import Cluster
from tests.support.databases import Databases, is_busy, makers
from tests.support.forwarder import NO_FAIL_POINTS

ON_CLUSTER: Final = os.environ.get("RELAY_TEST_MONGO") == "cluster"
SKIPPED: Final[Mapping[str, str]] = {}
"""Why tests are left out on a cluster, by what their id contains. Those that set a fail point or stop the one mongod are left out
by themselves."""
_SPARE: Final = 3


class ClusterDatabases(Databases):
    """Sharded databases of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self._cluster = cluster

    async def fill(self) -> None:
        """There are some to take."""
        while len(self._spare) < _SPARE:
            self._spare.append(await self._cluster.create_database())

    async def give(self, client: AsyncMongoClient[dict[str, Any]], name: str) -> None:
        """A test has ended and its nodes have stopped."""
        await super().give(client, name)
        await self.fill()

    async def _is_busy(self, client: AsyncMongoClient[dict[str, Any]], name: str) -> bool:
        return any([await is_busy(shard.client, name) for shard in self._cluster.shards])


class ClusterServer:
    """A cluster as the suites know their one mongod."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.uri = cluster.uri

    async def databases(self) -> Databases:
        """Its databases that tests use one after the other."""
        found = ClusterDatabases(self.cluster)
        await found.fill()
        return found

    @property
    def pid(self) -> int:
        """None that a test could stop."""
        pytest.skip("it stops the one mongod")


@asynccontextmanager
async def open_cluster(directory: Path, parameters: Mapping[str, str]) -> AsyncIterator[ClusterServer]:
    """A cluster of two shards for a whole run."""
    async with Cluster(directory, server_parameters=parameters) as cluster:
        makers[cluster.uri] = cluster.create_database
        try:
            yield ClusterServer(cluster)
        finally:
            del makers[cluster.uri]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is left out."""
    if not ON_CLUSTER:
        return
    for item in items:
        for part, reason in SKIPPED.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that needs a fail point is left out on a cluster, whose shards get other commands than a node sends."""
    try:
        return (yield)
    except OperationFailure as error:
        if ON_CLUSTER and NO_FAIL_POINTS in str(error):
            pytest.skip("it needs a fail point")
        raise
