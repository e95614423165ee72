"""The suites on a sharded cluster, ``RELAY_TEST_MONGO=cluster``. Tests that set a fail point or stop the one mongod are left out
by themselves."""

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
_SPARE: Final = 3
_FAIL_POINT: Final = "it needs a fail point"
_ONE_MONGOD: Final = "it stops the one mongod"


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
        pytest.skip(_ONE_MONGOD)


@asynccontextmanager
async def open_cluster(directory: Path, parameters: Mapping[str, str]) -> AsyncIterator[ClusterServer]:
    """A cluster of two shards for a whole run."""
    async with Cluster(directory, server_parameters=parameters) as cluster:
        makers[cluster.uri] = cluster.create_database
        try:
            yield ClusterServer(cluster)
        finally:
            del makers[cluster.uri]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that needs a fail point is left out on a cluster, whose shards get other commands than a node sends."""
    try:
        return (yield)
    except OperationFailure as error:
        if ON_CLUSTER and NO_FAIL_POINTS in str(error):
            pytest.skip(_FAIL_POINT)
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much of the suites a run on a cluster leaves out, and why."""
    if not ON_CLUSTER:
        return
    reasons = [str(report.longrepr) for report in terminalreporter.getreports("skipped")]
    for why in (_FAIL_POINT, _ONE_MONGOD):
        count = sum(why in reason for reason in reasons)
        terminalreporter.write_line(f"left out on the cluster because {why}: {count}")
