"""How much of Redis a committed batch takes: look-ups in the directory, and publications to another node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.routing import hints, publishing
from tests.support.node import Node, NodeFactory
from tests.support.valkey import Valkey, open_valkey

PAIRS = 10


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Valkey]:
    async with open_valkey(tmp_path) as running:
        yield running


class Asked:
    """What was asked of Redis since the start, but for the beats of channels, and how many group commits there were."""

    def __init__(self, redis: Any, node: Node) -> None:
        self._redis = redis
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
        stats = await self._redis.info("commandstats")
        looked, published = (
            stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("mget", "spublish")
        )
        return int(commits), looked, published - self._beats

    @asynccontextmanager
    async def listening(self, channels: list[str]) -> AsyncIterator[None]:
        """Counts beats."""
        pubsub = self._redis.pubsub()
        await pubsub.ssubscribe(*channels)

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
    buses: list[Any] = [node.relay.context.bus for node in (one, other)]
    redis: Any = Redis.from_url(server.url)
    senders = [await one.connect(f"ann{n}") for n in range(PAIRS)]
    readers = [await other.connect(f"bob{n}") for n in range(PAIRS)]
    convs = [await one.direct(f"ann{n}", f"bob{n}") for n in range(PAIRS)]
    asked = Asked(redis, one)

    async def one_round() -> None:
        """Each of the pairs, at once."""
        sent = await asyncio.gather(*(ann.sent(conv) for ann, conv in zip(senders, convs, strict=True)))
        for reader, its in zip(readers, sent, strict=True):
            await reader.expect("msg", id=its["id"])

    async with asked.listening([buses[0]._all, *(bus._channel(bus._node) for bus in buses)]):
        await one_round()
        await asyncio.sleep(0.3)
        before = await asked.counts()
        for _ in range(rounds):
            await one_round()
            await asyncio.sleep(gap)
        await asyncio.sleep(0.3)
        after = await asked.counts()
    await redis.aclose()
    commits, looked, published = (b - a for a, b in zip(before, after, strict=True))
    assert commits >= rounds
    # A beat may be counted there and not be here yet.
    assert rounds / 2 <= published <= commits + 3
    # The job that looks after quotas asks once who is online.
    assert 1 <= looked <= commits + 1
