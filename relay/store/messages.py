"""The ``messages`` collection: reading and encoding. Writing is group commit (commits.py, acks.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import structlog
from bson.datetime_ms import DatetimeMS

from models.messages import WAITING_INDEX
from relay.metrics import Metrics
from relay.store.documents import decode
from relay.store.ending_plan import Strayed
from relay.store.fates import Fates
from relay.store.heads import Heads
from relay.store.hot import HotMessages
from relay.store.mongo import Mongo, time_limit
from relay.store.shards import ShardDown, Shards
from relay.wire.envelope import Envelope
from relay.wire.ids import PARTS_KEY, conversation_of, head_id

_PAGE: Final = 128
_READERS: Final = 16
_FINDERS: Final = 4
# Behind a long backlog it reads much more than it finds.
_FIND_SECONDS: Final = 10.0
_CHUNK: Final = 64
_ORDER: Final = [("seq", 1), ("_id", 1)]
_MAX_UNREADABLE: Final = 10_000
_LEAD_MS: Final = 5000
_IDS: Final = 1000
_STATE: Final = dict.fromkeys(
    (
        "conversationId",
        "sender",
        "seq",
        "createdAt",
        "awaiting",
        "deliveredTo",
        "expiresAt",
        "parts",
        "writing",
        "part",
        "claimedAt",
        "abandoned",
        "trimmed",
        "silent",
    ),
    1,
)

log = structlog.get_logger(__name__)


def _is_id(value: object) -> bool:
    return isinstance(value, str) and " " in value


def is_place(document: Mapping[str, Any]) -> bool:
    """Whether this document's ``_id`` and ``seq`` are those of a message."""
    return _is_id(document["_id"]) and isinstance(document.get("seq"), int)


@dataclass(frozen=True, slots=True)
class Page:
    """Messages in ``(seq, _id)`` order. ``exhausted``: nothing more waited when the query ran; unless ``complete``, on the shards
    that answer."""

    envelopes: list[Envelope]
    exhausted: bool
    complete: bool = True


class Awaited(NamedTuple):
    """Ids of messages that wait for somebody. ``complete``: of all shards, not only of those that answer."""

    ids: list[str]
    complete: bool


class Messages:
    """Reads what waits. Messages past their time count as gone even while MongoDB still has them."""

    def __init__(
        self,
        mongo: Mongo,
        shards: Shards,
        fates: Fates,
        metrics: Metrics,
        *,
        ttl_seconds: int,
        timeout: float,
        hot: HotMessages | None = None,
    ) -> None:
        # Not by its truth: one that holds nothing yet is false.
        self.hot = HotMessages(0) if hot is None else hot
        self._shards = shards
        self._fates = fates
        self._collection = mongo.messages
        self._committed = mongo.committed_messages
        self._metrics = metrics
        self._timeout = timeout
        self._readers = asyncio.Semaphore(_READERS)
        self._finders = asyncio.Semaphore(_FINDERS)
        self.ttl_ms = ttl_seconds * 1000
        self.heads = Heads(mongo, shards, timeout=timeout)
        # Ids of documents that are no messages. Left out of later queries, or a window full of them would hide all else.
        self._unreadable: dict[str, None] = {}

    def _cutoff(self, now: int) -> int:
        """Messages accepted up to here are past the full time to live. A moment early, so that the expiry job counts
        them before MongoDB's own time to live deletes them."""
        return now - self.ttl_ms + min(_LEAD_MS, self.ttl_ms // 1000)

    def awaited_by(self, keys: Iterable[str], now: int) -> dict[str, Any]:
        """What is in these mailboxes and has time left at ``now`` (ms)."""
        return {
            "awaiting": {"$in": list(keys)},
            "createdAt": {"$gt": DatetimeMS(self._cutoff(now))},
            "$or": [{"expiresAt": None}, {"expiresAt": {"$gt": DatetimeMS(now)}}],
        }

    async def ended(self, envelopes: Iterable[Envelope]) -> set[str]:
        """The stored ids of those of these, just read, that are no messages, or not yet, or no more. Raises PyMongoError."""
        found = list(envelopes)
        return await self.heads.missing(found) | await self._fates.ended(found)

    async def waiting(
        self,
        keys: Sequence[str],
        now: int,
        *,
        limit: int,
        max_bytes: int,
        exclude: Collection[str] = (),
        conversation: str | None = None,
        after: tuple[int, str] | None = None,
    ) -> Page:
        """What waits for these device keys, first ``seq`` first; at most ``limit`` messages of ``max_bytes`` together
        (but at least one), without the ids in ``exclude``, after the place ``(seq, _id)`` when given."""
        query = self.awaited_by(keys, now)
        conditions: list[Mapping[str, Any]] = []
        if after is not None:
            query["seq"] = {"$gte": after[0]}
            conditions.append({"$or": [{"seq": {"$gt": after[0]}}, {"_id": {"$gt": after[1]}}]})
        self._metrics.drains.inc()
        no_messages: set[str] = set()
        async with self._readers:
            # What is true now, not when it came: a shard may have died while it waited for its turn.
            where, complete = self._reach(conversation)
            if where:
                conditions.append(where)
            if conditions:
                query["$and"] = conditions
            while True:
                known = len(self._unreadable)
                left_out = [*exclude, *self._unreadable, *no_messages]
                if left_out:
                    query["_id"] = {"$nin": left_out}
                page = await self._page(query, limit, max_bytes, None if complete else WAITING_INDEX)
                found = await self.ended(page.envelopes)
                no_messages |= found
                if len(self._unreadable) == known and not found:
                    return page if complete else replace(page, complete=False)

    async def _page(self, query: Mapping[str, Any], limit: int, max_bytes: int, hint: str | None) -> Page:
        if self.hot.warm:
            return await self._page_by_ids(query, limit, max_bytes, hint)
        found: list[Envelope] = []
        size = hits = total = 0
        with time_limit(self._timeout):
            cursor = self._collection.find(query, sort=_ORDER, batch_size=min(limit, _PAGE), hint=hint)
            async for document in cursor.limit(limit):
                total += 1
                envelope = self._hot_or_none(document)
                if envelope is not None:
                    hits += 1
                else:
                    envelope = self._read(document)
                    if envelope is None:
                        continue
                    self._keep(envelope)
                if found and size + envelope.size > max_bytes:
                    await cursor.close()
                    self.hot.asked(hits, total)
                    return Page(found, exhausted=False)
                found.append(envelope)
                size += envelope.size
        self.hot.asked(hits, total)
        return Page(found, exhausted=len(found) < limit)

    async def _page_by_ids(
        self, query: Mapping[str, Any], limit: int, max_bytes: int, hint: str | None
    ) -> Page:
        """Reads the content of those messages only that are not hot."""
        found: list[Envelope] = []
        size = hits = 0
        with time_limit(self._timeout):
            cursor = self._collection.find(query, {"seq": 1}, sort=_ORDER, batch_size=limit, hint=hint)
            places = await cursor.limit(limit).to_list(limit)
            for start in range(0, len(places), _CHUNK):
                chunk = places[start : start + _CHUNK]
                known, hot = await self.contents(chunk)
                hits += hot
                for row in chunk:
                    envelope = known.get(row["_id"])
                    if envelope is None:
                        continue
                    if found and size + envelope.size > max_bytes:
                        self.hot.asked(hits, start + len(chunk))
                        return Page(found, exhausted=False)
                    found.append(envelope)
                    size += envelope.size
        self.hot.asked(hits, len(places))
        return Page(found, exhausted=len(places) < limit)

    async def contents(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Envelope], int]:
        """The messages of these documents, given with ``_id`` and ``seq``, by stored id, and how many of them were hot. What has ended
        meanwhile and what is no message is missing."""
        named = [row for row in rows if _is_id(row["_id"]) or self._read(row) is not None]
        known = self._hot_among(named)
        missing = [row for row in named if row["_id"] not in known]
        if missing:
            await self.hot.fetch((row["_id"], row["seq"]) for row in missing if is_place(row))
            known.update(self._hot_among(missing))
        hot = len(known)
        missing = [row for row in missing if row["_id"] not in known and row["_id"] not in self._unreadable]
        if missing:
            known.update(await self._read_missing([row["_id"] for row in missing]))
        return known, hot

    def _hot_among(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Envelope]:
        found = {row["_id"]: self._hot_or_none(row) for row in rows}
        return {stored_id: envelope for stored_id, envelope in found.items() if envelope is not None}

    async def _read_missing(self, stored_ids: Sequence[str]) -> dict[str, Envelope]:
        query = {
            "_id": {"$in": list(stored_ids)},
            "conversationId": {"$in": list({conversation_of(stored_id) for stored_id in stored_ids})},
        }
        found: dict[str, Envelope] = {}
        async for document in self._collection.find(query):
            envelope = self._read(document)
            if envelope is not None:
                self._keep(envelope)
                found[document["_id"]] = envelope
        return found

    def _keep(self, envelope: Envelope) -> None:
        # Whether it is one at all has to be asked each time.
        if not envelope.resent:
            self.hot.put(envelope)

    def _hot_or_none(self, document: Mapping[str, Any]) -> Envelope | None:
        return self.hot.find(document["_id"], document["seq"]) if is_place(document) else None

    async def last_waiting(self, keys: Sequence[str]) -> int | None:
        """The highest ``seq`` that waits for these device keys."""
        async with self._readers:
            with time_limit(self._timeout):
                found = await self._collection.find_one(
                    {"awaiting": {"$in": list(keys)}}, {"_id": 0, "seq": 1}, sort=[("seq", -1), ("_id", -1)]
                )
        return None if found is None else int(found["seq"])

    async def read(self, doc_ids: Sequence[str], *, committed: bool = False) -> dict[str, Mapping[str, Any]]:
        """The state of these messages and parts without their content: who sent them, who awaits them, who has them. With
        ``committed``, as a majority has it on disk. A claim is no message yet."""
        found = await self.read_all(doc_ids, committed=committed)
        return {doc_id: document for doc_id, document in found.items() if "claimedAt" not in document}

    async def read_all(
        self, doc_ids: Sequence[str], *, committed: bool = False
    ) -> dict[str, Mapping[str, Any]]:
        """As ``read``, claims included."""
        collection = self._committed if committed else self._collection
        found: dict[str, Mapping[str, Any]] = {}
        if not committed and any(map(self.is_away, doc_ids)):
            raise ShardDown
        with time_limit(self._timeout):
            for start in range(0, len(doc_ids), _IDS):
                some = list(doc_ids[start : start + _IDS])
                conversations = list({conversation_of(doc_id) for doc_id in some})
                query: dict[str, Any] = {"_id": {"$in": some}, "conversationId": {"$in": conversations}}
                async for document in collection.find(query, _STATE):
                    found[document["_id"]] = document
        return found

    async def strayed(
        self, strayed: Sequence[Strayed], *, committed: bool = False
    ) -> dict[str, Mapping[str, Any]]:
        """The state of the parts that wait for these devices. Asked by mailbox and ``seq``: however many parts a message has,
        a device awaits one."""
        collection = self._committed if committed else self._collection
        found: dict[str, Mapping[str, Any]] = {}
        with time_limit(self._timeout):
            for mailboxes, heads in strayed:
                query = {
                    "awaiting": {"$in": list(mailboxes)},
                    "seq": {"$in": [head["seq"] for head in heads.values()]},
                    "conversationId": {"$in": list({head["conversationId"] for head in heads.values()})},
                }
                async for document in collection.find(query, _STATE, hint=WAITING_INDEX):
                    head = heads.get(head_id(document["_id"]))
                    if (
                        head is not None
                        and "part" in document
                        and document.get("writing") == head.get("writing")
                    ):
                        found[document["_id"]] = document
        return found

    def is_away(self, stored_id: str) -> bool:
        """Whether a message, or a conversation, lies, if it does, on a shard that does not answer."""
        return self._shards.is_down(conversation_of(stored_id))

    @property
    def reachable(self) -> Mapping[str, Any]:
        """A condition for all messages on the shards that answer: empty when all do. Raises ShardDown when none does."""
        return self._shards.reachable

    def is_due(self, document: Mapping[str, Any], now: int) -> bool:
        """Whether a stored message is past its time."""
        expires = document.get("expiresAt")
        return int(document["createdAt"]) <= self._cutoff(now) or (
            expires is not None and int(expires) <= now
        )

    async def due(self, now: int, limit: int) -> list[str]:
        """Ids of messages past their time."""
        found: list[str] = []
        with time_limit(self._timeout):
            for query in (
                {"expiresAt": {"$lte": DatetimeMS(now)}},
                {"createdAt": {"$lte": DatetimeMS(self._cutoff(now))}},
            ):
                reachable = {**query, **self._shards.reachable}
                async for document in self._collection.find(reachable, {"_id": 1}).limit(limit):
                    found.append(document["_id"])
        return [doc_id for doc_id in dict.fromkeys(found) if _is_id(doc_id)]

    async def leftovers(self, limit: int) -> list[str]:
        """Ids of messages that nobody awaits any more."""
        with time_limit(self._timeout):
            cursor = self._collection.find({"awaiting": [], **self._shards.reachable}, {"_id": 1}).limit(
                limit
            )
            return [document["_id"] async for document in cursor if _is_id(document["_id"])]

    async def keys_with_waiting(self, keys: Sequence[str], before: int, limit: int) -> dict[str, set[str]]:
        """Which of these device keys have messages accepted before ``before`` (ms) waiting: document ids by key."""
        wanted = set(keys)
        found: dict[str, set[str]] = {}
        with time_limit(self._timeout):
            query = {
                "awaiting": {"$in": list(keys)},
                "createdAt": {"$lt": DatetimeMS(before)},
                **self._shards.reachable,
            }
            async for document in self._collection.find(query, {"awaiting": 1}).limit(limit):
                for key in wanted.intersection(document["awaiting"]):
                    found.setdefault(key, set()).add(document["_id"])
        return found

    async def awaited(
        self,
        keys: Sequence[str],
        *,
        limit: int,
        conversation: str | None = None,
        before: int | None = None,
        exclude: Collection[str] = (),
        exclude_sender: str | None = None,
    ) -> Awaited:
        """Messages that wait for any of these mailboxes, of one conversation when named, accepted before ``before`` (ms) when
        given. Raises ShardDown when that conversation's shard does not answer."""
        query: dict[str, Any] = {"awaiting": {"$in": list(keys)}}
        if before is not None:
            query["createdAt"] = {"$lt": DatetimeMS(before)}
        if exclude:
            query["_id"] = {"$nin": list(exclude)}
        if exclude_sender is not None:
            query["sender.user"] = {"$ne": exclude_sender}
        async with self._finders:
            # As in ``waiting``.
            where, complete = self._reach(conversation)
            query.update(where)
            with time_limit(_FIND_SECONDS):
                hint = None if complete else WAITING_INDEX
                cursor = self._collection.find(query, {"_id": 1}, hint=hint).limit(limit)
                return Awaited([row["_id"] async for row in cursor if _is_id(row["_id"])], complete)

    def _reach(self, conversation: str | None) -> tuple[Mapping[str, Any], bool]:
        """What narrows a query down to what can answer now, and whether that is all there is. Raises ShardDown."""
        if conversation is not None:
            if self._shards.is_down(conversation):
                raise ShardDown
            return {"conversationId": conversation}, True
        reachable = self._shards.reachable
        return reachable, not reachable

    async def count_waiting(self, *, seconds: float = 0) -> int:
        """How many deliveries (message and device) wait in the store, on the shards that answer. Reads every message, for
        at most ``seconds`` (0: as long as it takes)."""
        mailboxes = {"$setDifference": [{"$ifNull": ["$awaiting", []]}, {"$literal": [PARTS_KEY]}]}
        pipeline = [
            {"$match": self._shards.reachable},
            {"$group": {"_id": None, "n": {"$sum": {"$size": mailboxes}}}},
        ]
        with time_limit(seconds):
            async for document in self._collection.aggregate(pipeline):
                return int(document["n"]) - await self.heads.count_claimed()
        return 0

    def _read(self, document: Mapping[str, Any]) -> Envelope | None:
        try:
            return decode(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._metrics.poison.inc()
            if len(self._unreadable) < _MAX_UNREADABLE:
                self._unreadable[document["_id"]] = None
            log.error(
                "unreadable document skipped", id=str(document.get("_id"))[:120], problem=type(error).__name__
            )
            return None
