"""The control plane with many people: lists at any depth, how MongoDB finds them, and log-ins beside messages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
from argon2 import PasswordHasher, Type
from pymongo import MongoClient
from rich.table import Table

from relay.security.tokens import mint
from scripts.tools.bench import live
from scripts.tools.bench.live import Live, Target
from scripts.tools.bench.report import Check, Screen
from scripts.tools.bench.stage import AUDIENCE, BenchError
from scripts.tools.generate import Generated, fill
from scripts.tools.population import DEVICE, Plan

GOAL_MS: Final = 20.0
FLAT: Final = 2.0
# Below this the differences are those of the machine, not of the query.
_SMALL_MS: Final = 5.0
_PASSWORD: Final = "one password for all of them"
_SEED: Final = 1
_DEPTHS: Final = (0.25, 0.5, 0.75, 1.0)
_MOST_PAGES: Final = 400
_CLIENTS: Final = 16
_HASHES: Final = 10
_STORM_WARMUP: Final = 2.0
_SORTED: Final = ", sorted in memory"
_READS: Final = ("find", "getMore", "aggregate", "count", "distinct")


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


class Place(msgspec.Struct, frozen=True):
    """Pages at one depth (items before them), in ms. ``items`` is how many a page held."""

    depth: int
    items: int
    p50: float
    p99: float


class Listing(msgspec.Struct, frozen=True):
    """One list. ``flatness``: the slowest depth's median over the first page's. ``plans`` is how MongoDB found them, by
    collection; ``examined`` the most keys and documents of one query, ``returned`` its results."""

    name: str
    places: list[Place]
    flatness: float
    plans: list[str]
    examined: int
    returned: int


class Storm(msgspec.Struct, frozen=True):
    """Log-ins. ``hash_ms``: one hash alone on this machine; ``alone`` and ``beside`` are log-ins/s without and with the
    messages; ``p50`` of the former in ms, with ``clients`` asking at once."""

    clients: int
    hash_ms: float
    alone: float
    p50: float
    beside_latency: float
    beside_throughput: float
    refused: int


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
        password=await asyncio.to_thread(PasswordHasher(2, 19_456, 1, type=Type.ID).hash, _PASSWORD),
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
        lists = await _lists(options, target, people, screen)
        return await _beside(options, target, people, took, lists, screen)


async def _generate(uri: str, database: str, plan: Plan, screen: Screen) -> Generated:
    done = {"people": 0, "contacts": 0, "memberships": 0}
    with screen.working(f"generating {plan.users:,} people, {plan.memberships:,} memberships") as show:

        def advance(part: str, more: int) -> None:
            done[part] += more
            show("generated: " + ", ".join(f"{count:,} {name}" for name, count in done.items()))

        return await asyncio.to_thread(fill, uri, database, plan, advance)


# -- lists


async def _lists(options: Options, target: Target, people: Generated, screen: Screen) -> list[Listing]:
    assert target.node is not None
    assert target.mongo_uri is not None
    user, username, name = people.examples[0]
    token = mint(target.secret, user, DEVICE, audience=AUDIENCE, lifetime=86_400)
    other = people.examples[1][2].split()[0].lower()
    paths = {
        "conversations of the heavy user": "/v1/conversations?limit=50",
        "contacts of the heavy user": "/v1/contacts?limit=50",
        "people, two letters": f"/v1/users?q={quote(username[:2])}&limit=20",
        "people, four letters": f"/v1/users?q={quote(username[:4])}&limit=20",
        "people, a whole name": f"/v1/users?q={quote(name)}&limit=20",
        "conversations with somebody, by name": f"/v1/conversations?q={quote(other)}&limit=50",
        "changes since the beginning": "/v1/changes",
    }
    found = []
    with MongoClient[dict[str, Any]](target.mongo_uri) as client:
        db = client[target.node.database]
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as http:
            for title, path in paths.items():
                with screen.working(f"list: {title}") as show:
                    pages = _Pages(http, target.url, path, options.samples, show)
                    places = await pages.measure()
                    plans = await pages.explain(db)
                medians = [place.p50 for place in places]
                found.append(
                    Listing(
                        name=title,
                        places=places,
                        flatness=max(medians) / medians[0],
                        plans=sorted({_plan(entry) for entry in plans}),
                        examined=max((_examined(entry) for entry in plans), default=0),
                        returned=max((int(entry.get("nreturned", 0)) for entry in plans), default=0),
                    )
                )
    return found


class _Pages:
    """The pages of one list."""

    def __init__(
        self, http: aiohttp.ClientSession, url: str, path: str, samples: int, show: Callable[[str], None]
    ) -> None:
        self._http = http
        self._url = url + path
        self._name = "since" if path.startswith("/v1/changes") else "cursor"
        self._samples = samples
        self._show = show
        self._cursors: list[tuple[int, str | None]] = [(0, None)]

    async def measure(self) -> list[Place]:
        """Walks to the end, then times the first page and four others."""
        depth, page = 0, await self._get(None)
        while (following := page["next"]) is not None and len(self._cursors) < _MOST_PAGES:
            if self._name == "since" and not page["more"]:
                break
            depth += _length(page)
            self._cursors.append((depth, following))
            page = await self._get(following)
        last = len(self._cursors) - 1
        chosen = sorted({0, *(round(last * part) for part in _DEPTHS)})
        self._cursors = [self._cursors[place] for place in chosen]
        return [await self._time(*place) for place in self._cursors]

    async def _time(self, depth: int, cursor: str | None) -> Place:
        self._show(f"{self._url.partition('?')[0]}: at depth {depth:,}")
        times, items = [], 0
        for _ in range(self._samples):
            began = perf_counter()
            page = await self._get(cursor)
            times.append((perf_counter() - began) * 1000)
            items = _length(page)
        times.sort()
        return Place(depth, items, median(times), times[min(len(times) - 1, int(len(times) * 0.99))])

    async def explain(self, db: Any) -> list[dict[str, Any]]:
        """What MongoDB noted of the queries behind those pages."""
        found: list[dict[str, Any]] = []
        for _, cursor in self._cursors:
            async with _profiled(db):
                await self._get(cursor)
            found += await asyncio.to_thread(_noted, db)
        return found

    async def _get(self, cursor: str | None) -> dict[str, Any]:
        url = self._url
        if cursor is not None:
            url += f"{'&' if '?' in url else '?'}{self._name}={quote(cursor)}"
        async with self._http.get(url) as answer:
            if answer.status != 200:
                raise BenchError(f"the relay answered {answer.status}: {(await answer.text())[:200]}")
            page: dict[str, Any] = await answer.json()
            return page


def _length(page: dict[str, Any]) -> int:
    return sum(len(items) for items in page.values() if isinstance(items, list))


@contextlib.asynccontextmanager
async def _profiled(db: Any) -> AsyncIterator[None]:
    await asyncio.to_thread(db.drop_collection, "system.profile")
    await asyncio.to_thread(db.command, "profile", 2)
    try:
        yield
    finally:
        await asyncio.to_thread(db.command, "profile", 0)


def _noted(db: Any) -> list[dict[str, Any]]:
    reads = {"appName": "relay", "planSummary": {"$exists": True}}
    entries: list[dict[str, Any]] = list(db["system.profile"].find(reads))
    return [entry for entry in entries if entry["op"] == "query" or set(entry["command"]) & set(_READS)]


def _plan(entry: dict[str, Any]) -> str:
    collection = str(entry["ns"]).partition(".")[2]
    # One part for each branch of an $or, mostly the same.
    parts = dict.fromkeys(str(entry["planSummary"]).replace("}, ", "}; ").split("; "))
    return f"{collection}: {' and '.join(parts)}" + (_SORTED if entry.get("hasSortStage") else "")


def _examined(entry: dict[str, Any]) -> int:
    return max(int(entry.get("keysExamined", 0)), int(entry.get("docsExamined", 0)))


# -- log-ins beside messages


async def _beside(
    options: Options,
    target: Target,
    people: Generated,
    took: float,
    lists: list[Listing],
    screen: Screen,
) -> Control:
    open_loop = live.Options(pairs=options.pairs, seconds=options.seconds, rate=options.rate)
    closed_loop = live.Options(pairs=options.pairs, seconds=options.seconds)
    calm_latency = await live.drive(open_loop, target, screen)
    calm_throughput = await live.drive(closed_loop, target, screen)
    hash_ms = await asyncio.to_thread(_hash_ms)
    names = [username for _, username, _ in people.examples]
    with screen.working(f"log-ins alone, {options.seconds:g} s"):
        async with _storm(target.url, names) as storm:
            await asyncio.sleep(_STORM_WARMUP)
            alone = storm.mark()
            await asyncio.sleep(options.seconds)
            rate, p50 = storm.since(alone)
    beside = []
    runs = []
    refused = storm.refused
    for loop in (open_loop, closed_loop):
        async with _storm(target.url, names) as storm:
            await asyncio.sleep(_STORM_WARMUP)
            mark = storm.mark()
            runs.append(await live.drive(loop, target, screen))
            beside.append(storm.since(mark)[0])
        refused += storm.refused
    found = Storm(_CLIENTS, hash_ms, rate, p50, beside[0], beside[1], refused)
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


class _Storm:
    """Log-ins as fast as they are answered."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.refused = 0

    def mark(self) -> tuple[int, float]:
        """Now, for ``since``."""
        return len(self.times), perf_counter()

    def since(self, mark: tuple[int, float]) -> tuple[float, float]:
        """Log-ins a second and their median in ms."""
        count, began = mark
        times = self.times[count:]
        return len(times) / (perf_counter() - began), median(times) if times else 0.0

    async def log_in(self, http: aiohttp.ClientSession, url: str, username: str, device: str) -> None:
        """One after the other, until it is cancelled."""
        body = {
            "username": username,
            "password": _PASSWORD,
            "device": {"id": device, "name": device, "platform": "bench"},
        }
        while True:
            began = perf_counter()
            async with http.post(f"{url}/v1/auth/login", json=body) as answer:
                await answer.read()
                if answer.status == 200:
                    self.times.append((perf_counter() - began) * 1000)
                else:
                    self.refused += 1
                    await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def _storm(url: str, names: list[str]) -> AsyncIterator[_Storm]:
    storm = _Storm()
    connector = aiohttp.TCPConnector(limit=_CLIENTS)
    async with aiohttp.ClientSession(connector=connector) as http:
        tasks = [
            asyncio.create_task(
                storm.log_in(http, url, names[number % len(names)], f"storm-{number}"),
                name=f"log-ins {number}",
            )
            for number in range(_CLIENTS)
        ]
        try:
            yield storm
        finally:
            for task in tasks:
                task.cancel()
            failed = await asyncio.gather(*tasks, return_exceptions=True)
    for error in failed:
        if isinstance(error, aiohttp.ClientError):
            raise error


def _hash_ms() -> float:
    hasher = PasswordHasher(2, 19_456, 1, type=Type.ID)
    stored = hasher.hash(_PASSWORD)
    times = []
    for _ in range(_HASHES):
        began = perf_counter()
        hasher.verify(stored, _PASSWORD)
        times.append((perf_counter() - began) * 1000)
    return median(times)


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
        bad = [plan for plan in one.plans if "COLLSCAN" in plan or plan.endswith(_SORTED)]
        found.append(
            Check.that(
                f"an index and no sort: {one.name}",
                not bad and bool(one.plans),
                "; ".join(bad) or f"{len(one.plans)} plans",
            )
        )
    return found


def _storm_checks(storm: Storm, runs: list[Live]) -> list[Check]:
    failed = [check for run in runs for check in run.checks if not check.ok]
    return [
        Check.that("no log-in was refused", not storm.refused, f"{storm.refused} refused"),
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
    storm = found.storm
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
        "log-ins/s alone", "", f"{storm.alone:.1f} (p50 {storm.p50:.0f} ms, {storm.clients} at once)"
    )
    table.add_row(
        "log-ins/s beside messages", "", f"{storm.beside_latency:.1f} and {storm.beside_throughput:.1f}"
    )
    table.add_row("one hash alone", "", f"{storm.hash_ms:.1f} ms")
    screen.out.print(table)
    screen.checks(found.checks)
