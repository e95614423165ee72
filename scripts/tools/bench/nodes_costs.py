"""What single parts cost, for working out larger installations: a message, a call of MongoDB, a message to another node, an idle
device. CPU in µs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Final

import aiohttp
import msgspec

from scripts.tools.bench.processes import Usage, spent, usages
from scripts.tools.bench.report import Check, Show
from scripts.tools.bench.sites import Run, Site, by_kind, drive, read
from scripts.tools.bench.storm_calls import Devices

_REST_SECONDS: Final = 4.0


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One load: what a message took of each process, beyond what they take at rest, and its calls. ``commit_ms`` is the mean time of a
    group commit of messages."""

    name: str
    rate: float
    commit_ms: float
    mongo_requests: float
    publications: float
    relay: float
    mongod: float
    valkey: float


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Fitted to ``points``: a part for each message and a part for each call beneath. ``relay_request``: what a call of MongoDB costs
    the relay; ``relay_remote``: a message that goes to another node, ``relay_publication``: the group of them, look-up included.
    ``rest`` is what each process takes in a second without any load."""

    relay_message: float
    relay_request: float
    relay_remote: float
    relay_publication: float
    mongod_message: float
    mongod_request: float
    valkey_publication: float
    rest: dict[str, float]
    points: list[Point]
    checks: list[Check]


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """What each of ``devices`` that only listen takes in a second."""

    devices: int
    seconds: float
    cpu_us: dict[str, float]
    redis_calls: float
    mongo_requests: float
    checks: list[Check]


async def costs(
    one: Site,
    two: Site,
    rates: Sequence[float],
    show: Show,
    *,
    pairs: int,
    size: int,
    warmup: float,
    seconds: float,
) -> Costs:
    """One node, and two with sender and recipient apart, at each rate in turn. Raises what ``drive`` raises."""
    show("costs: at rest")
    pids = {
        **one.pids,
        **{f"{name} of two": pid for name, pid in two.pids.items() if name.startswith("relay")},
    }
    pids |= {name: pid for name, pid in two.pids.items() if name == "valkey"}
    before, began = usages(pids), perf_counter()
    await asyncio.sleep(min(_REST_SECONDS, seconds))
    rest = {
        name: used * 1e6 / (perf_counter() - began)
        for name, used in spent(before, usages(pids)).items()
        if name not in ("others", "bench")
    }
    # Both sites stand on one mongod, and each takes its part of its rest.
    resting = {
        "one node": (rest.get("relay 1", 0.0), rest.get("mongod", 0.0), 0.0),
        "two nodes": (
            sum(used for name, used in rest.items() if name.endswith("of two")),
            rest.get("mongod", 0.0),
            rest.get("valkey", 0.0),
        ),
    }
    points, checks = [], []
    for rate in rates:
        for name, where in (("one node", one), ("two nodes", two)):
            order = where.order(
                placement="first" if where is one else "apart",
                pairs=pairs,
                size=size,
                warmup=warmup,
                seconds=seconds,
                rate=rate,
            )
            run = await drive(where, order, show, f"costs: {name} at {rate:,.0f}/s")
            points.append(_point(name, run, resting[name]))
            checks += [
                Check(f"costs: {name} at {rate:,.0f}/s: {one.name}", one.ok, one.found) for one in run.checks
            ]
    return fitted(points, rest, checks)


def _point(name: str, run: Run, rest: tuple[float, float, float]) -> Point:
    relay, mongod, valkey = (
        max(0.0, run.cpu_us.get(kind, 0.0) - idle / max(run.rate, 1e-9))
        for kind, idle in zip(("relay", "mongod", "valkey"), rest, strict=True)
    )
    return Point(
        name=name,
        rate=run.rate,
        commit_ms=run.commits["send"].ms,
        mongo_requests=run.use.mongo_requests,
        publications=run.use.redis_publications,
        relay=relay,
        mongod=mongod,
        valkey=valkey,
    )


def fitted(points: Sequence[Point], rest: dict[str, float], checks: list[Check]) -> Costs:
    """The straight lines through these points."""
    alone = [point for point in points if point.name == "one node"]
    apart = [point for point in points if point.name != "one node"]
    message, request = line([point.mongo_requests for point in alone], [point.relay for point in alone])
    mongod = line([point.mongo_requests for point in points], [point.mongod for point in points])
    beyond = [point.relay - message - request * point.mongo_requests for point in apart]
    remote, publication = line([point.publications for point in apart], beyond)
    _, valkey = line([point.publications for point in apart], [point.valkey for point in apart])
    return Costs(
        relay_message=message,
        relay_request=request,
        relay_remote=remote,
        relay_publication=publication,
        mongod_message=mongod[0],
        mongod_request=mongod[1],
        valkey_publication=valkey,
        rest=rest,
        points=list(points),
        checks=checks,
    )


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """What is left at 0 and the slope of the line nearest to these points (least squares); neither is negative."""
    count = len(xs)
    if not count:
        return 0.0, 0.0
    mean_x, mean_y = sum(xs) / count, sum(ys) / count
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
    if slope <= 0:
        return max(0.0, mean_y), 0.0
    start = mean_y - slope * mean_x
    if start >= 0:
        return start, slope
    squares = sum(x * x for x in xs)
    return 0.0, sum(x * y for x, y in zip(xs, ys, strict=True)) / squares


async def idle(where: Site, crowd: Devices, count: int, seconds: float, show: Show) -> Idle:
    """Devices connect and only listen; what the same processes take without any is taken off. Raises BenchError and what the HTTP
    client, MongoDB and Redis raise."""
    async with aiohttp.ClientSession() as http:
        show("idle: nobody is connected")
        rest = await _second(where, http, min(seconds, _REST_SECONDS))
        await crowd.come(senders=False, ports=where.ports, at_once=64)
        show(f"idle: {count:,} devices listen for {seconds:g} s")
        busy = await _second(where, http, seconds)
        settled = await crowd.settle()
    cpu, redis, mongo = (
        {name: value - rest[part].get(name, 0.0) for name, value in busy[part].items()} for part in range(3)
    )
    return Idle(
        devices=count,
        seconds=seconds,
        cpu_us={kind: max(0.0, used) * 1e6 / count for kind, used in cpu.items()},
        redis_calls=(redis.get("lookups", 0.0) + redis.get("publications", 0.0)) / count,
        mongo_requests=mongo["requests"] / count,
        checks=[
            Check.that(
                "idle: every connection stays",
                not settled.closed and not settled.failed,
                f"{settled.closed:,} lost, {settled.failed:,} errors"
                + "".join(f"; {text}" for text in settled.errors),
            )
        ],
    )


async def _second(
    where: Site, http: aiohttp.ClientSession, seconds: float
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    before = await read(where, http)
    used: dict[str, Usage] = usages(where.pids)
    began = perf_counter()
    await asyncio.sleep(seconds)
    cpu = spent(used, usages(where.pids))
    took = perf_counter() - began
    after = await read(where, http)
    return (
        {kind: value / took for kind, value in by_kind(cpu).items() if kind not in ("others", "bench")},
        {name: (value - before.redis[name]) / took for name, value in after.redis.items()},
        {name: (value - before.mongo[name]) / took for name, value in after.mongo.items()},
    )
