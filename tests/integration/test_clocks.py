"""A node on a machine whose wall clock is an hour off goes by MongoDB's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from relay.wire import clock as wire_clock
from tests.support.logins import ask, close_code, minted, refresh, register, somebody, works
from tests.support.node import Node, NodeFactory
from tests.support.process import metric
from tests.support.waiting import until

HOUR = 3600


@pytest.fixture(params=[HOUR, -HOUR], ids=["ahead", "behind"])
def off(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So many seconds is this machine's wall clock off from now on, as the relay sees it."""
    seconds: int = request.param
    before = wire_clock._ahead
    machine = SimpleNamespace(
        time_ns=lambda: time.time_ns() + seconds * 1_000_000_000,
        clock_gettime=time.clock_gettime,
        clock_gettime_ns=time.clock_gettime_ns,
    )
    monkeypatch.setattr(wire_clock, "time", machine)
    wire_clock.steer(None)
    assert abs(wire_clock.wall_seconds() - time.time() - seconds) < 60
    yield seconds
    wire_clock.steer(before)


@pytest.fixture
async def node(off: int, nodes: NodeFactory) -> Node:
    return await nodes.start(expiry_seconds=0.2)


async def test_tokens_are_judged_and_made_by_the_right_time(node: Node) -> None:
    user = somebody()
    assert await works(node, minted(user, -590))
    assert not await works(node, minted(user, -630)), "it expired half a minute ago"
    assert not await works(node, minted(user, 60)), "it was issued in the future"
    assert await close_code(node, minted(user, -630)) == 4401
    made = await register(node)
    assert await works(node, made["accessToken"])
    assert (await refresh(node, made["refreshToken"]))[0] == 200
    stored = await node.db.devices.find_one({"_id": f"{made['user']['id']}/phone"})
    assert abs(stored["createdAt"].timestamp() - time.time()) < 60


async def test_a_revocation_bars_what_was_issued_before_and_nothing_later(node: Node) -> None:
    user = somebody()
    old, tablet = minted(user, -1), minted(user, -1, "tablet")
    assert await works(node, old)
    assert (await ask(node, "DELETE", "/v1/auth/devices/phone", token=tablet))[0] == 200
    assert not await works(node, old)
    # Tokens count whole seconds.
    await asyncio.sleep(1.1)
    assert await works(node, minted(user, 0))
    assert not await works(node, old)


async def test_messages_live_as_long_as_their_senders_say(node: Node) -> None:
    ann = await node.connect("ann")
    await (await node.connect("bob")).close()
    conv = await node.direct("ann", "bob")
    before = time.time()
    long = await ann.sent(conv, "for a minute", ttl=60)
    after = time.time()
    began = time.monotonic()
    short = await ann.sent(conv, "for two seconds", ttl=2)

    async def gone() -> bool:
        return bool(await node.db.messages.count_documents({"id": short["id"]}) == 0)

    await until(gone, 20, "what had two seconds has expired")
    assert time.monotonic() - began > 1.8
    document = await node.db.messages.find_one({"id": long["id"]})
    assert before - 0.2 <= document["createdAt"].timestamp() <= after + 0.2
    bob = await node.connect("bob")
    await bob.expect("msg", id=long["id"])
    assert abs(bob.welcome["time"] / 1000 - time.time()) < 60


async def test_the_clock_is_named_as_a_problem_and_the_node_serves(node: Node, off: int) -> None:
    async def told() -> bool:
        async with node.http.get(node.url + "/readyz") as response:
            assert response.status == 200
            return "clock" in (await response.json())["problems"]

    await until(told, 15, "the clock is a problem")
    assert await metric(node, "relay_clock_offset_seconds") == pytest.approx(off, abs=1)
    assert await metric(node, 'relay_problem{part="clock"}') == 1
