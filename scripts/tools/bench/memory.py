"""Memory: what an idle connection costs, and whether long traffic makes the relay grow."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from scripts.tools.bench import live
from scripts.tools.bench.live import Live, Options
from scripts.tools.bench.messages import Connected, Counted
from scripts.tools.bench.processes import usage
from scripts.tools.bench.relay_metrics import scrape
from scripts.tools.bench.report import Check, Screen
from scripts.tools.bench.stage import BenchError, load_generator, raise_file_limit

MARK: Final = 100_000
_SETTLE_SECONDS: Final = 3.0
_SPARE_FILES: Final = 200
_SLOWEST_RATE: Final = 500


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """Memory in bytes, of the relay."""

    command: str = "idle"
    ok: bool
    connections: int
    connects_per_second: float
    rss_before: int
    rss_after: int
    bytes_per_connection: float
    checks: list[Check]


class Soak(msgspec.Struct, frozen=True, kw_only=True):
    """``growth_percent``: of the relay's memory from the first ``mark`` messages to the end."""

    command: str = "soak"
    ok: bool
    mark: int
    growth_percent: float | None
    live: Live


async def idle(connections: int, mongo_uri: str | None, screen: Screen) -> Idle:
    """Opens idle devices against a relay of its own. Raises BenchError and what mongod and the driver raise."""
    raise_file_limit(connections + _SPARE_FILES)
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-")))
        uri, mongo_pids = await stack.enter_async_context(live.database(mongo_uri, directory))
        target = await stack.enter_async_context(live.own_relay(uri, mongo_pids, directory))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        await scrape(http, target.url)
        pid = target.pids["relay"]
        before = usage(pid).rss
        order = msgspec.structs.replace(live.make_order(target, Options()), connections=connections)
        with screen.working(f"connecting {connections:,} devices"):
            load = await stack.enter_async_context(load_generator(order))
            connected = await load.news()
            if not isinstance(connected, Connected):
                raise BenchError("the load generator did not connect")
            await asyncio.sleep(_SETTLE_SECONDS)
            after = usage(pid).rss
            seen = int((await scrape(http, target.url)).of("relay_connections"))
            load.dismiss()
            counts = await load.news()
        lost = counts.closed if isinstance(counts, Counted) else connections
        faults = target.node.faults if target.node is not None else 0
        checks = [
            Check.that(
                "every device is connected", connected.connections == seen == connections, f"{seen:,}"
            ),
            Check.that("no connection was lost", not lost, f"{lost:,} lost"),
            Check.that("the relay logged no error", not faults, f"{faults} errors"),
        ]
        return Idle(
            ok=all(check.ok for check in checks),
            connections=connections,
            connects_per_second=connections / connected.seconds,
            rss_before=before,
            rss_after=after,
            bytes_per_connection=(after - before) / connections,
            checks=checks,
        )


async def soak(messages: int, options: Options, screen: Screen) -> Soak:
    """Live traffic until so many messages were delivered. Raises as ``live.run`` does."""
    mark = min(MARK, max(1, messages // 2))
    asked = dataclasses.replace(
        options, messages=messages, mark=mark, seconds=60 + messages / _SLOWEST_RATE, limit_seconds=0
    )
    found = await live.run(asked, screen)
    memory = found.relay_rss
    growth = None
    if "mark" in memory and "end" in memory:
        growth = (memory["end"] / memory["mark"] - 1) * 100
    return Soak(ok=found.ok, mark=mark, growth_percent=growth, live=found)
