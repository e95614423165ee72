"""Several relays on one database, what they and everything beneath them use, and what must be true of them afterwards.

Processes are named by what they are and then which: ``relay 2``, ``mongod s1``. The first word is what costs are summed by.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import aiohttp
import msgspec
from pymongo import AsyncMongoClient
from redis.asyncio import Redis

from relay.store.mongo import Mongo
from scripts.tools.bench import live
from scripts.tools.bench.messages import Connected, Counted, Measured, Order, Placement, Progress
from scripts.tools.bench.processes import spent
from scripts.tools.bench.relay_metrics import Commits, Scrape, scrape
from scripts.tools.bench.report import Check, Show
from scripts.tools.bench.stage import (
    AUDIENCE,
    BenchError,
    LoadGenerator,
    RelayNode,
    load_generator,
    relay_node,
)

_EMPTY_SECONDS: Final = 20.0
_LOOK_SECONDS: Final = 0.1
_READ: Final = ("mget", "get", "eval")


@dataclass(frozen=True, slots=True)
class Beneath:
    """What relays stand on. ``servers`` are the mongods themselves, past all routers; ``pids`` their processes."""

    uri: str
    database: str
    servers: Sequence[str]
    pids: Mapping[str, int]
    redis_url: str | None = None


@dataclass(slots=True)
class Site:
    """Relays that run."""

    beneath: Beneath
    nodes: list[RelayNode]
    pids: dict[str, int]
    secret: str
    dead: set[int] = field(default_factory=set)

    @property
    def ports(self) -> list[int]:
        """Where the living ones listen."""
        return [live.address(node.url)[1] for node in self.living]

    @property
    def living(self) -> list[RelayNode]:
        """The nodes that were not killed."""
        return [node for node in self.nodes if node.pid not in self.dead]

    def order(
        self, *, placement: Placement, pairs: int, size: int, warmup: float, seconds: float, **more: Any
    ) -> Order:
        """What the load generator is asked to do here."""
        first, *others = self.ports
        return Order(
            host="127.0.0.1",
            port=first,
            more_ports=others,
            placement=placement,
            secret=self.secret,
            audience=AUDIENCE,
            run=secrets.token_hex(4),
            pairs=pairs,
            size=size,
            warmup=warmup,
            seconds=seconds,
            pids=self.pids,
            **more,
        )


@contextlib.asynccontextmanager
async def site(beneath: Beneath, directory: Path, count: int) -> AsyncIterator[Site]:
    """``count`` relays on this. Raises BenchError."""
    secret = secrets.token_hex(32)
    settings = {"RELAY_PSEUDONYM_KEY": secrets.token_hex(32)}
    if beneath.redis_url is not None:
        settings["RELAY_REDIS_URL"] = beneath.redis_url
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for number in range(1, count + 1):
            home = directory / f"{beneath.database}-{number}"
            nodes.append(
                await stack.enter_async_context(
                    relay_node(beneath.uri, beneath.database, home, settings, secret=secret)
                )
            )
        pids = {**beneath.pids, **{f"relay {place}": node.pid for place, node in enumerate(nodes, 1)}}
        yield Site(beneath, nodes, pids, secret)


# -- what is used


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """For each delivered message: calls of Redis that read and write the directory (a look-up of many users is one), publications,
    bytes to and from Redis, and bytes and requests to and from all mongods."""

    redis_lookups: float
    redis_publications: float
    redis_in: float
    redis_out: float
    mongo_in: float
    mongo_out: float
    mongo_requests: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one site. ``cpu_us`` is CPU for each message by kind of process, ``processes`` by process; ``device_bytes`` is
    what the two devices of a message read and write for it, all in all."""

    measured: Measured
    counts: Counted
    rate: float
    cpu_us: dict[str, float]
    processes: dict[str, float]
    use: Use
    device_bytes: float
    commits: dict[str, Commits]
    checks: list[Check]


@dataclass(frozen=True, slots=True)
class _Reading:
    scrapes: list[Scrape]
    redis: dict[str, float]
    mongo: dict[str, float]


async def read(site: Site, http: aiohttp.ClientSession) -> _Reading:
    """What has been used so far. Raises aiohttp.ClientError, RedisError and PyMongoError."""
    scrapes = [await scrape(http, node.url) for node in site.living]
    return _Reading(scrapes, await _redis(site.beneath.redis_url), await _mongo(site.beneath.servers))


async def _redis(url: str | None) -> dict[str, float]:
    if url is None:
        return {}
    client = Redis.from_url(url)
    try:
        stats, commands = await client.info("stats"), await client.info("commandstats")
    finally:
        await client.aclose()
    calls = {name.removeprefix("cmdstat_"): value["calls"] for name, value in commands.items()}
    return {
        "lookups": sum(calls.get(name, 0) for name in _READ),
        "publications": calls.get("spublish", 0),
        "in": stats["total_net_input_bytes"],
        "out": stats["total_net_output_bytes"],
    }


async def _mongo(servers: Sequence[str]) -> dict[str, float]:
    found = dict.fromkeys(("in", "out", "requests"), 0.0)
    for uri in servers:
        async with AsyncMongoClient[dict[str, Any]](uri) as client:
            network = (await client.admin.command("serverStatus"))["network"]
        found["in"] += network["bytesIn"]
        found["out"] += network["bytesOut"]
        found["requests"] += network["numRequests"]
    return found


def _use(before: _Reading, after: _Reading, messages: int) -> Use:
    def grown(part: str, name: str) -> float:
        first, last = getattr(before, part), getattr(after, part)
        return float(last.get(name, 0) - first.get(name, 0)) / max(1, messages)

    return Use(
        redis_lookups=grown("redis", "lookups"),
        redis_publications=grown("redis", "publications"),
        redis_in=grown("redis", "in"),
        redis_out=grown("redis", "out"),
        mongo_in=grown("mongo", "in"),
        mongo_out=grown("mongo", "out"),
        mongo_requests=grown("mongo", "requests"),
    )


def by_kind(by_process: Mapping[str, float]) -> dict[str, float]:
    """Sums by the first word of the names."""
    found: dict[str, float] = {}
    for name, value in by_process.items():
        kind = name.partition(" ")[0]
        found[kind] = found.get(kind, 0.0) + value
    return found


def _commits(before: _Reading, after: _Reading) -> dict[str, Commits]:
    found: dict[str, list[Commits]] = {}
    for first, last in zip(before.scrapes, after.scrapes, strict=True):
        for queue, commits in last.commits_since(first).items():
            found.setdefault(queue, []).append(commits)
    return {queue: _together(parts) for queue, parts in found.items()}


def _together(parts: Sequence[Commits]) -> Commits:
    groups = sum(part.groups for part in parts)
    return Commits(
        groups=groups,
        items=sum(part.items * part.groups for part in parts) / groups,
        ms=sum(part.ms * part.groups for part in parts) / groups,
    )


# -- a load


async def drive(site: Site, order: Order, show: Show, doing: str) -> Run:
    """Runs a load to its end, and accounts for every message. Raises BenchError and what its parts raise."""
    async with aiohttp.ClientSession() as http:
        opened = await read(site, http)
        before = after = opened
        async with load_generator(order) as load:
            measured: Measured | None = None
            while measured is None:
                match await load.news():
                    case Connected():
                        before = await read(site, http)
                    case Progress(warm=warm, rate=rate):
                        show(f"{doing}: {'measuring' if warm else 'warm-up or end'}, {rate:,.0f} messages/s")
                    case Measured() as found:
                        measured = found
            after = await read(site, http)
            counts, checks = await account(site, http, opened.scrapes, load)
    messages = max(1, measured.delivered)
    cpu = {
        name: used * 1e6 / messages
        for name, used in spent(measured.before, measured.after).items()
        if name not in ("others", "bench")
    }
    return Run(
        measured=measured,
        counts=counts,
        rate=measured.delivered / measured.seconds,
        cpu_us=by_kind(cpu),
        processes=cpu,
        use=_use(before, after, counts.delivered),
        device_bytes=(measured.read_bytes + measured.written_bytes) / messages,
        commits=_commits(before, after),
        checks=checks,
    )


async def account(
    site: Site, http: aiohttp.ClientSession, before: Sequence[Scrape], load: LoadGenerator, others: int = 0
) -> tuple[Counted, list[Check]]:
    """Dismisses the load when nothing is left, and checks the accounts of the living nodes together; ``others`` are deliveries of
    somebody else's. Raises BenchError and what MongoDB and the HTTP client raise."""
    left, after = await _until_empty(site, http)
    load.dismiss()
    counts = await load.news()
    if not isinstance(counts, Counted):
        raise BenchError("the load generator did not tell its counts")
    accepted = sum(scrape.accepted for scrape in after) - sum(scrape.accepted for scrape in before)
    ended: dict[str, int] = {}
    for sign, readings in ((1, after), (-1, before)):
        for one in readings:
            for name, count in one.ended.items():
                ended[name] = ended.get(name, 0) + sign * count
    strange = {name: count for name, count in ended.items() if name != "acknowledged" and count}
    wanted = counts.sent + others
    faults = sum(node.faults for node in site.living)
    return counts, [
        Check.that(
            # At least once is what the wire promises: a hint that comes late may repeat what was drained meanwhile.
            "every message was stored and delivered",
            counts.stored == counts.delivered == counts.sent > 0 and not counts.unknown,
            f"{counts.sent:,} sent, {counts.stored:,} stored, {counts.delivered:,} delivered, {counts.repeated:,} again, "
            f"{counts.unknown:,} unknown",
        ),
        Check.that(
            "nothing was refused, no connection was lost",
            not counts.failed and not counts.closed,
            f"{counts.failed:,} refused, {counts.closed:,} lost"
            + "".join(f"; {text}" for text in counts.errors),
        ),
        Check.that(
            "the ledgers of the nodes balance together",
            accepted == ended["acknowledged"] == wanted and not strange,
            f"{accepted:,} accepted, {ended['acknowledged']:,} acknowledged, {wanted:,} wanted"
            + "".join(f", {count:,} {name}" for name, count in strange.items()),
        ),
        Check.that("no message is left in the store", not left, f"{left:,} left"),
        Check.that("the relays logged no error", not faults, f"{faults} errors"),
    ]


async def _until_empty(site: Site, http: aiohttp.ClientSession) -> tuple[int, list[Scrape]]:
    mongo = Mongo(site.beneath.uri, site.beneath.database)
    deadline = perf_counter() + _EMPTY_SECONDS
    try:
        while True:
            left = int(await mongo.messages.count_documents({}))
            found = [await scrape(http, node.url) for node in site.living]
            if (not left and sum(one.waiting for one in found) <= 0) or perf_counter() >= deadline:
                return left, found
            # Neither MongoDB nor the relay announces that nothing is left.
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        mongo.close()
