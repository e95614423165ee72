"""The control plane with many people: lists at any depth, how MongoDB finds them, and log-ins beside messages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Final

import msgspec
from rich.table import Table

from scripts.tools.bench import listings, live
from scripts.tools.bench.listings import SCANNED, SORTED, Listing
from scripts.tools.bench.live import Live, Target
from scripts.tools.bench.report import Check, Screen
from scripts.tools.bench.stage import BenchError
from scripts.tools.bench.storm import CLIENTS, HASHER, PASSWORD, Storm, hash_ms, storm
from scripts.tools.generate import Generated, fill
from scripts.tools.population import Plan

GOAL_MS: Final = 20.0
FLAT: Final = 2.0
# Below this the differences are those of the machine, not of the query.
_SMALL_MS: Final = 5.0
_SEED: Final = 1
_STORM_WARMUP: Final = 2.0
_MESSAGES_WARMUP: Final = 3.0


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for. ``samples`` requests are timed at each depth; log-ins and messages for ``seconds`` each."""

    users: int = 100_000
    memberships: int = 1_000_000
    contacts: int = 400_000
    heavy: int = 2000
    samples: int = 50
    seconds: float = 10
    pairs: int = 100
    rate: float = 500
    mongo_uri: str | None = None


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """The result."""

    command: str = "control"
    ok: bool
    documents: dict[str, int]
    generated_seconds: float
    lists: list[Listing]
    storm: Storm
    calm_latency: Live
    storm_latency: Live
    calm_throughput: Live
    storm_throughput: Live
    checks: list[Check]


async def run(options: Options, screen: Screen) -> Control:
    """Everything, on a relay and a database of the bench's own. Raises BenchError and what mongod and the driver raise."""
    plan = Plan(
        users=options.users,
        memberships=options.memberships,
        contacts=options.contacts,
        heavy=options.heavy,
        seed=_SEED,
        now=datetime.now(UTC).replace(microsecond=0),
        password=await asyncio.to_thread(HASHER.hash, PASSWORD),
    )
    problem = plan.problem()
    if problem is not None:
        raise BenchError(problem)
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-")))
        uri, pids = await stack.enter_async_context(live.database(options.mongo_uri, directory))
        target = await stack.enter_async_context(
            live.own_relay(uri, pids | {"bench": os.getpid()}, directory)
        )
        assert target.node is not None
        began = perf_counter()
        people = await _generate(uri, target.node.database, plan, screen)
        took = perf_counter() - began
        lists = await listings.measure(target, people, options.samples, screen)
        return await _beside(options, target, people, took, lists, screen)


async def _generate(uri: str, database: str, plan: Plan, screen: Screen) -> Generated:
    done = {"people": 0, "contacts": 0, "memberships": 0}
    with screen.working(f"generating {plan.users:,} people, {plan.memberships:,} memberships") as show:

        def advance(part: str, more: int) -> None:
            done[part] += more
            show("generated: " + ", ".join(f"{count:,} {name}" for name, count in done.items()))

        return await asyncio.to_thread(fill, uri, database, plan, advance)


# -- log-ins beside messages


async def _beside(
    options: Options,
    target: Target,
    people: Generated,
    took: float,
    lists: list[Listing],
    screen: Screen,
) -> Control:
    closed_loop = live.Options(
        pairs=options.pairs, seconds=options.seconds, warmup=min(_MESSAGES_WARMUP, options.seconds)
    )
    open_loop = replace(closed_loop, rate=options.rate)
    calm_latency = await live.drive(open_loop, target, screen)
    calm_throughput = await live.drive(closed_loop, target, screen)
    hashing = await asyncio.to_thread(hash_ms)
    names = [username for _, username, _ in people.examples]
    with screen.working(f"log-ins alone, {options.seconds:g} s"):
        async with storm(target.url, names) as logins:
            await asyncio.sleep(min(_STORM_WARMUP, options.seconds))
            alone = logins.mark()
            await asyncio.sleep(options.seconds)
            rate, p50 = logins.since(alone)
    beside = []
    runs = []
    refused = logins.refused
    for loop in (open_loop, closed_loop):
        async with storm(target.url, names) as logins:
            await asyncio.sleep(min(_STORM_WARMUP, options.seconds))
            mark = logins.mark()
            runs.append(await live.drive(loop, target, screen))
            beside.append(logins.since(mark)[0])
        refused += logins.refused
    found = Storm(CLIENTS, hashing, rate, p50, beside[0], beside[1], refused)
    checks = [*_list_checks(lists), *_storm_checks(found, [calm_latency, calm_throughput, *runs])]
    return Control(
        ok=all(check.ok for check in checks),
        documents=people.counts,
        generated_seconds=took,
        lists=lists,
        storm=found,
        calm_latency=calm_latency,
        storm_latency=runs[0],
        calm_throughput=calm_throughput,
        storm_throughput=runs[1],
        checks=checks,
    )


# -- what must be true, what is shown


def _list_checks(lists: list[Listing]) -> list[Check]:
    found = []
    for one in lists[:5]:
        first = one.places[0]
        deepest = max(place.p50 for place in one.places)
        flat = one.flatness <= FLAT or deepest <= _SMALL_MS
        found += [
            Check.that(
                f"first page under {GOAL_MS:g} ms: {one.name}", first.p50 < GOAL_MS, f"{first.p50:.1f} ms"
            ),
            Check.that(f"flat at any depth: {one.name}", flat, f"{one.flatness:.2f} times the first page"),
        ]
    for one in lists:
        bad = [plan for plan in one.plans if SCANNED in plan or plan.endswith(SORTED)]
        found.append(
            Check.that(
                f"an index and no sort: {one.name}",
                not bad and bool(one.plans),
                "; ".join(bad) or f"{len(one.plans)} plans",
            )
        )
    return found


def _storm_checks(logins: Storm, runs: list[Live]) -> list[Check]:
    failed = [check for run in runs for check in run.checks if not check.ok]
    return [
        Check.that("no log-in was refused", not logins.refused, f"{logins.refused} refused"),
        Check.that(
            "every message was accounted for, with and without log-ins",
            not failed,
            "; ".join(f"{check.name}: {check.found}" for check in failed) or f"{len(runs)} runs",
        ),
    ]


def show(found: Control, screen: Screen) -> None:
    """Tables for people."""
    documents = ", ".join(f"{count:,} {name}" for name, count in found.documents.items())
    screen.out.print(f"generated in {found.generated_seconds:.0f} s: {documents}")
    table = Table(title="Lists, over HTTP", title_justify="left", title_style="bold")
    for column in ("list", "depth", "items", "p50 ms", "p99 ms", "examined", "returned"):
        table.add_column(column, justify="left" if column == "list" else "right")
    for one in found.lists:
        for number, place in enumerate(one.places):
            extra = ("", "") if number else (f"{one.examined:,}", f"{one.returned:,}")
            title = "" if number else one.name
            table.add_row(
                title, f"{place.depth:,}", str(place.items), f"{place.p50:.1f}", f"{place.p99:.1f}", *extra
            )
    screen.out.print(table)
    logins = found.storm
    table = Table(title="Log-ins beside messages", title_justify="left", title_style="bold")
    for column in ("", "calm", "log-ins"):
        table.add_column(column, justify="left" if not column else "right")
    for name, calm, busy in (
        ("open loop", found.calm_latency, found.storm_latency),
        ("closed loop", found.calm_throughput, found.storm_throughput),
    ):
        table.add_row(f"{name}: messages/s", f"{calm.rate:,.0f}", f"{busy.rate:,.0f}")
        for part in ("p50", "p99"):
            times = [f"{getattr(run.delivered_ms, part):.1f}" for run in (calm, busy)]
            table.add_row(f"{name}: delivered {part} ms", *times)
    table.add_row(
        "log-ins/s alone", "", f"{logins.alone:.1f} (p50 {logins.p50:.0f} ms, {logins.clients} at once)"
    )
    table.add_row(
        "log-ins/s beside messages", "", f"{logins.beside_latency:.1f} and {logins.beside_throughput:.1f}"
    )
    table.add_row("one hash alone", "", f"{logins.hash_ms:.1f} ms")
    screen.out.print(table)
    screen.checks(found.checks)
