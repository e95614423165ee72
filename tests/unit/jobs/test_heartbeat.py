"""Silent connections are pinged, dead ones closed, live ones left alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from relay.jobs.heartbeat import Heartbeat
from relay.routing.hub import Hub
from relay.wire import errors
from tests.support.backlog import LocalConnection, MemoryBacklog

SECONDS = 10.0


@pytest.fixture
async def bob() -> AsyncIterator[LocalConnection]:
    found = LocalConnection(MemoryBacklog())
    yield found
    await found.close()


def silent(connection: LocalConnection, seconds: float) -> Heartbeat:
    """A heartbeat for this one connection, which was last heard so long ago."""
    hub = Hub()
    hub.add(connection)
    connection.heard = asyncio.get_running_loop().time() - seconds
    return Heartbeat(hub, SECONDS)


async def test_a_connection_that_was_heard_is_left_alone(bob: LocalConnection) -> None:
    await silent(bob, SECONDS - 1).run()
    assert bob.pings == 0
    assert bob.closes == []


async def test_a_silent_connection_is_pinged_once(bob: LocalConnection) -> None:
    heartbeat = silent(bob, SECONDS + 1)
    await heartbeat.run()
    await heartbeat.run()
    assert bob.pings == 1
    assert bob.closes == []


async def test_after_two_heartbeats_of_silence_a_connection_is_closed(bob: LocalConnection) -> None:
    await silent(bob, 2 * SECONDS + 1).run()
    assert bob.closes == [errors.TIMED_OUT]


async def test_the_bytes_of_an_unfinished_frame_count_as_life(bob: LocalConnection) -> None:
    heartbeat = silent(bob, 2 * SECONDS + 1)
    bob.life = asyncio.get_running_loop().time() - 1
    await heartbeat.run()
    assert bob.closes == []
    assert bob.pings == 0


async def test_an_expired_token_closes_even_a_lively_connection(bob: LocalConnection) -> None:
    heartbeat = silent(bob, 0)
    bob.expires = int(time.time()) + 60
    await heartbeat.run()
    assert bob.closes == []
    bob.expires = int(time.time()) - 1
    await heartbeat.run()
    assert bob.closes == [errors.UNAUTHORIZED]
