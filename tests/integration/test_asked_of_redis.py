"""How much of Redis a committed batch takes: look-ups in the directory, and publications to another node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.routing import hints, publishing
from tests.support.node import Node, NodeFactory
from tests.support.valkey import Valkey, open_valkey
from tests.support.valkey_cluster import master_of, valkey_cluster

PAIRS = 10


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Valkey]:
    async with open_valkey(tmp_path) as running:
        yield running


@pytest.fixture
async def masters(tmp_path: Path) -> AsyncIterator[list[Valkey]]:
    async with valkey_cluster(tmp_path) as running:
        yield running


class Asked:
    """What was asked of these servers since the start, but for the beats of channels, and how many group commits there were."""

    def __init__(self, servers: Sequence[Valkey], node: Node) -> None:
        self._servers: list[Any] = [Redis.from_url(server.url) for server in servers]
        self._registry = node.relay.context.metrics.registry
        self._beats = 0

    async def counts(self) -> tuple[int, int, int]:
        """Group commits of messages, look-ups and publications."""
        # A shard has a queue of its own.
        commits = sum(
            sample.value
            for family in self._registry.collect()
            for sample in family.samples
            if sample.name == "relay_commit_batch_size_count"
            and sample.labels["queue"].startswith("send")
            and not sample.labels["queue"].startswith("send-large")
        )
        stats = [await server.info("commandstats") for server in self._servers]
        looked, published = (
            sum(its.get(f"cmdstat_{name}", {}).get("calls", 0) for its in stats)
            # Of a cluster each key is asked for by itself.
            for name in ("mget" if len(stats) == 1 else "get", "spublish")
        )
        return int(commits), looked, published - self._beats

    @asynccontextmanager
    async def listening(self, channels: Sequence[str]) -> AsyncIterator[None]:
        """Counts beats."""
        async with AsyncExitStack() as stack:
            for number, server in enumerate(self._servers):
                stack.push_async_callback(server.aclose)
                its = [name for name in channels if master_of(name, len(self._servers)) == number]
                if its:
                    await stack.enter_async_context(self._heard(server, its))
            yield

    @asynccontextmanager
    async def _heard(self, server: Any, channels: Sequence[str]) -> AsyncIterator[None]:
        pubsub = server.pubsub()
        for channel in channels:
            # Of a cluster together only when they share a slot.
            await pubsub.ssubscribe(channel)

        async def listen() -> None:
            while True:
                found = await pubsub.get_message(timeout=1)
                if found is not None and found["type"] == "smessage":
                    its = hints.decode(found["data"]).hints
                    self._beats += all(isinstance(hint, hints.Beat) for hint in its)

        task = asyncio.create_task(listen())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await pubsub.aclose()


class Talking:
    """Ten pairs, each with one end at either node."""

    def __init__(self, one: Node, other: Node) -> None:
        self._one = one
        self._other = other

    async def begin(self) -> None:
        self._senders = [await self._one.connect(f"ann{n}") for n in range(PAIRS)]
        self._readers = [await self._other.connect(f"bob{n}") for n in range(PAIRS)]
        self._convs = [await self._one.direct(f"ann{n}", f"bob{n}") for n in range(PAIRS)]

    async def round(self) -> None:
        """One message of each, all at once."""
        sent = await asyncio.gather(
            *(ann.sent(conv) for ann, conv in zip(self._senders, self._convs, strict=True))
        )
        for reader, its in zip(self._readers, sent, strict=True):
            await reader.expect("msg", id=its["id"])

    async def counted(self, asked: Asked, rounds: int, gap: float) -> tuple[int, int, int]:
        """Group commits, look-ups and publications of so many rounds, with so many seconds between them."""
        buses: list[Any] = [node.relay.context.bus for node in (self._one, self._other)]
        async with asked.listening([buses[0]._all, *(bus._channel(bus._node) for bus in buses)]):
            await self.round()
            await asyncio.sleep(0.3)
            before = await asked.counts()
            for _ in range(rounds):
                await self.round()
                await asyncio.sleep(gap)
            await asyncio.sleep(0.3)
            after = await asked.counts()
        commits, looked, published = (b - a for a, b in zip(before, after, strict=True))
        return commits, looked, published


@pytest.mark.parametrize("remembered", [True, False], ids=["remembered", "forgotten"])
@pytest.mark.parametrize(
    ("gap", "rounds"),
    [(0.0, 40), (0.05, 20), (0.5, 6)],
    ids=["as fast as can be", "steadily", "with breaks"],
)
async def test_a_committed_batch_takes_one_look_up_and_one_publication_for_another_node(
    server: Valkey,
    nodes: NodeFactory,
    monkeypatch: pytest.MonkeyPatch,
    gap: float,
    rounds: int,
    remembered: bool,
) -> None:
    if not remembered:
        # What is asked for ahead of a commit lasts until then, and no longer.
        monkeypatch.setattr(publishing, "_KEPT_SECONDS", 0.03)
    one, other = [await nodes.start(redis_url=server.url, sweep_seconds=3600) for _ in range(2)]
    talking = Talking(one, other)
    await talking.begin()
    commits, looked, published = await talking.counted(Asked([server], one), rounds, gap)
    assert commits >= rounds
    # A beat may be counted there and not be here yet.
    assert rounds / 2 <= published <= commits + 3
    # The job that looks after quotas asks once who is online.
    assert 1 <= looked <= commits + 1


@pytest.mark.parametrize(("gap", "rounds"), [(0.0, 40), (0.5, 6)], ids=["as fast as can be", "with breaks"])
async def test_a_cluster_is_asked_about_each_person_once_for_a_committed_batch(
    masters: list[Valkey], nodes: NodeFactory, gap: float, rounds: int
) -> None:
    url = f"redis+cluster://127.0.0.1:{masters[0].port}"
    one, other = [await nodes.start(redis_url=url, sweep_seconds=3600) for _ in range(2)]
    talking = Talking(one, other)
    await talking.begin()
    commits, looked, published = await talking.counted(Asked(masters, one), rounds, gap)
    assert commits >= rounds
    assert rounds / 2 <= published <= commits + 3
    # Each node's job that looks after quotas asks once who is online, of both ends.
    assert 1 <= looked <= PAIRS * (commits + 4)
