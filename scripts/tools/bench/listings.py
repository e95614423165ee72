"""Lists over HTTP, timed at several depths, and how MongoDB finds their pages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from statistics import median
from time import perf_counter
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
from pymongo import MongoClient

from relay.security.tokens import mint
from scripts.tools.bench.live import Target
from scripts.tools.bench.report import Screen
from scripts.tools.bench.stage import AUDIENCE, BenchError
from scripts.tools.generate import Generated
from scripts.tools.population import DEVICE

SORTED: Final = ", sorted in memory"
SCANNED: Final = "COLLSCAN"
_DEPTHS: Final = (0.25, 0.5, 0.75, 1.0)
_MOST_PAGES: Final = 400
_READS: Final = ("find", "getMore", "aggregate", "count", "distinct")


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


async def measure(target: Target, people: Generated, samples: int, screen: Screen) -> list[Listing]:
    """The lists of the heavy one, and searches. Raises BenchError, PyMongoError and what the HTTP client raises."""
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
                    pages = _Pages(http, target.url, path, samples, show)
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
        """Walks to the end, then times the first page and up to four others."""
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
        times: list[list[float]] = [[] for _ in chosen]
        items = [0 for _ in chosen]
        # Turn by turn: what else the machine does then slows every depth alike.
        for turn in range(self._samples):
            self._show(f"{self._url.partition('?')[0]}: {turn} of {self._samples} at {len(chosen)} depths")
            for place, (_, cursor) in enumerate(self._cursors):
                began = perf_counter()
                page = await self._get(cursor)
                times[place].append((perf_counter() - began) * 1000)
                items[place] = _length(page)
        return [
            Place(depth, count, median(found), sorted(found)[int(len(found) * 0.99)])
            for (depth, _), count, found in zip(self._cursors, items, times, strict=True)
        ]

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
    # A node's book-keeping goes on beside the lists; it reads one document for each node.
    books = {"$not": {"$regex": r"\.balances$"}}
    reads = {"appName": "relay", "planSummary": {"$exists": True}, "ns": books}
    entries: list[dict[str, Any]] = list(db["system.profile"].find(reads))
    return [entry for entry in entries if entry["op"] == "query" or set(entry["command"]) & set(_READS)]


def _plan(entry: dict[str, Any]) -> str:
    collection = str(entry["ns"]).partition(".")[2]
    # One part for each branch of an $or, mostly the same.
    parts = dict.fromkeys(str(entry["planSummary"]).replace("}, ", "}; ").split("; "))
    return f"{collection}: {' and '.join(parts)}" + (SORTED if entry.get("hasSortStage") else "")


def _examined(entry: dict[str, Any]) -> int:
    return max(int(entry.get("keysExamined", 0)), int(entry.get("docsExamined", 0)))
