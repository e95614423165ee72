"""The cluster through its routers: what is read of it, and the commands that change it. Only what MongoDB documents for ``mongos``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

from pymongo import ASCENDING, IndexModel, MongoClient, ReadPreference
from pymongo import timeout as time_limit
from pymongo.database import Database
from pymongo.errors import (
    ConfigurationError,
    ConnectionFailure,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)

from config.settings import Settings
from scripts.tools.shard.layout import (
    Cluster,
    Found,
    Held,
    Range,
    Shard,
    Span,
    Wanted,
    Zoned,
    alone,
    wanted,
    wanted_media,
)

_OLDEST: Final = (6, 0)
_SELECT_SECONDS: Final = 5.0
_READ_SECONDS: Final = 15.0
_BUSY_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 2.0
_MOST_PIECES: Final = 10_000
_MOST_CHANGES: Final = 100
_MOMENT_SECONDS: Final = 0.2

_UNAUTHORIZED: Final = frozenset({13, 18})
_NAMESPACE_NOT_FOUND: Final = 26
# A move, a split or an index build that goes on elsewhere: the balancer's, or somebody's.
_BUSY: Final = frozenset({24, 46, 117})
_OVERLAP: Final = 178
# Somebody changed the ranges since they were read.
_CHANGED: Final = 13388
_IS_A_BOUND: Final = 72
_TOO_LARGE: Final = frozenset({153})

Say = Callable[[str], None]
"""Tells what is being waited for."""


class Refused(Exception):
    """What ends the program with exit code 1; ``str()`` is the line for people."""


class TooLarge(Exception):
    """A range is larger than MongoDB moves at once."""


class Changed(Exception):
    """The ranges are no longer what they were when they were read."""


class Router:
    """A sharded cluster through ``mongos``."""

    def __init__(
        self,
        client: MongoClient[dict[str, Any]],
        database: str,
        ttl: int,
        fates: int,
        *,
        busy_seconds: float,
    ) -> None:
        """``ttl`` and ``fates`` in seconds, for indexes that are not there yet. Waits for other moves for ``busy_seconds``."""
        self._client = client
        self.database = database
        self._wanted = wanted(database, ttl, fates)
        self._busy_seconds = busy_seconds
        self.version = ""

    def check(self) -> None:
        """Makes sure that it is a router, and young enough. Raises Refused."""
        hello = self._client.admin.command("hello")
        if hello.get("msg") != "isdbgrid":
            what = f"the replica set {hello['setName']}" if "setName" in hello else "a standalone server"
            raise Refused(
                f"RELAY_MONGO_URI leads to {what}, not to a sharded cluster; name the cluster's routers (mongos). "
                "How one becomes the other: docs/operations.md, Sharding"
            )
        self.version = str(self._client.admin.command("buildInfo")["version"])
        if tuple(map(int, self.version.split(".")[:2])) < _OLDEST:
            raise Refused(f"the routers are MongoDB {self.version}; moving ranges takes 6.0 or later")

    def read(self) -> Cluster:
        """How everything is now. When a shard does not answer, numbers and indexes are missing."""
        with time_limit(_READ_SECONDS):
            config = self._database("config")
            rows = self._client.admin.command("listShards")["shards"]
            shards = tuple(
                Shard(row["_id"], row["host"], tuple(row.get("tags", ())), bool(row.get("draining")))
                for row in sorted(rows, key=lambda row: str(row["_id"]))
            )
            database = config["databases"].find_one({"_id": self.database})
            balancer = self._client.admin.command("balancerStatus")
            collections = [self._sharding(one) for one in self._wanted]
        problem = None
        try:
            with time_limit(_READ_SECONDS):
                collections += self._media()
                collections = [self._with_numbers(one) for one in collections]
        except PyMongoError as error:
            if getattr(error, "code", None) in _UNAUTHORIZED:
                raise
            problem = f"not every shard answers ({_reason(error)})"
        mode = str(balancer["mode"])
        return Cluster(
            self.database,
            self.version,
            None if database is None else str(database["primary"]),
            shards,
            "moving" if mode != "off" and balancer.get("inBalancerRound") else mode,
            tuple(collections),
            problem,
        )

    def create_database(self) -> None:
        """Registers the database, with a primary shard of MongoDB's choice."""
        self._client.admin.command("enableSharding", self.database)

    def create_indexes(self, what: Wanted, indexes: Sequence[IndexModel]) -> None:
        """Makes indexes on every shard that has part of the collection."""
        self._database(what.database)[what.name].create_indexes(list(indexes))

    def shard_collection(self, what: Wanted) -> None:
        """Shards a collection by its field."""
        self._client.admin.command("shardCollection", what.namespace, key={what.field: 1})

    def add_to_zone(self, shard: str, zone: str) -> None:
        """Puts a shard into a zone."""
        self._client.admin.command("addShardToZone", shard, zone=zone)

    def zone(self, what: Wanted, span: Span, zone: str | None) -> None:
        """Gives a range to a zone, or takes it off its zone (None)."""
        self._client.admin.command(
            "updateZoneKeyRange", what.namespace, min=what.key(span.low), max=what.key(span.high), zone=zone
        )

    def split(self, what: Wanted, at: str) -> None:
        """Begins a range there, unless one does. Raises Refused."""
        command = partial(self._client.admin.command, "split", what.namespace, middle=what.key(at))
        for _ in range(_MOST_CHANGES):
            try:
                return self._patiently(command, lambda _: None)
            except Changed:
                time.sleep(_MOMENT_SECONDS)
            except OperationFailure as error:
                if error.code == _IS_A_BOUND:
                    return None
                raise
        raise Refused(f"{what.name} cannot be split at {at}: its ranges keep changing")

    def place(
        self, what: Wanted, span: Span, shard: str, *, force: bool = False, say: Say = lambda _: None
    ) -> None:
        """Moves what lies in the span and is not on the shard, piece by piece, and returns when all of it is there. With ``force``
        also a key with more data than MongoDB moves at once; while that moves nothing is written to the collection. Raises
        Refused."""
        changes = 0
        for _ in range(_MOST_PIECES):
            away = [one.span for one in self.ranges(what, span) if one.shard != shard]
            if not away:
                return
            try:
                self._move_some(what, away[0], shard, force=force, say=say)
            except Changed:
                changes += 1
                if changes > _MOST_CHANGES:
                    break
                time.sleep(_MOMENT_SECONDS)
        raise Refused(f"{what.name} {span} does not stay on {shard}: something else moves it, too")

    def ranges(self, what: Wanted, span: Span) -> list[Range]:
        """Where a span lies now, in order."""
        return self._sharding(what).owners(span)

    def count(self, what: Wanted, span: Span) -> int | None:
        """How many documents lie in a span; None when that takes too long."""
        bounds = {"$gte": span.low, "$lt": span.high}
        try:
            with time_limit(_READ_SECONDS):
                return self._database(what.database)[what.name].count_documents({what.field: bounds})
        except PyMongoError as error:
            if error.timeout:
                return None
            raise

    def _database(self, name: str) -> Database[dict[str, Any]]:
        """Whatever the URI says: a secondary may not know yet what was just changed."""
        return self._client.get_database(name, read_preference=ReadPreference.PRIMARY)

    def _move_some(self, what: Wanted, piece: Span, shard: str, *, force: bool, say: Say) -> None:
        """Moves a piece, or as much of its beginning as MongoDB moves at once. Raises Refused, Changed."""

        def move(**fields: Any) -> None:
            values = {"toShard": shard, "min": what.key(piece.low), **fields}
            self._patiently(lambda: self._client.admin.command("moveRange", what.namespace, **values), say)

        with suppress(TooLarge):
            return move(max=what.key(piece.high))
        with suppress(TooLarge):
            return move()
        first = self._first(what, piece)
        if not force:
            raise Refused(
                f"{what.field} {first} has more data than MongoDB moves at once; scripts/shard move with --force-jumbo moves it, "
                f"and nothing is written to {what.name} meanwhile"
            )
        return move(max=what.key(alone(first).high), forceJumbo=True)

    def _first(self, what: Wanted, piece: Span) -> str:
        found = self._database(what.database)[what.name].find_one(
            {what.field: {"$gte": piece.low, "$lt": piece.high}},
            {what.field: 1},
            sort=[(what.field, ASCENDING)],
        )
        if found is None:
            raise Changed
        return str(found[what.field])

    def _patiently(self, work: Callable[[], object], say: Say) -> None:
        """Does what MongoDB does one at a time, again while others are at it. Raises Refused, Changed, TooLarge."""
        until, told = time.monotonic() + self._busy_seconds, False
        while True:
            try:
                work()
                return
            except OperationFailure as error:
                if error.code == _CHANGED:
                    raise Changed from None
                if error.code in _TOO_LARGE:
                    raise TooLarge from None
                if error.code not in _BUSY:
                    raise
                if time.monotonic() > until:
                    raise Refused(
                        f"another move has been under way for {self._busy_seconds:g} s, the balancer's or somebody's; "
                        "try again later, or stop the balancer (sh.stopBalancer() in mongosh) meanwhile"
                    ) from None
            if not told:
                say("another move is under way; waiting for it")
                told = True
            time.sleep(min(_PAUSE_SECONDS, max(until - time.monotonic(), 0) + 0.1))

    def _media(self) -> list[Found]:
        media = wanted_media(self.database)
        there = self._database(media.database).list_collection_names(filter={"name": media.name})
        return [self._sharding(media)] if there else []

    def _sharding(self, what: Wanted) -> Found:
        config = self._database("config")
        # Since MongoDB 8.0 collections that are not sharded may be listed, too.
        about = config["collections"].find_one({"_id": what.namespace, "unsplittable": {"$ne": True}})
        field = what.field

        def span(row: Mapping[str, Any]) -> Span:
            return Span(row["min"].get(field), row["max"].get(field))

        ranges: tuple[Range, ...] = ()
        if about is not None and list(about["key"]) == [field]:
            rows = config["chunks"].find({"uuid": about["uuid"]}).sort("min", ASCENDING)
            ranges = tuple(Range(span(row), str(row["shard"]), bool(row.get("jumbo"))) for row in rows)
        tags = config["tags"].find({"ns": what.namespace}).sort("min", ASCENDING)
        zones = tuple(Zoned(span(row), str(row["tag"])) for row in tags if field in row["min"])
        key = None if about is None else about["key"]
        balanced = about is None or not about.get("noBalance", False)
        return Found(what, key, ranges, zones, None, {}, balanced)

    def _with_numbers(self, found: Found) -> Found:
        collection = self._database(found.wanted.database)[found.wanted.name]
        held: dict[str, Held] = {}
        indexes: dict[str, set[tuple[str, ...]]] = {}
        try:
            for row in collection.aggregate([{"$collStats": {"storageStats": {}}}]):
                stats = row["storageStats"]
                orphans = int(stats.get("numOrphanDocs", 0))
                held[row["shard"]] = Held(max(int(stats["count"]) - orphans, 0), int(stats["size"]), orphans)
            for row in collection.aggregate([{"$indexStats": {}}]):
                indexes.setdefault(row["shard"], set()).add(tuple(row["key"]))
        except OperationFailure as error:
            if error.code != _NAMESPACE_NOT_FOUND:
                raise
        return replace(found, held=held, indexes={shard: frozenset(keys) for shard, keys in indexes.items()})


@contextmanager
def opened(settings: Settings, busy_seconds: float = _BUSY_SECONDS) -> Iterator[Router]:
    """The cluster of these settings. Raises Refused, also when MongoDB refuses or does not answer meanwhile."""
    if settings.mongo_uri is None:
        raise Refused(
            "RELAY_MONGO_URI is not set, and the MongoDB that a relay runs by itself is no sharded cluster; "
            "name the cluster's routers (mongos)"
        )
    try:
        # Moving takes as long as it takes: no limit but those set here.
        client: MongoClient[dict[str, Any]] = MongoClient(
            settings.mongo_uri.get_secret_value(),
            appname="relay-shard",
            serverSelectionTimeoutMS=int(_SELECT_SECONDS * 1000),
            connectTimeoutMS=int(_SELECT_SECONDS * 1000),
            socketTimeoutMS=None,
        )
    except (ConfigurationError, InvalidURI, ValueError) as error:
        raise Refused(f"RELAY_MONGO_URI cannot be used: {error}") from None
    try:
        with client:
            found = Router(
                client,
                settings.mongo_database,
                int(settings.message_ttl_days * 86_400),
                int(settings.fate_hours * 3600),
                busy_seconds=busy_seconds,
            )
            with time_limit(_SELECT_SECONDS):
                found.check()
            yield found
    except PyMongoError as error:
        raise Refused(_explained(error)) from None


def _explained(error: PyMongoError) -> str:
    code = getattr(error, "code", None)
    if code in _UNAUTHORIZED:
        return (
            "the user of RELAY_MONGO_URI is not allowed to do this; it takes the roles clusterManager and clusterMonitor "
            "on admin, and readWrite on the relay's database"
        )
    if code == _OVERLAP:
        return (
            "that range overlaps another one: a zone's, or one whose documents the shard is still removing "
            "(15 minutes after they moved); look at scripts/shard status, and try again"
        )
    if isinstance(error, ServerSelectionTimeoutError):
        return "the routers of RELAY_MONGO_URI do not answer"
    if error.timeout or isinstance(error, ConnectionFailure):
        return "the cluster does not answer any more; what it had begun goes on. Run scripts/shard status, then the same again"
    return f"MongoDB refused: {_reason(error)}"


def _reason(error: PyMongoError) -> str:
    if error.timeout or isinstance(error, ConnectionFailure):
        return f"no answer within {_READ_SECONDS:g} s"
    text = str((error.details or {}).get("errmsg", "") if isinstance(error, OperationFailure) else error)
    return text[:300]
