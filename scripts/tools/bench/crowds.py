"""The bench's side of a crowd: a relay with groups, the devices in them, and what became of every delivery."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import aiohttp
import msgspec

from relay.store.mongo import Mongo
from relay.wire.ids import PARTS_KEY
from scripts.tools.bench import groups, live
from scripts.tools.bench.asked import Helper
from scripts.tools.bench.crowd_messages import (
    AnyAnswer,
    Done,
    Enter,
    Entered,
    Gather,
    Group,
    Request,
    Said,
    Say,
    Settled,
    Stop,
    Talk,
)
from scripts.tools.bench.live import Target
from scripts.tools.bench.processes import Usage, spent, usages
from scripts.tools.bench.relay_metrics import Commits, Scrape, scrape
from scripts.tools.bench.report import Check, Show
from scripts.tools.bench.stage import AUDIENCE, RelayNode, helper

_EMPTY_SECONDS: Final = 20.0
_LOOK_SECONDS: Final = 0.1


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """A measured window: deliveries whose acknowledgement became durable in it, and what they cost. ``cpu_us`` is CPU per
    delivery in µs, ``cores`` CPU seconds a second, by process (``crowd`` is the devices); ``commits`` by queue."""

    seconds: float
    deliveries: int
    rate: float
    cpu_us: dict[str, float]
    cores: dict[str, float]
    commits: dict[str, Commits]


@dataclass(slots=True)
class Venue:
    """A relay of its own with groups in it and the crowd's process beside it."""

    target: Target
    node: RelayNode
    uri: str
    groups: list[Group]
    http: aiohttp.ClientSession
    pids: dict[str, int]
    _crowd: Helper[Request]
    _before: Scrape

    async def gather(self, request: Gather) -> None:
        """Tells the crowd who it is: the first thing. Raises BenchError."""
        await self._crowd.ask(request, Done)

    async def enter(self, first: int, count: int) -> Entered:
        """These devices connect. Raises BenchError."""
        return await self._crowd.ask(Enter(first=first, count=count), Entered)

    async def say(self, messages: int, pause: float) -> Said:
        """One message after the other into the first group. Raises BenchError."""
        return await self._crowd.ask(Say(messages=messages, pause=pause), Said)

    async def talk(self, senders: int, window: int) -> None:
        """All groups talk until ``stop``. Raises BenchError."""
        await self._crowd.ask(Talk(senders=senders, window=window), Done)

    async def stop(self) -> Settled:
        """The crowd falls silent. Raises BenchError."""
        return await self._crowd.ask(Stop(), Settled)

    async def window(self, warmup: float, seconds: float, show: Show, doing: str) -> Window:
        """Measures what goes on for so long. Raises aiohttp.ClientError."""
        show(f"{doing}: warm-up, {warmup:g} s")
        await asyncio.sleep(warmup)
        show(f"{doing}: measuring, {seconds:g} s")
        first, before, began = await self._reading()
        await asyncio.sleep(seconds)
        last, after, ended = await self._reading()
        deliveries = last.ended["acknowledged"] - first.ended["acknowledged"]
        cpu = spent(before, after)
        return Window(
            seconds=ended - began,
            deliveries=deliveries,
            rate=deliveries / (ended - began),
            cpu_us={
                name: used * 1e6 / max(1, deliveries)
                for name, used in cpu.items()
                if name not in ("others", "bench")
            },
            cores={name: used / (ended - began) for name, used in cpu.items()},
            commits=last.commits_since(first),
        )

    async def _reading(self) -> tuple[Scrape, dict[str, Usage], float]:
        return await scrape(self.http, self.target.url), usages(self.pids), perf_counter()

    async def account(self, settled: Settled, *, absent: int = 0, others: int = 0) -> list[Check]:
        """What must be true now: every delivery came once or waits for one of the ``absent`` devices of the first group, and
        ``others`` deliveries of somebody else's are acknowledged too. Raises aiohttp.ClientError and PyMongoError."""
        waiting = absent * settled.sent
        left, documents, found = await self._at_rest(waiting)
        accepted = found.accepted - self._before.accepted
        ended = {name: count - self._before.ended[name] for name, count in found.ended.items()}
        strange = {name: count for name, count in ended.items() if name != "acknowledged" and count}
        wanted = settled.delivered + others
        return [
            Check.that(
                "every message sent was stored",
                settled.stored == settled.sent > 0,
                f"{settled.stored:,} of {settled.sent:,}",
            ),
            Check.that(
                "every delivery came exactly once",
                settled.missing == waiting and not settled.repeated and not settled.unknown,
                f"{settled.delivered:,} came, {settled.missing - waiting:,} missing, {settled.repeated:,} again, "
                f"{settled.unknown:,} unknown",
            ),
            Check.that(
                "nothing was refused, no connection was lost",
                not settled.failed and not settled.closed,
                f"{settled.failed:,} refused, {settled.closed:,} lost"
                + "".join(f"; {text}" for text in settled.errors),
            ),
            Check.that(
                "the ledger balances",
                accepted == wanted + waiting
                and ended["acknowledged"] == wanted
                and not strange
                and found.waiting - self._before.waiting == waiting,
                f"{accepted:,} accepted, {ended['acknowledged']:,} acknowledged, {found.waiting:,} waiting"
                + "".join(f", {count:,} {name}" for name, count in strange.items()),
            ),
            Check.that(
                "the store holds what waits and nothing else",
                left == ({settled.sent: absent} if waiting else {}) and bool(documents) == bool(waiting),
                f"{documents:,} documents, "
                + (
                    ", ".join(f"{devices:,} devices await {count:,}" for count, devices in left.items())
                    or "nobody awaits anything"
                ),
            ),
            Check.that("the relay logged no error", not self.node.faults, f"{self.node.faults} errors"),
        ]

    async def _at_rest(self, waiting: int) -> tuple[dict[int, int], int, Scrape]:
        """How many devices await how many messages, documents left and metrics, once no more than ``waiting`` wait."""
        mongo = Mongo(self.uri, self.node.database)
        deadline = perf_counter() + _EMPTY_SECONDS
        try:
            while True:
                found = await scrape(self.http, self.target.url)
                documents = int(await mongo.messages.count_documents({}))
                rest = found.waiting - self._before.waiting <= waiting and bool(documents) <= bool(waiting)
                if rest or perf_counter() >= deadline:
                    return await _awaited(mongo.messages), documents, found
                # Neither MongoDB nor the relay announces that nothing is left.
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            mongo.close()


@contextlib.asynccontextmanager
async def venue(
    uri: str,
    pids: dict[str, int],
    directory: Path,
    sizes: Sequence[int],
    size: int,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[Venue]:
    """A relay with groups of these sizes; messages of ``size`` bytes. Raises BenchError and what MongoDB raises."""
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(live.own_relay(uri, pids, directory, settings))
        assert target.node is not None
        made = await asyncio.to_thread(groups.make, uri, target.node.database, sizes)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        process = await stack.enter_async_context(helper("scripts.tools.bench.crowd"))
        crowd = Helper[Request](process, "the crowd", AnyAnswer)
        before = await scrape(http, target.url)
        found = Venue(
            target, target.node, uri, made, http, {**target.pids, "crowd": process.pid}, crowd, before
        )
        host, port = live.address(target.url)
        await found.gather(
            Gather(host=host, port=port, secret=target.secret, audience=AUDIENCE, groups=made, size=size)
        )
        yield found


async def _awaited(messages: Any) -> dict[int, int]:
    by_device = [
        {"$unwind": "$awaiting"},
        # The mark of a message in parts is nobody's mailbox.
        {"$match": {"awaiting": {"$ne": PARTS_KEY}}},
        {"$group": {"_id": "$awaiting", "messages": {"$sum": 1}}},
        {"$group": {"_id": "$messages", "devices": {"$sum": 1}}},
    ]
    return {row["_id"]: row["devices"] async for row in messages.aggregate(by_device)}
