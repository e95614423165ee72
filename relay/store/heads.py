"""Heads of messages that are stored in parts: a part is nobody's message before its head is there.

The head is claimed first, then the parts are written, then the claim becomes the head: that makes the message ``stored``.
Whatever a crash leaves before that is neither delivered nor taken for the message; ``clear`` removes it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import structlog
from bson.datetime_ms import DatetimeMS

from relay.store.deleting import delete_messages
from relay.store.mongo import Mongo, time_limit
from relay.store.shards import Shards
from relay.wire.envelope import Envelope
from relay.wire.ids import PARTS_KEY, conversation_of, head_id, is_part, new_writing, part_ids

_MAX_KNOWN: Final = 20_000
_IDS: Final = 1000
_PAGE: Final = 200
_FIRST_FEW: Final = 4
_MAX_SUSPECTS: Final = 20_000

log = structlog.get_logger(__name__)


class Heads:
    """Which heads there are, and the claims among them."""

    def __init__(self, mongo: Mongo, shards: Shards, *, timeout: float) -> None:
        self._mongo = mongo
        self._shards = shards
        self._collection = mongo.messages
        self._timeout = timeout
        # A head that was there once makes its parts messages for good, so what is known stays true.
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()
        # Parts that a drain met and that had no head: a writer's that is at work, or one's that came too late.
        self._suspects: dict[str, None] = {}

    def committed(self, doc_id: str, writing: str) -> None:
        """This message is stored under this writing."""
        self._known[doc_id, writing] = None
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    async def missing(self, envelopes: Iterable[Envelope]) -> set[str]:
        """The stored ids of those that are parts without a head: not, or not yet, messages."""
        asked: dict[tuple[str, str], list[str]] = {}
        for envelope in envelopes:
            writing = envelope.writing
            if envelope.number and writing is not None and (envelope.doc_id, writing) not in self._known:
                asked.setdefault((envelope.doc_id, writing), []).append(envelope.stored_id)
        if not asked:
            return set()
        doc_ids = list({doc_id for doc_id, _ in asked})
        query = {
            "_id": {"$in": doc_ids},
            "conversationId": {"$in": _conversations(doc_ids)},
            "claimedAt": None,
        }
        with time_limit(self._timeout):
            async for head in self._collection.find(query, {"writing": 1}):
                place = (head["_id"], head.get("writing", ""))
                if asked.pop(place, None) is not None:
                    self.committed(*place)
        missing = {stored_id for stored_ids in asked.values() for stored_id in stored_ids}
        if len(self._suspects) < _MAX_SUSPECTS:
            self._suspects.update(dict.fromkeys(missing))
        return missing

    async def orphans(self, stored_ids: Iterable[str]) -> set[str]:
        """Those of these documents that are parts of no message: their head is a claim, or another writing's."""
        asked: dict[str, list[tuple[str, str]]] = {}
        for stored_id in filter(is_part, stored_ids):
            doc_id, writing = head_id(stored_id), stored_id.rpartition(" ")[2].partition(".")[0]
            if (doc_id, writing) not in self._known:
                asked.setdefault(doc_id, []).append((writing, stored_id))
        found: set[str] = set()
        heads = list(asked)
        for start in range(0, len(heads), _IDS):
            some = heads[start : start + _IDS]
            query = {"_id": {"$in": some}, "conversationId": {"$in": _conversations(some)}}
            with time_limit(self._timeout):
                async for head in self._collection.find(query, {"writing": 1, "claimedAt": 1}):
                    for writing, stored_id in asked[head["_id"]]:
                        if "claimedAt" in head or head.get("writing") != writing:
                            found.add(stored_id)
                        else:
                            self.committed(head["_id"], writing)
        return found

    async def with_parts(self, heads: Mapping[str, tuple[str, int]]) -> set[str]:
        """Those of these messages, given with their writing and number of documents, of which parts still wait."""
        left = {doc_id: part_ids(doc_id, writing, parts) for doc_id, (writing, parts) in heads.items()}
        found: set[str] = set()
        # One part of each is enough: most messages are told by their first few.
        most = _FIRST_FEW
        while left:
            wanted = [name for names in left.values() for name in names[:most]]
            for start in range(0, len(wanted), _IDS):
                some = wanted[start : start + _IDS]
                query = {"_id": {"$in": some}, "conversationId": {"$in": _conversations(some)}}
                with time_limit(self._timeout):
                    async for document in self._collection.find(query, {"_id": 1}):
                        found.add(head_id(document["_id"]))
            left = {
                doc_id: names[most:]
                for doc_id, names in left.items()
                if doc_id not in found and len(names) > most
            }
            most *= _FIRST_FEW
        return found

    async def waiting_for_parts(self, limit: int, after: int) -> tuple[dict[str, tuple[str, int]], int]:
        """Heads that nothing keeps but their parts, with a ``seq`` above ``after``: candidates for an end that a crash has left
        undone. The second value is where to go on, 0 at the end."""
        query = {"awaiting": [PARTS_KEY], "seq": {"$gt": after}, **self._shards.reachable}
        fields = {"writing": 1, "parts": 1, "seq": 1}
        found: dict[str, tuple[str, int]] = {}
        last = count = 0
        with time_limit(self._timeout):
            async for row in self._collection.find(query, fields).sort([("seq", 1), ("_id", 1)]).limit(limit):
                count += 1
                last = int(row["seq"])
                if isinstance(row.get("writing"), str) and isinstance(row.get("parts"), int):
                    found[row["_id"]] = (row["writing"], row["parts"])
        return found, last if count == limit else 0

    async def clear_claims(self, before: int) -> int:
        """Removes what was claimed before that time (ms) and never became a message; returns how many claims."""
        query = {"claimedAt": {"$lt": DatetimeMS(before)}, **self._shards.reachable}
        with time_limit(self._timeout):
            claims = await self._collection.find(query).limit(_PAGE).to_list(_PAGE)
        for claim in claims:
            try:
                await self.clear(claim)
            except (KeyError, TypeError, ValueError) as error:
                log.error("a claim is none", problem=type(error).__name__)
        return len(claims)

    async def remove_orphans(self, before: int) -> int:
        """Removes parts, accepted before that time (ms), that drains have met and that no head or claim knows: their writer was
        held up until its claim was gone. Returns how many."""
        some = [name for name in self._suspects if not self._shards.is_down(conversation_of(name))][:_IDS]
        for name in some:
            del self._suspects[name]
        if not some:
            return 0
        doc_ids = list({head_id(name) for name in some})
        conversations = {"$in": _conversations(some)}
        with time_limit(self._timeout):
            query = {"_id": {"$in": doc_ids}, "conversationId": conversations}
            known = {
                (head["_id"], one["writing"])
                async for head in self._collection.find(query, {"writing": 1, "abandoned": 1})
                for one in (head, *head.get("abandoned", ()))
                if "writing" in one
            }
            old = {
                "_id": {"$in": some},
                "conversationId": conversations,
                "createdAt": {"$lt": DatetimeMS(before)},
                # What has a time of its own is left to it.
                "expiresAt": None,
            }
            orphans = [
                part["_id"]
                async for part in self._collection.find(old, {"writing": 1})
                if (head_id(part["_id"]), part.get("writing")) not in known
            ]
        await self.remove_parts(orphans)
        return len(orphans)

    async def clear(self, claim: Mapping[str, Any]) -> None:
        """Takes over a claim, so that its writer cannot make it a message any more, and removes its parts and itself."""
        writing = new_writing()
        if await self.take_over(claim, {"writing": writing, "parts": 1}):
            await self.remove_parts(abandoned(claim))
            with time_limit(self._timeout):
                await self._collection.delete_one(
                    {**_place(claim), "writing": writing, "claimedAt": {"$exists": True}}
                )

    async def take_over(self, claim: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
        """Makes a claim another writing's, with these fields; whether it was still there and nobody else's."""
        with time_limit(self._timeout):
            result = await self._collection.update_one(
                {**_place(claim), "writing": claim["writing"], "claimedAt": {"$exists": True}},
                {
                    "$set": dict(fields),
                    "$push": {"abandoned": {"writing": claim["writing"], "parts": claim["parts"]}},
                },
            )
        return bool(result.matched_count)

    async def remove_parts(self, stored_ids: Sequence[str]) -> None:
        """Removes parts that never became a message."""
        for start in range(0, len(stored_ids), _IDS):
            with time_limit(self._timeout):
                await delete_messages(
                    self._mongo, ((name, None) for name in stored_ids[start : start + _IDS])
                )

    async def count_claimed(self) -> int:
        """How many deliveries are in parts of claims: they are no messages, and may never be."""
        count = 0
        async for claim in self._collection.find({"claimedAt": {"$exists": True}, **self._shards.reachable}):
            stored_ids = abandoned(claim)
            for start in range(0, len(stored_ids), _IDS):
                some = stored_ids[start : start + _IDS]
                query = {"_id": {"$in": some}, "conversationId": claim["conversationId"]}
                async for part in self._collection.find(query, {"awaiting": 1}):
                    count += len(part["awaiting"])
        return count


def abandoned(claim: Mapping[str, Any]) -> list[str]:
    """The ``_id`` of every part that may have been written under a claim."""
    return [*overtaken(claim), *part_ids(claim["_id"], str(claim["writing"]), int(claim["parts"]))]


def overtaken(claim: Mapping[str, Any]) -> list[str]:
    """The ``_id`` of every part that may have been written under a claim before it was taken over."""
    return [
        name
        for one in claim.get("abandoned", ())
        for name in part_ids(claim["_id"], str(one["writing"]), int(one["parts"]))
    ]


def _place(claim: Mapping[str, Any]) -> dict[str, Any]:
    return {"_id": claim["_id"], "conversationId": claim["conversationId"]}


def _conversations(stored_ids: Sequence[str]) -> list[str]:
    return list({conversation_of(stored_id) for stored_id in stored_ids})
