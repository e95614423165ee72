"""Live traffic between pairs of devices, checked to the last message."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from relay.store.mongo import Mongo
from scripts.tools.bench import limit as raw
from scripts.tools.bench.limit import Limit
from scripts.tools.bench.messages import Connected, Counted, Measured, Order, Percentiles, Progress
from scripts.tools.bench.processes import Usage, spent
from scripts.tools.bench.relay_metrics import Commits, Scrape, scrape
from scripts.tools.bench.report import Check, Screen
from scripts.tools.bench.stage import AUDIENCE, BenchError, RelayNode, load_generator, mongod, relay_node

CACHE_GB: Final = 1.0
_STEADY: Final = 1.2
_EMPTY_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 0.1
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for. ``limit_seconds`` is shared by the raw cycles before and after; 0 leaves them out."""

    pairs: int = 100
    window: int = 4
    seconds: float = 20
    warmup: float = 3
    size: int = 200
    batch: int = 500
    cycles: int = raw.CYCLES_IN_FLIGHT
    rate: float | None = None
    limit_seconds: float = 10
    messages: int | None = None
    mark: int | None = None
    mongo_uri: str | None = None
    url: str | None = None
    secret: str | None = None


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """The result. Rates in messages/s (one to one: a message is sent, stored, delivered, acknowledged and deleted);
    ``limits`` are the raw cycle right before and right after, ``ratio`` is to their mean, and ``steady`` says whether they
    agree within a fifth: if not, something else used the machine and the ratio says little. ``cpu_us`` is CPU per
    delivered message, ``cores`` CPU seconds a second, by process; memory in bytes. ``mode`` says whether the loop was
    closed (window) or open (rate)."""

    command: str = "live"
    ok: bool
    mode: str
    pairs: int
    window: int
    size: int
    asked_rate: float | None
    seconds: float
    messages: int
    rate: float
    late: int
    per_frame: float
    limits: list[Limit]
    ratio: float | None
    steady: bool | None
    delivered_ms: Percentiles
    stored_ms: Percentiles
    cpu_us: dict[str, float]
    cores: dict[str, float]
    relay_rss: dict[str, int]
    commits: dict[str, Commits]
    counts: Counted
    checks: list[Check]
    relay_log: list[str]


@dataclass(frozen=True, slots=True)
class Target:
    """The relay under load; ``node`` and ``mongo_uri`` when it is the bench's own."""

    url: str
    secret: str
    pids: dict[str, int]
    node: RelayNode | None
    mongo_uri: str | None


async def run(options: Options, screen: Screen) -> Live:
    """The raw cycle, then the relay on the same mongod. Raises BenchError and what mongod and the driver raise."""
    if options.url is not None:
        address(options.url)
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-")))
        uri: str | None = None
        pids = {"bench": os.getpid()}
        limits: list[Limit] = []

        async def measure_raw() -> None:
            if uri is not None and options.limit_seconds:
                limits.append(await measure_limit(options, uri, pids, options.limit_seconds / 2, screen))

        if options.url is None or options.limit_seconds:
            uri, mongo_pids = await stack.enter_async_context(database(options.mongo_uri, directory))
            pids |= mongo_pids
        await measure_raw()
        if options.url is None:
            assert uri is not None
            target = await stack.enter_async_context(own_relay(uri, pids, directory))
        else:
            target = _given(options, pids)
        found = await drive(options, target, screen)
        await measure_raw()
        return _compared(found, limits)


def _compared(found: Live, limits: list[Limit]) -> Live:
    rates = [limit.rate for limit in limits]
    if not rates or not min(rates):
        return msgspec.structs.replace(found, limits=limits)
    return msgspec.structs.replace(
        found,
        limits=limits,
        ratio=found.rate * len(rates) / sum(rates),
        steady=max(rates) <= min(rates) * _STEADY,
    )


@contextlib.asynccontextmanager
async def database(mongo_uri: str | None, directory: Path) -> AsyncIterator[tuple[str, dict[str, int]]]:
    """A MongoDB: its URI, and its process id where it is the bench's own. Raises EmbeddedError."""
    if mongo_uri is not None:
        yield mongo_uri, {}
        return
    async with mongod(directory / "mongo", CACHE_GB) as (uri, pid):
        yield uri, {"mongod": pid}


@contextlib.asynccontextmanager
async def own_relay(
    uri: str, mongo_pids: dict[str, int], directory: Path, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Target]:
    """A relay of the bench's own, with these RELAY_ settings, on a database of its own, which is dropped at the end. Raises
    BenchError."""
    name = f"relay_bench_{secrets.token_hex(4)}"
    try:
        async with relay_node(uri, name, directory / "relay", settings) as node:
            yield Target(node.url, node.secret, {**mongo_pids, "relay": node.pid}, node, uri)
    finally:
        mongo = Mongo(uri, name)
        await mongo.client.drop_database(name)
        mongo.close()


async def measure_limit(
    options: Options, uri: str, pids: dict[str, int], seconds: float, screen: Screen
) -> Limit:
    """The raw cycle on this MongoDB. Raises MongoUnavailable and PyMongoError."""
    with screen.working(f"raw cycle of MongoDB, {seconds:g} s"):
        return await raw.measure(
            uri,
            f"relay_bench_{secrets.token_hex(4)}",
            seconds=seconds,
            batch=options.batch,
            cycles=options.cycles,
            size=options.size,
            pids=pids,
        )


def make_order(target: Target, options: Options) -> Order:
    """What the load generator is asked to do. Raises BenchError."""
    host, port = address(target.url)
    return Order(
        host=host,
        port=port,
        secret=target.secret,
        audience=AUDIENCE,
        run=secrets.token_hex(4),
        pairs=options.pairs,
        window=options.window,
        size=options.size,
        warmup=options.warmup,
        seconds=options.seconds,
        messages=options.messages,
        mark=options.mark,
        rate=options.rate,
        pids=target.pids,
    )


def address(url: str) -> tuple[str, int]:
    """Host and port of a relay on this machine. Raises BenchError when it is elsewhere."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname not in _LOOPBACK or parts.port is None:
        raise BenchError(f"{url}: the relay must listen on this machine, as in http://127.0.0.1:8080")
    return parts.hostname, parts.port


def _given(options: Options, pids: dict[str, int]) -> Target:
    if options.url is None or options.secret is None:
        raise BenchError("--url needs the relay's secret: --secret or RELAY_JWT_SECRET")
    return Target(options.url.rstrip("/"), options.secret, pids, None, None)


async def drive(options: Options, target: Target, screen: Screen) -> Live:
    """Live traffic on a relay that runs, checked; without the raw cycle. Raises BenchError."""
    async with aiohttp.ClientSession() as http:
        before = await scrape(http, target.url)
        async with load_generator(make_order(target, options)) as load:
            measured: Measured | None = None
            with screen.working(f"connecting {options.pairs * 2} devices") as show:
                while measured is None:
                    match await load.news():
                        case Connected(connections=connections):
                            show(f"{connections} devices connected")
                        case Progress(warm=warm, delivered=delivered, rate=rate):
                            phase = "measuring" if warm else "warm-up or end"
                            show(f"{phase}: {delivered:,} delivered, {rate:,.0f} messages/s")
                        case Measured() as found:
                            measured = found
            left, after = await _until_empty(http, target, before)
            load.dismiss()
            counts = await load.news()
    if not isinstance(counts, Counted):
        raise BenchError("the load generator did not tell its counts")
    checks = _checks(options, target, measured, counts, before, after, left)
    seconds, delivered = measured.seconds, max(1, measured.delivered)
    cpu = spent(measured.before, measured.after)
    rate = measured.delivered / seconds
    return Live(
        ok=all(check.ok for check in checks),
        mode="closed" if options.rate is None else "open",
        pairs=options.pairs,
        window=options.window,
        size=options.size,
        asked_rate=options.rate,
        seconds=seconds,
        messages=measured.delivered,
        rate=rate,
        late=measured.late,
        per_frame=measured.per_frame,
        limits=[],
        ratio=None,
        steady=None,
        delivered_ms=measured.delivered_ms,
        stored_ms=measured.stored_ms,
        cpu_us={
            name: used * 1e6 / delivered for name, used in cpu.items() if name not in ("others", "bench")
        },
        cores={name: used / seconds for name, used in cpu.items()},
        relay_rss=_memory(measured),
        commits=after.commits_since(before),
        counts=counts,
        checks=checks,
        relay_log=[] if target.node is None else list(target.node.complaints),
    )


def _memory(measured: Measured) -> dict[str, int]:
    moments: dict[str, dict[str, Usage]] = {
        "begin": measured.before,
        "mark": measured.marked,
        "end": measured.after,
    }
    return {name: usage["relay"].rss for name, usage in moments.items() if "relay" in usage}


async def _until_empty(
    http: aiohttp.ClientSession, target: Target, before: Scrape
) -> tuple[int | None, Scrape]:
    """Waits until nothing is left in the store, 5 s at most: documents left (None when that cannot be seen), metrics."""
    mongo = None
    if target.node is not None and target.mongo_uri is not None:
        mongo = Mongo(target.mongo_uri, target.node.database)
    deadline = perf_counter() + _EMPTY_SECONDS
    try:
        while True:
            left = None if mongo is None else int(await mongo.messages.count_documents({}))
            found = await scrape(http, target.url)
            if (not left and found.waiting <= before.waiting) or perf_counter() >= deadline:
                return left, found
            # Neither MongoDB nor the relay announces that nothing is left.
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        if mongo is not None:
            mongo.close()


def _checks(
    options: Options,
    target: Target,
    measured: Measured,
    counts: Counted,
    before: Scrape,
    after: Scrape,
    left: int | None,
) -> list[Check]:
    sent = counts.sent
    accepted = after.accepted - before.accepted
    ended = {name: count - before.ended[name] for name, count in after.ended.items()}
    waiting = after.waiting - before.waiting
    others = {name: count for name, count in ended.items() if name != "acknowledged" and count}
    found = [
        Check.that(
            "something was sent and delivered", bool(sent and measured.delivered), f"{measured.delivered:,}"
        ),
        Check.that("every message sent was stored", counts.stored == sent, f"{counts.stored:,} of {sent:,}"),
        Check.that(
            "every message was delivered exactly once",
            counts.delivered == sent and not counts.repeated and not counts.unknown,
            f"{counts.delivered:,} of {sent:,}, {counts.repeated:,} again, {counts.unknown:,} unknown",
        ),
        Check.that(
            "nothing was refused, no connection was lost",
            not counts.failed and not counts.closed,
            f"{counts.failed:,} refused, {counts.closed:,} lost"
            + "".join(f"; {text}" for text in counts.errors),
        ),
        Check.that(
            "the ledger balances",
            accepted == sent and ended["acknowledged"] == sent and not others and not waiting,
            f"{accepted:,} accepted, {ended['acknowledged']:,} acknowledged, {waiting:,} waiting"
            + "".join(f", {count:,} {name}" for name, count in others.items()),
        ),
    ]
    if left is not None:
        found.append(Check.that("no message is left in the store", not left, f"{left:,} left"))
    if target.node is not None:
        faults = target.node.faults
        found.append(Check.that("the relay logged no error", not faults, f"{faults} errors"))
    if options.messages is not None:
        found.append(
            Check.that(
                "as many as asked for were delivered in time",
                measured.delivered >= options.messages,
                f"{measured.delivered:,} of {options.messages:,}",
            )
        )
    return found
