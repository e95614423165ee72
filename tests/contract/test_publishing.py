"""What a node tells others, over a real Valkey: when it goes out, and to whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from relay.redis_client import AnyRedis, close, connect
from relay.redis_servers import Servers
from relay.routing import hints, publishing
from relay.routing.directory import Directory, Entry
from relay.routing.hints import Message
from relay.routing.publishing import Publisher, Whereabouts
from relay.tasks import ended
from relay.wire.envelope import Envelope
from tests.support.backlog import message
from tests.support.valkey import open_valkey

PREFIX = "relay:test"


class Nodes:
    """This node's publisher, whose turns are taken one by one, and what two others hear."""

    def __init__(self, redis: AnyRedis, pubsub: Any) -> None:
        self.redis = redis
        self.failures: list[BaseException] = []
        self.publisher = Publisher(
            Servers(redis, seconds=5),
            Directory(redis, prefix=PREFIX, node="own"),
            node="own",
            channel=channel,
            all_nodes=f"{PREFIX}:all",
            now=lambda: 5,
            fails=self.failures.append,
            lost=_nothing,
        )
        self.parcels = 0
        self._pubsub = pubsub

    async def enter(self, node: str, user: str) -> None:
        """The phone of this user connects to that node."""
        await Directory(self.redis, prefix=PREFIX, node=node).note([Entry("enter", user, "phone", 1)])

    def commit(self, envelope: Envelope) -> None:
        """This message is to be told to whom it is for."""
        assert self.publisher.gathered.takes(1, 1)
        self.publisher.gathered.messages.append((envelope, list(envelope.awaiting)))

    async def lookups(self) -> int:
        """How often the directory was asked."""
        stats = await self.redis.info("commandstats")
        return int(stats.get("cmdstat_mget", {}).get("calls", 0))

    async def turn(self) -> list[tuple[str, int]]:
        """One turn. Returns which nodes have heard which messages (``seq``) since."""
        await self.publisher._turn()
        heard: list[tuple[str, int]] = []
        while True:
            found = await self._pubsub.get_message(timeout=0.2)
            if found is None:
                return heard
            if found["type"] == "smessage":
                self.parcels += 1
                node = found["channel"].decode().rpartition(":")[2]
                its = hints.decode(found["data"]).hints
                heard += [(node, one.framed.envelope().seq) for one in its if isinstance(one, Message)]


def _nothing(_: int) -> None:
    return None


def channel(node: str) -> str:
    return f"{PREFIX}:node:{node}"


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    async with open_valkey(tmp_path) as server:
        redis = connect(server.url, connections=4, seconds=5)
        pubsub: Any = redis.pubsub()
        await pubsub.ssubscribe(channel("there"), channel("far"))
        yield Nodes(redis, pubsub)
        await pubsub.aclose()
        await close(redis)


async def test_the_first_for_somebody_goes_out_in_the_second_turn_and_the_next_in_its_own(
    nodes: Nodes,
) -> None:
    await nodes.enter("there", "bob")
    nodes.commit(message(1, "bob/phone"))
    assert await nodes.turn() == []
    assert await nodes.turn() == [("there", 1)]
    nodes.commit(message(2, "bob/phone"))
    assert await nodes.turn() == [("there", 2)]
    assert await nodes.turn() == []
    assert nodes.publisher.idle
    assert await nodes.lookups() == 2


async def test_a_device_that_has_moved_since_it_was_looked_up_is_told_where_it_is(nodes: Nodes) -> None:
    await nodes.enter("there", "bob")
    nodes.commit(message(1, "bob/phone", "cleo/phone"))
    await nodes.turn()
    assert await nodes.turn() == [("there", 1)]
    nodes.commit(message(2, "bob/phone"))
    nodes.commit(message(3, "cleo/phone"))
    # Together with what was published from memory, whose question comes a moment later.
    assert await nodes.turn() == [("there", 2)]
    await nodes.enter("far", "bob")
    await nodes.enter("far", "cleo")
    assert await nodes.turn() == []
    assert sorted(await nodes.turn()) == [("far", 2), ("far", 3)]
    assert nodes.publisher.idle


async def test_whom_a_message_is_being_committed_for_is_asked_for_along_with_others(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_LATER_SECONDS", 60)
    await nodes.enter("there", "bob")
    await nodes.enter("far", "cleo")
    nodes.commit(message(1, "bob/phone"))
    nodes.publisher.expect(["cleo"])
    await nodes.turn()
    assert await nodes.turn() == [("there", 1)]
    nodes.commit(message(2, "cleo/phone"))
    assert await nodes.turn() == [("far", 2)]
    # What was published from memory needs not wait for its moment when somebody else is expected.
    assert not nodes.publisher._due()
    nodes.publisher.expect(["dora"])
    assert nodes.publisher._due()
    await nodes.turn()
    assert not nodes.publisher._whereabouts.wanted
    assert set(nodes.publisher._whereabouts.known(["bob", "cleo", "dora"])) == {"bob", "cleo", "dora"}


async def test_a_device_that_has_moved_is_told_in_the_order_of_commits_and_once_for_all(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_LATER_SECONDS", 60)
    await nodes.enter("there", "bob")
    nodes.commit(message(1, "bob/phone"))
    await nodes.turn()
    await nodes.turn()
    for seq in (2, 3):
        nodes.commit(message(seq, "bob/phone"))
        assert await nodes.turn() == [("there", seq)]
    await nodes.enter("far", "bob")
    nodes.commit(message(4, "bob/phone", "cleo/phone"))
    assert await nodes.turn() == []
    before = nodes.parcels
    assert await nodes.turn() == [("far", 2), ("far", 3), ("far", 4)]
    assert nodes.parcels == before + 1
    assert await nodes.lookups() == 2
    assert nodes.publisher.idle


async def test_nobody_is_asked_for_only_because_a_message_is_being_committed(nodes: Nodes) -> None:
    await nodes.enter("there", "bob")
    nodes.publisher.expect(["bob"])
    assert not nodes.publisher._due()
    assert await nodes.turn() == []
    assert await nodes.lookups() == 0
    nodes.commit(message(1, "bob/phone"))
    assert await nodes.turn() == []
    assert await nodes.turn() == [("there", 1)]
    assert nodes.publisher.idle
    assert await nodes.lookups() == 1


async def test_a_group_of_which_not_all_are_known_is_told_once_to_each_node(nodes: Nodes) -> None:
    await nodes.enter("there", "bob")
    await nodes.enter("far", "cleo")
    nodes.commit(message(1, "bob/phone"))
    await nodes.turn()
    assert await nodes.turn() == [("there", 1)]
    nodes.commit(message(2, "bob/phone"))
    nodes.commit(message(3, "bob/phone", "cleo/phone"))
    assert await nodes.turn() == []
    assert sorted(await nodes.turn()) == [("far", 3), ("there", 2), ("there", 3)]
    assert nodes.parcels == 3


async def test_what_is_dropped_is_not_told_later(nodes: Nodes) -> None:
    await nodes.enter("there", "bob")
    nodes.commit(message(1, "bob/phone"))
    await nodes.turn()
    nodes.commit(message(2, "bob/phone"))
    assert nodes.publisher.forget() == 1
    assert nodes.publisher.idle
    assert await nodes.turn() == []


async def test_it_works_by_itself_and_survives_a_redis_that_goes_away(tmp_path: Path) -> None:
    async with open_valkey(tmp_path) as server:
        redis = connect(server.url, connections=4, seconds=1)
        pubsub: Any = redis.pubsub()
        await pubsub.ssubscribe(channel("there"), channel("far"))
        nodes = Nodes(redis, pubsub)
        await nodes.enter("there", "bob")
        task = asyncio.create_task(nodes.publisher.run())
        nodes.commit(message(1, "bob/phone"))
        nodes.publisher.wake()
        async with asyncio.timeout(10):
            while not nodes.publisher.idle:
                await asyncio.sleep(0.01)
        await server.kill()
        nodes.commit(message(2, "bob/phone"))
        nodes.publisher.wake()
        async with asyncio.timeout(10):
            while not nodes.failures:
                await asyncio.sleep(0.01)
        assert not task.done()
        await ended([task])
        await pubsub.aclose()
        await close(redis)


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(publishing, "monotonic", lambda: now)
    some = Whereabouts()
    some.want(f"user {number}" for number in range(30_000))
    assert len(some.wanted) == 1000
    some.note([f"user {number}" for number in range(20_000)], {})
    assert not some.wanted
    some.note(["ann"], {})
    assert set(some.known(["ann", "user 0", "user 1"])) == {"ann", "user 1"}


def test_what_is_remembered_for_long_is_known_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(publishing, "monotonic", lambda: now)
    some = Whereabouts()
    some.note(["ann", "bob"], {})
    some.want(["ann", "cleo"])
    assert list(some.take_wanted()) == ["cleo"]
    now += 29
    some.note(["bob"], {})
    assert set(some.known(["ann", "bob"])) == {"ann", "bob"}
    now += 2
    assert set(some.known(["ann", "bob"])) == {"bob"}
    some.want(["ann", "bob"])
    assert list(some.take_wanted()) == ["ann"]
    some.note(["cleo"], {})
    assert set(some._found) == {"bob", "cleo"}
