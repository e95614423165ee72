"""What a sharded cluster looks like, as far as the relay is concerned, and what it should look like. Values only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bson import MaxKey, MinKey
from pymongo import ASCENDING, IndexModel

from models.messages import FATES, MESSAGES, fate_indexes, message_indexes

LANE_ZONE: Final = "lane-"
"""What the zone of a shard's lane is called, before the shard's name."""
MEDIA_CHUNKS: Final = "fs.chunks"
LOWEST: Final = MinKey()
HIGHEST: Final = MaxKey()

Bound = Any
"""A value of a shard key: text, or one of the two ends."""


def order(bound: Bound) -> tuple[int, bytes]:
    """Sorts bounds as MongoDB does: the low end, text by its bytes, other kinds of values, the high end."""
    if isinstance(bound, MinKey):
        return 0, b""
    if isinstance(bound, MaxKey):
        return 3, b""
    return (1, bound.encode()) if isinstance(bound, str) else (2, b"")


@dataclass(frozen=True, slots=True)
class Span:
    """The values from ``low`` up to, and without, ``high``."""

    low: Bound
    high: Bound

    def holds(self, value: str) -> bool:
        """Whether the value lies in it."""
        return order(self.low) <= order(value) < order(self.high)

    def common(self, other: Span) -> Span | None:
        """What lies in both."""
        low, high = max(self.low, other.low, key=order), min(self.high, other.high, key=order)
        return Span(low, high) if order(low) < order(high) else None

    def __str__(self) -> str:
        """For people."""
        if isinstance(self.high, str) and self == alone(str(self.low)):
            return f"{self.low} alone"
        parts = []
        if not isinstance(self.low, MinKey):
            # What begins behind a value that is alone.
            parts.append(f"after {self.low[:-1]}" if str(self.low).endswith("\0") else f"from {self.low}")
        if not isinstance(self.high, MaxKey):
            parts.append(
                f"below {self.high}" if not str(self.high).endswith("\0") else f"up to {self.high[:-1]}"
            )
        return " ".join(parts) or "everything"


def alone(value: str) -> Span:
    """This value and no other."""
    return Span(value, f"{value}\0")


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard, as config.shards has it."""

    name: str
    host: str
    zones: tuple[str, ...]
    draining: bool


@dataclass(frozen=True, slots=True)
class Range:
    """A range of a sharded collection, and where it is."""

    span: Span
    shard: str
    jumbo: bool = False


@dataclass(frozen=True, slots=True)
class Zoned:
    """A range that belongs to a zone."""

    span: Span
    zone: str


@dataclass(frozen=True, slots=True)
class Held:
    """What one shard holds of a collection. ``orphans`` are documents that have moved away and are still to be removed; they are
    not among ``documents``, but their bytes are among ``size``."""

    documents: int
    size: int
    orphans: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A collection that is to be sharded by one field. ``spread``: its values are spread evenly over the hexadecimal digits."""

    database: str
    name: str
    field: str
    indexes: Sequence[IndexModel]
    spread: bool = False

    @property
    def namespace(self) -> str:
        """Database and collection."""
        return f"{self.database}.{self.name}"

    def key(self, bound: Bound) -> dict[str, Bound]:
        """A bound as MongoDB takes it."""
        return {self.field: bound}


@dataclass(frozen=True, slots=True)
class Found:
    """What there is of a wanted collection. ``key`` is its shard key, None when it is not sharded; ``held`` by shard, None when a
    shard did not answer; ``indexes`` by shard, each the fields of one."""

    wanted: Wanted
    key: Mapping[str, Any] | None
    ranges: tuple[Range, ...]
    zones: tuple[Zoned, ...]
    held: Mapping[str, Held] | None
    indexes: Mapping[str, frozenset[tuple[str, ...]]]
    balanced: bool = True

    @property
    def is_right(self) -> bool:
        """Whether it is sharded as it should be."""
        return (
            self.key is not None
            and list(self.key) == [self.wanted.field]
            and self.key[self.wanted.field] == 1
        )

    @property
    def documents(self) -> int | None:
        """How many documents it has, None when that is not known."""
        return None if self.held is None else sum(one.documents for one in self.held.values())

    def owners(self, span: Span) -> list[Range]:
        """The pieces of a span with their shards, in order."""
        found = ((one, one.span.common(span)) for one in self.ranges)
        return [Range(common, one.shard, one.jumbo) for one, common in found if common is not None]

    def without_indexes(self) -> list[IndexModel]:
        """The indexes that a shard lacks."""
        known = self.indexes.values()
        return [
            index
            for index in self.wanted.indexes
            if not known or not all(tuple(index.document["key"]) in shard for shard in known)
        ]


@dataclass(frozen=True, slots=True)
class Cluster:
    """All of it. ``primary`` is the shard of what is not sharded, None while there is no database; ``problem`` says why numbers
    are missing. ``leaving`` are shards that an operator is about to remove."""

    database: str
    version: str
    primary: str | None
    shards: tuple[Shard, ...]
    balancer: str
    collections: tuple[Found, ...]
    problem: str | None = None
    leaving: frozenset[str] = frozenset()

    @property
    def takers(self) -> list[Shard]:
        """The shards that take data, by name."""
        return [shard for shard in self.shards if not shard.draining and shard.name not in self.leaving]

    def collection(self, name: str) -> Found:
        """One of the collections."""
        return next(found for found in self.collections if found.wanted.name == name)

    def shard(self, name: str) -> Shard | None:
        """A shard by its name."""
        return next((shard for shard in self.shards if shard.name == name), None)

    def in_zone(self, zone: str) -> frozenset[str]:
        """The shards of a zone."""
        return frozenset(shard.name for shard in self.shards if zone in shard.zones)


def wanted(database: str, ttl_seconds: int, fate_seconds: int) -> tuple[Wanted, Wanted]:
    """What the relay's message path needs."""
    fates = fate_indexes(fate_seconds)
    if not any(next(iter(index.document["key"])) == "lane" for index in fates):
        # Without one a collection that has documents cannot be sharded.
        fates = [*fates, IndexModel([("lane", ASCENDING)], name="lane")]
    return (
        Wanted(database, MESSAGES, "conversationId", message_indexes(ttl_seconds), spread=True),
        Wanted(database, FATES, "lane", fates),
    )


def wanted_media(database: str) -> Wanted:
    """The chunks of media files, in the database beside the relay's."""
    index = IndexModel([("files_id", ASCENDING), ("n", ASCENDING)], name="files_id_1_n_1", unique=True)
    return Wanted(f"{database}_media", MEDIA_CHUNKS, "files_id", [index])


def slices(shards: Sequence[Shard], each: int) -> list[Range]:
    """The hexadecimal range in equal parts, ``each`` for every shard, those of one shard side by side."""
    count = len(shards) * each
    bounds = [LOWEST, *(_hex(place, count) for place in range(1, count)), HIGHEST]
    return [
        Range(Span(bounds[place], bounds[place + 1]), shards[place // each].name) for place in range(count)
    ]


def _hex(place: int, count: int) -> str:
    return f"{16**4 * place // count:04x}".rstrip("0")


def share(spans: Iterable[Span]) -> float:
    """The part of all conversation ids, which are random, that lies in these spans."""
    return sum(_number(span.high) - _number(span.low) for span in spans) / 16**8


def _number(bound: Bound) -> int:
    if isinstance(bound, MaxKey):
        return 16**8
    digits = (str(bound) if isinstance(bound, str) else "").replace("-", "")[:8]
    try:
        return int(digits.ljust(8, "0"), 16)
    except ValueError:
        return 0
