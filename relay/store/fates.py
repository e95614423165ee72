"""What became of messages that are gone: one document per committed group of deletions, written before the deletion.

It recognises resends of messages long delivered, answers ``status``, and lets an operator explain a gone message. Of
several entries of one message the oldest is true: a later one was written by a deletion that found nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bson.datetime_ms import DatetimeMS

from models.messages import FateEntry
from relay.store.ledger import Fate
from relay.store.mongo import Mongo, PyMongoError, time_limit
from relay.store.shards import Shards
from relay.wire.envelope import Envelope
from relay.wire.ids import any_device_key, conversation_of

_ENTRY_BYTES: Final = 700
_NAME_BYTES: Final = 12
_PART_BYTES: Final = 4_000_000


@dataclass(frozen=True, slots=True)
class Gone:
    """The fate of one message, or of one part. ``at`` is when the message was accepted (ms); ``delivered`` are people, not
    devices. ``parts`` and ``writing`` name the other documents of a message in parts."""

    user: str
    device: str
    seq: int
    at: int
    fate: Fate
    delivered: list[str]
    parts: int = 1
    writing: str = ""
    silent: list[str] = field(default_factory=list)
    """People who, to the sender, have yet to get it: they blocked them, and it was not kept for them. Of a part also those who
    acknowledged it quietly, while the message seems to wait."""


def whole_of(
    head: Mapping[str, Any], parts: Iterable[Mapping[str, Any]], ended: Iterable[Gone]
) -> dict[str, Any]:
    """The head of a waiting message with what its parts say, those that wait and those that ended, of who awaits it and who has
    it: as if it were one document."""
    awaiting, delivered = [*head["awaiting"]], [*head.get("deliveredTo", ())]
    for part in parts:
        awaiting += part["awaiting"]
        delivered += part.get("deliveredTo", ())
    for fate in ended:
        awaiting += map(any_device_key, fate.silent)
        delivered += [{"user": user} for user in fate.delivered]
    return {**head, "awaiting": awaiting, "deliveredTo": delivered}


def _parts(entries: Sequence[FateEntry]) -> list[list[FateEntry]]:
    """Splits what would not fit into one document: an entry names everybody who got its message."""
    parts: list[list[FateEntry]] = [[]]
    size = 0
    for entry in entries:
        names = [*entry["delivered"], *entry.get("silent", ())]
        own = _ENTRY_BYTES + sum(map(len, names)) + _NAME_BYTES * len(names)
        if size + own > _PART_BYTES and parts[-1]:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += own
    return parts


class Fates:
    """The ``fates`` collection. What becomes of a shard's messages is recorded in its lane, on that shard."""

    def __init__(self, mongo: Mongo, shards: Shards, *, timeout: float) -> None:
        self._collection = mongo.fates
        self._shards = shards
        self._timeout = timeout

    async def record(self, entries: Sequence[FateEntry], now: int) -> None:
        """Writes the fates of one group of deletions, durably. ``now`` in milliseconds."""
        lanes: dict[str, list[FateEntry]] = {}
        for entry in entries:
            lanes.setdefault(self._shards.lane_of(conversation_of(entry["id"])), []).append(entry)
        documents = [
            {"lane": lane, "at": DatetimeMS(now), "entries": part}
            for lane, some in lanes.items()
            for part in _parts(some)
        ]
        with time_limit(self._timeout):
            if len(documents) == 1:
                await self._collection.insert_one(documents[0])
            else:
                await self._collection.insert_many(documents)

    async def find(self, doc_ids: Sequence[str]) -> dict[str, Gone]:
        """The fates of these messages, as far as they are on record: of each asked where it can be, which is one shard unless its
        conversation has moved lately. Raises PyMongoError."""
        found: dict[str, Gone] = {}
        with time_limit(self._timeout):
            for lanes, some in self._by_lanes(doc_ids).items():
                found.update(await find_in(self._collection, some, lanes=lanes))
        return found

    async def find_some(self, doc_ids: Sequence[str]) -> tuple[dict[str, Gone], set[str]]:
        """As ``find``, and those of which it cannot be told now, because a shard that may know does not answer. Raises PyMongoError
        when that is so for all."""
        found: dict[str, Gone] = {}
        untold: set[str] = set()
        failed: PyMongoError | None = None
        groups = self._by_lanes(doc_ids)
        for lanes, some in groups.items():
            if self._shards.down and (lanes is None or self._shards.down.intersection(lanes)):
                untold.update(some)
                continue
            try:
                with time_limit(self._timeout):
                    found.update(await find_in(self._collection, some, lanes=lanes))
            except PyMongoError as error:
                failed = error
                untold.update(some)
        if failed is not None and len(groups) == 1:
            raise failed
        return found, untold

    async def ended(self, envelopes: Iterable[Envelope]) -> set[str]:
        """The stored ids of those of these messages, just read, that were sent again and have ended already, or of which that cannot
        be told now. A resend is stored before it is certain that its first copy was not delivered and deleted meanwhile; then it
        is deleted itself, and nobody must get it before. Raises PyMongoError."""
        resent = [envelope.doc_id for envelope in envelopes if envelope.resent]
        if not resent:
            return set()
        found, untold = await self.find_some(resent)
        return untold.union(found)

    def _by_lanes(self, doc_ids: Sequence[str]) -> dict[tuple[str, ...] | None, list[str]]:
        by_lanes: dict[tuple[str, ...] | None, list[str]] = {}
        for doc_id in doc_ids:
            by_lanes.setdefault(self._shards.lanes_of_fates(conversation_of(doc_id)), []).append(doc_id)
        return by_lanes


async def find_in(
    collection: Any, doc_ids: Sequence[str], *, lanes: Sequence[str] | None = None
) -> dict[str, Gone]:
    """The fates of these messages that are on record in this ``fates`` collection, in these lanes when named."""
    wanted = list(doc_ids)
    if not wanted:
        return {}
    match: dict[str, Any] = {"entries.id": {"$in": wanted}}
    if lanes is not None:
        match["lane"] = {"$in": list(lanes)} if len(lanes) > 1 else lanes[0]
    pipeline: list[Mapping[str, Any]] = [
        {"$match": match},
        {"$sort": {"at": 1}},
        {
            "$project": {
                "_id": 0,
                "entries": {"$filter": {"input": "$entries", "cond": {"$in": ["$$this.id", wanted]}}},
            }
        },
    ]
    found: dict[str, Gone] = {}
    documents = [document async for document in collection.aggregate(pipeline)]
    for document in documents:
        for entry in document["entries"]:
            sender = entry["sender"]
            found.setdefault(
                entry["id"],
                Gone(
                    sender["user"],
                    sender["device"],
                    entry["seq"],
                    entry["at"],
                    entry["fate"],
                    entry["delivered"],
                    entry.get("parts", 1),
                    entry.get("writing", ""),
                    entry.get("silent", []),
                ),
            )
    return found
