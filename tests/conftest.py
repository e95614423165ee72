"""Fixtures that the suites share: a real mongod for the whole run, relay nodes on it, devices that speak the protocol.

With ``RELAY_TEST_MONGO=cluster`` in the environment the mongod is a sharded cluster of two (tests/support/on_cluster.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from relay.store.embedded import EmbeddedMongo
from tests.support.databases import Databases
from tests.support.node import Node, NodeFactory
from tests.support.on_cluster import (
    ON_CLUSTER,
    ClusterServer,
    open_cluster,
    pytest_runtest_call,
    pytest_terminal_summary,
)

__all__ = ["pytest_runtest_call", "pytest_terminal_summary"]

# How fast examples are made is the machine's business.
settings.register_profile("relay", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("relay")

TEST_COMMANDS = {"enableTestCommands": "1", "ttlMonitorSleepSecs": "1"}


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The event loop that the relay runs on: its transports differ from the default one's."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
async def mongod(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedMongo | ClusterServer]:
    """One real mongod, with test commands (fail points), for every test of the run."""
    directory: Path = tmp_path_factory.mktemp("mongod")
    if ON_CLUSTER:
        async with open_cluster(directory, TEST_COMMANDS) as cluster:
            yield cluster
        return
    server = EmbeddedMongo(directory, server_parameters=TEST_COMMANDS, cache_gb=0.5)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture(scope="session")
async def databases(mongod: EmbeddedMongo | ClusterServer) -> Databases:
    """The databases of that mongod that tests use one after the other."""
    return Databases() if isinstance(mongod, EmbeddedMongo) else await mongod.databases()


@pytest.fixture
async def nodes(mongod: EmbeddedMongo, databases: Databases, tmp_path: Path) -> AsyncIterator[NodeFactory]:
    """Starts relay nodes in this process, each test in a database of its own; stops them afterwards."""
    factory = NodeFactory(mongod.uri, tmp_path, databases)
    yield factory
    await factory.close()


@pytest.fixture
async def node(nodes: NodeFactory) -> Node:
    """One relay node with default settings."""
    return await nodes.start()
