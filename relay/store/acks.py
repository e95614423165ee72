"""Group commit of what ends a message: acknowledgements, expiry, withdrawal, release.

Because ``awaiting`` only ever shrinks, a message whose remaining recipients are all settled now can be deleted outright,
whatever happens meanwhile. Everything for one conversation goes through one lane, one group after the other, so two last
acknowledgements cannot race on one node; on several nodes each looks again for emptied messages after its update.
Fates are written before the deletion; a crash between the two is healed by the sweep.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, NamedTuple

import structlog
from bson.datetime_ms import DatetimeMS
from pymongo import UpdateOne

from models.messages import FateEntry
from relay.metrics import Metrics
from relay.store.fates import Fates
from relay.store.ledger import Fate, Ledger
from relay.store.messages import Messages
from relay.store.mongo import Mongo, PyMongoError, brief, time_limit
from relay.wire import ids

_FIRST_DELAY: Final = 0.05
_LAST_DELAY: Final = 1.0

log = structlog.get_logger(__name__)


class Sole(NamedTuple):
    """What a connection knows of a message that only its device ever awaited: enough to delete it, and to tell its fate,
    without reading it."""

    seq: int
    user: str
    device: str
    at: int


class Ack:
    """One device has these messages on disk, since ``at`` (ms). ``messages`` maps document ids to what is known."""

    __slots__ = ("at", "deadline", "device", "done", "key", "messages", "user")

    def __init__(
        self,
        user: str,
        device: str,
        messages: Mapping[str, Sole | None],
        *,
        at: int,
        deadline: float,
        done: Callable[[bool], None],
    ) -> None:
        self.user = user
        self.device = device
        self.key = ids.device_key(user, device)
        self.messages = messages
        self.at = at
        self.deadline = deadline
        self.done = done


class Removal:
    """These messages end now, for everybody who still awaits them."""

    __slots__ = ("deadline", "doc_ids", "done", "fate")

    def __init__(
        self,
        doc_ids: Sequence[str],
        fate: Fate,
        *,
        deadline: float,
        done: Callable[[bool], None] | None = None,
    ) -> None:
        self.doc_ids = doc_ids
        self.fate = fate
        self.deadline = deadline
        self.done = done or _nothing


class Acknowledged(NamedTuple):
    """A device's acknowledgement of one message is durable. ``user`` and ``device`` are the message's sender."""

    doc_id: str
    user: str
    device: str
    by_user: str
    by_device: str
    at: int
    accepted_at: int


@dataclass(slots=True)
class Settlement:
    """What one group brought about, for the router."""

    acknowledged: list[Acknowledged]
    released: list[tuple[str, str]]
    """(document id, device key) pairs that no connection needs to hold credit for any more."""


Ending = Ack | Removal


class Acks:
    """Commits groups of acknowledgements and removals. ``settled`` gets what each group brought about."""

    def __init__(
        self,
        mongo: Mongo,
        messages: Messages,
        fates: Fates,
        ledger: Ledger,
        metrics: Metrics,
        *,
        timeout: float,
        now: Callable[[], int],
        settled: Callable[[Settlement], None],
    ) -> None:
        self._collection = mongo.messages
        self._messages = messages
        self._fates = fates
        self._ledger = ledger
        self._retries = metrics.retries.labels("ack")
        self._timeout = timeout
        self._now = now
        self._settled = settled

    async def commit(self, batch: list[Ending]) -> None:
        """Makes the group durable, trying again while the outcome is unknown. Never raises for what MongoDB does."""
        group = _Group(batch)
        deadline = max(ending.deadline for ending in batch)
        delay = _FIRST_DELAY
        attempt = 0
        while True:
            try:
                await self._attempt(group, attempt)
            except PyMongoError as error:
                log.warning("outcome of acknowledgements is unknown", attempt=attempt, error=brief(error))
                self._retries.inc()
                attempt += 1
                if monotonic() >= deadline:
                    self.abandon(batch)
                    return
                await asyncio.sleep(delay * random.uniform(0.5, 1))
                delay = min(delay * 2, _LAST_DELAY)
                continue
            break
        self._settled(group.settlement)
        for ending in batch:
            ending.done(True)

    def abandon(self, batch: list[Ending]) -> None:
        """Tells that these did not become durable here; the messages still wait."""
        for ending in batch:
            ending.done(False)

    async def _attempt(self, group: _Group, attempt: int) -> None:
        if group.read:
            # A retry must not count what an earlier attempt did: what was found at first is remembered.
            documents = await self._messages.read(
                [doc_id for doc_id in group.read if doc_id not in group.planned]
            )
            for doc_id, document in documents.items():
                group.plan(doc_id, document)
        entries = [*group.sole_entries, *group.final_entries]
        if entries:
            await self._fates.record(entries, self._now())
        updates = group.updates
        if updates:
            with time_limit(self._timeout):
                await self._collection.bulk_write(updates, ordered=False)
        if group.sole:
            deleted = await self._delete([(doc_id, sole.seq) for doc_id, (sole, _) in group.sole.items()])
            group.sole_deleted = len(group.sole) if attempt else deleted
        if group.final:
            await self._delete(list(group.final.items()))
        if updates:
            await self._finish_emptied(group)
        self._book(group)

    async def _delete(self, wanted: Sequence[tuple[str, int]]) -> int:
        """By id, conversation and ``seq``: a later incarnation of an id must survive."""
        doc_ids = [doc_id for doc_id, _ in wanted]
        with time_limit(self._timeout):
            result = await self._collection.delete_many(
                {
                    "_id": {"$in": doc_ids},
                    "conversationId": {"$in": list({doc_id.partition(" ")[0] for doc_id in doc_ids})},
                    "seq": {"$in": list({seq for _, seq in wanted})},
                }
            )
        return int(result.deleted_count)

    async def _finish_emptied(self, group: _Group) -> None:
        """Another node may have settled the rest of what this group only shrank."""
        documents = await self._messages.read(list(group.shrunk))
        emptied = [document for document in documents.values() if not document["awaiting"]]
        if not emptied:
            return
        with time_limit(self._timeout):
            await self._fates.record(
                [entry_of(document, "delivered", ()) for document in emptied], self._now()
            )
        await self._delete([(document["_id"], document["seq"]) for document in emptied])

    def _book(self, group: _Group) -> None:
        acknowledged = group.counts["acknowledged"] + group.sole_deleted
        self._ledger.add("acknowledged", acknowledged)
        for fate in ("expired", "withdrawn", "released", "trimmed"):
            if group.counts[fate]:
                self._ledger.add(fate, group.counts[fate])


class _Group:
    """The plan for one group: what to read, update and delete, and what to tell afterwards."""

    def __init__(self, batch: Sequence[Ending]) -> None:
        self.sole: dict[str, tuple[Sole, Ack]] = {}
        self.read: dict[str, None] = {}
        self.planned: set[str] = set()
        self.final: dict[str, int] = {}
        self.final_entries: list[FateEntry] = []
        self.updates: list[UpdateOne] = []
        self.shrunk: list[str] = []
        self.sole_deleted = 0
        self.counts = dict.fromkeys(("acknowledged", "expired", "withdrawn", "released", "trimmed"), 0)
        self.settlement = Settlement([], [])
        self._acks: dict[str, list[Ack]] = {}
        self._removals: dict[str, Fate] = {}
        for ending in batch:
            if isinstance(ending, Removal):
                for doc_id in ending.doc_ids:
                    self._removals.setdefault(doc_id, ending.fate)
                    self.read[doc_id] = None
                continue
            released = self.settlement.released
            for doc_id, sole in ending.messages.items():
                released.append((doc_id, ending.key))
                if sole is not None:
                    self.sole.setdefault(doc_id, (sole, ending))
                else:
                    self._acks.setdefault(doc_id, []).append(ending)
                    self.read[doc_id] = None
        for doc_id in self.sole.keys() & self.read.keys():
            # Acknowledged twice, or also removed: look before deleting.
            _, ack = self.sole.pop(doc_id)
            self._acks.setdefault(doc_id, []).insert(0, ack)
        self.sole_entries = [self._sole_entry(doc_id, sole, ack) for doc_id, (sole, ack) in self.sole.items()]

    def plan(self, doc_id: str, document: Mapping[str, Any]) -> None:
        """Decides what becomes of one stored message."""
        self.planned.add(doc_id)
        awaiting: list[str] = document["awaiting"]
        remaining = set(awaiting)
        counted: dict[str, Ack] = {}
        for ack in self._acks.get(doc_id, ()):
            for key in (ack.key, ids.any_device_key(ack.user)):
                if key in remaining:
                    remaining.discard(key)
                    counted.setdefault(ack.key, ack)
        self.counts["acknowledged"] += len(awaiting) - len(remaining)
        sender = document["sender"]
        accepted_at = int(document["createdAt"])
        for ack in counted.values():
            self.settlement.acknowledged.append(
                Acknowledged(
                    doc_id, sender["user"], sender["device"], ack.user, ack.device, ack.at, accepted_at
                )
            )
        fate = self._removals.get(doc_id)
        if fate is not None:
            if fate != "delivered":
                self.counts[fate] += len(remaining)
            self.settlement.released.extend((doc_id, key) for key in remaining)
            remaining = set()
        if not remaining:
            self.final[doc_id] = document["seq"]
            self.final_entries.append(
                entry_of(document, fate or "delivered", [ack.user for ack in counted.values()])
            )
        elif counted:
            self.shrunk.append(doc_id)
            self.updates.append(_shrink(document, list(counted.values())))

    def _sole_entry(self, doc_id: str, sole: Sole, ack: Ack) -> FateEntry:
        self.settlement.acknowledged.append(
            Acknowledged(doc_id, sole.user, sole.device, ack.user, ack.device, ack.at, sole.at)
        )
        return {
            "id": doc_id,
            "sender": {"user": sole.user, "device": sole.device},
            "seq": sole.seq,
            "at": sole.at,
            "fate": "delivered",
            "delivered": [ack.user] if ack.user != sole.user else [],
        }


def entry_of(document: Mapping[str, Any], fate: Fate, also: Sequence[str]) -> FateEntry:
    """The fate of a stored message that is about to be deleted; ``also`` have just acknowledged it."""
    sender = document["sender"]
    people = {entry["user"] for entry in document.get("deliveredTo", ())} | set(also)
    people.discard(sender["user"])
    return {
        "id": document["_id"],
        "sender": {"user": sender["user"], "device": sender["device"]},
        "seq": document["seq"],
        "at": int(document["createdAt"]),
        "fate": fate,
        "delivered": sorted(people),
    }


def _shrink(document: Mapping[str, Any], acks: Sequence[Ack]) -> UpdateOne:
    """Takes devices out of ``awaiting`` and notes them in ``deliveredTo``. Idempotent: a device that is no longer awaited
    changes nothing, so a retry does not double an entry."""
    gone = [key for ack in acks for key in (ack.key, ids.any_device_key(ack.user))]
    new = [
        {
            "keys": [ack.key, ids.any_device_key(ack.user)],
            "entry": {"user": ack.user, "device": ack.device, "at": DatetimeMS(ack.at)},
        }
        for ack in acks
    ]
    still_awaited = {"$gt": [{"$size": {"$setIntersection": ["$$this.keys", "$awaiting"]}}, 0]}
    return UpdateOne(
        {
            "_id": document["_id"],
            "conversationId": document["conversationId"],
            "seq": document["seq"],
            "awaiting": {"$in": gone},
        },
        [
            {
                "$set": {
                    "deliveredTo": {
                        "$concatArrays": [
                            {"$ifNull": ["$deliveredTo", []]},
                            {
                                "$map": {
                                    "input": {"$filter": {"input": {"$literal": new}, "cond": still_awaited}},
                                    "in": "$$this.entry",
                                }
                            },
                        ]
                    },
                    "awaiting": {"$setDifference": ["$awaiting", {"$literal": gone}]},
                }
            }
        ],
    )


def _nothing(_: bool) -> None:
    return None
