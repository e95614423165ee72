"""The audit trail: append-only and hash-chained (relay.store.audit_chain says how).

Entries count 1, 2, 3… over all nodes. Who appends takes the number after the last one; a number that is taken already means
that another node was faster, and the entry is chained anew behind that one's. No locks, no leader.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, Final

import bson
import structlog

from models.audit import AuditEntry
from models.housekeeping import Setting
from relay.security.pseudonyms import Pseudonyms
from relay.store.accounts import milliseconds
from relay.store.audit_chain import (
    HEAD,
    NOBODY,
    NOTHING,
    End,
    Verdict,
    act_fields,
    end_of,
    head_fields,
    linked,
)
from relay.store.audit_reading import KEY_SETTING, check, committed, heads
from relay.store.mongo import BulkWriteError, DuplicateKeyError, PyMongoError, brief
from relay.wire.clock import utc_now
from relay.wire.errors import RelayError

_QUEUED: Final = 1000
_GROUP: Final = 100
_SECONDS: Final = 5.0
_PAUSE: Final = (0.02, 1.0)
_CLOSE_SECONDS: Final = 2.0
_PAGE: Final = 500
_DUPLICATE: Final = 11000
_STRAYS: Final = 100
_TAMPERED: Final = "the head of the audit trail was tampered with; see scripts/admin audit verify"
CHANGE: Final = "change"
"""The name in an entry's details of the change of a conversation that it is part of."""
# Telling a person that somebody blocked or reported them would tell them about that other person.
_CONFIDENTIAL: Final = ("contact.", "report.")

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Act:
    """An entry on its way. ``tried`` are the hashes and numbers it was sent to MongoDB with."""

    fields: dict[str, Any]
    done: asyncio.Future[None]
    tried: dict[str, int] = field(default_factory=dict)


async def check_key(pseudonyms: Pseudonyms, *, adopt: bool = True) -> None:
    """Makes sure that every node, now and later, uses the same key; the first one decides, if it may ``adopt`` its own.
    Raises ValueError with one line when this is another one."""
    collection = Setting.get_motor_collection()
    if adopt:
        # Another node may start at the same moment; what stands there afterwards is what counts.
        with contextlib.suppress(DuplicateKeyError):
            await collection.update_one(
                {"_id": KEY_SETTING}, {"$setOnInsert": {"value": pseudonyms.fingerprint}}, upsert=True
            )
    found = await collection.find_one({"_id": KEY_SETTING})
    if found is not None and found.get("value") != pseudonyms.fingerprint:
        raise ValueError(
            "this database belongs to another RELAY_PSEUDONYM_KEY (a node, or an earlier start, used it): set the "
            "same one, or bring back the file pseudonym-key of that data directory"
        )


class Audit:
    """Appends entries to the chain, reads and checks it."""

    def __init__(self, pseudonyms: Pseudonyms, *, seconds: float = _SECONDS) -> None:
        self._pseudonyms = pseudonyms
        self._seconds = seconds
        self._queue: asyncio.Queue[_Act] = asyncio.Queue(_QUEUED)
        self._writer: asyncio.Task[None] | None = None
        self._closed = False
        self._end: End | None = None

    async def record(
        self,
        act: str,
        *,
        actor: str,
        target: str | None = None,
        address: str = "",
        agent: str = "",
        device: str | None = None,
        details: Mapping[str, str | int | bool] | None = None,
    ) -> None:
        """Appends one entry, durably. ``device`` is one of the target's. ``details`` must hold nothing personal: they stay
        for ever.

        Raises RelayError ``unavailable`` when it could not be written in time (it may be written all the same).
        """
        fields = act_fields(
            self._pseudonyms,
            act,
            utc_now(),
            actor=actor,
            target=target,
            address=address,
            agent=agent,
            device=device,
            details=details or {},
        )
        # What cannot be stored fails here, alone, and not its whole group.
        bson.encode(fields)
        late = RelayError("unavailable", "the audit trail cannot be written; try again", retry_after=1000)
        if self._closed:
            raise late
        if self._writer is None:
            # In a context of its own: a time limit of who happens to come first is not that of those who follow.
            self._writer = asyncio.create_task(self._write(), name="audit", context=Context())
        item = _Act(fields, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(self._seconds):
                await self._queue.put(item)
                await item.done
        except TimeoutError:
            raise late from None

    async def missing(self, change: str, targets: Sequence[str | None]) -> list[str | None]:
        """Those of these targets of a change that no entry of it names: who tries it again records the rest."""
        found = committed().find({f"details.{CHANGE}": change}, {"targetKey": 1})
        noted = {entry.get("targetKey") async for entry in found}
        keys = {target: None if target is None else self._pseudonyms.of(target) for target in targets}
        return [target for target in targets if keys[target] not in noted]

    async def close(self) -> None:
        """Ends the writer; what is queued is written first, if that takes no longer than two seconds."""
        self._closed = True
        if self._writer is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._queue.join()
        except TimeoutError:
            log.warning("audit entries are lost: the store does not answer", entries=self._queue.qsize())
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)

    async def _write(self) -> None:
        while True:
            group = [await self._queue.get()]
            while len(group) < _GROUP and not self._queue.empty():
                group.append(self._queue.get_nowait())
            try:
                await self._append(group)
            except Exception as error:  # noqa: BLE001 - one group must not end the trail
                log.error("audit entries were not written", entries=len(group), error=brief(error))
                self._end = None
                for item in group:
                    if not item.done.done():
                        item.done.set_exception(
                            RelayError("unavailable", "the audit trail cannot be written; try again")
                        )
            finally:
                for _ in group:
                    self._queue.task_done()

    async def _append(self, group: list[_Act]) -> None:
        """Writes a group; every item ends done, or is given up by who waits for it."""
        pause = _PAUSE[0]
        # Somebody who gave up must not have an entry written later, unless one may be written already.
        while waiting := [item for item in group if not item.done.done()]:
            try:
                if await self._attempt(waiting):
                    continue
            except PyMongoError as error:
                log.warning("the audit trail cannot be written; it is tried again", error=brief(error))
            # Somebody was faster, or nobody knows what became of it.
            self._end = None
            # At random: nodes that wait alike meet again, and the one that is busiest wins.
            await asyncio.sleep(pause * random.uniform(0, 1))
            pause = min(2 * pause, _PAUSE[1])

    async def _attempt(self, waiting: Sequence[_Act]) -> bool:
        """One try; whether it left nothing undone. What an earlier try wrote counts, also when its answer was lost."""
        # First where the chain ends, then what is in it: an entry that comes in between is found, or its number is taken.
        end = self._end or await self._find_end()
        await _settle(waiting)
        rest = [item for item in waiting if not item.done.done()]
        if not rest:
            return True
        entries: list[dict[str, Any]] = []
        for item in rest:
            entry = linked(self._pseudonyms, item.fields, end)
            item.tried[entry["hash"]] = entry["_id"]
            entries.append(entry)
            end = End(entry["_id"], entry["hash"])
        try:
            await AuditEntry.get_motor_collection().insert_many(entries, ordered=True)
        except BulkWriteError as error:
            if any(problem.get("code") != _DUPLICATE for problem in error.details.get("writeErrors", ())):
                raise
            return False
        self._end = end
        for item in rest:
            _finish(item)
        await self._advance(end)
        return True

    async def _find_end(self) -> End:
        """Where the chain ends. The head counts when it is further: entries that are missing at the end stay missing."""
        # What somebody else inserted under another kind of number is passed over.
        cursor = committed().find({"_id": {"$gt": 0}}, {"hash": 1}).sort([("_id", -1)]).limit(_STRAYS)
        last = next((row for row in await cursor.to_list(_STRAYS) if isinstance(row["_id"], int)), None)
        found = NOTHING if last is None else End(last["_id"], str(last.get("hash")))
        head = await heads().find_one({"_id": HEAD})
        if head is None:
            if last is None:
                await self._begin()
            return found
        noted = end_of(self._pseudonyms, head)
        return noted if noted is not None and noted.entry >= found.entry else found

    async def _begin(self) -> None:
        """Makes the head before there is any entry: entries without a head were tampered with."""
        with contextlib.suppress(DuplicateKeyError):
            await heads().insert_one({"_id": HEAD, **head_fields(self._pseudonyms, NOTHING)})

    async def _advance(self, end: End) -> None:
        """Moves the head forward; should this fail, the next entry does it. A head that somebody edited or deleted stays
        so, for ``verify`` to find."""
        try:
            head = await heads().find_one({"_id": HEAD})
            noted = None if head is None else end_of(self._pseudonyms, head)
            if head is None or noted is None:
                log.error(_TAMPERED)
            elif noted.entry < end.entry:
                await heads().update_one(
                    {"_id": HEAD, "mac": head["mac"]}, {"$set": head_fields(self._pseudonyms, end)}
                )
        except PyMongoError as error:
            log.warning("the head of the audit trail lags behind", error=brief(error))

    async def verify(
        self,
        progress: Callable[[int, int], None] = lambda done, total: None,
        *,
        expect: End | None = None,
    ) -> Verdict:
        """Reads the whole chain and checks every entry, also while relays append to it. ``progress`` is told how many
        entries of about how many are read. ``expect`` is an end that was noted down earlier."""
        return await check(self._pseudonyms, progress, expect)

    async def tell_end(self) -> None:
        """Logs where the chain ends. Whoever keeps the log elsewhere can tell a trail that was put back to an earlier state:
        ``verify`` expects the end that was logged last."""
        try:
            head = await heads().find_one({"_id": HEAD})
        except PyMongoError as error:
            log.warning("the head of the audit trail cannot be read", error=brief(error))
            return
        noted = None if head is None else end_of(self._pseudonyms, head)
        if noted is not None:
            log.info("audit head", entry=noted.entry, hash=noted.hash)
        elif head is not None:
            log.error(_TAMPERED)

    async def entries_of(self, user: str) -> AsyncIterator[dict[str, Any]]:
        """What a person may read of the trail, oldest first: what they did, then what others did to them. Times in
        milliseconds. Left out is what would tell them about others: who blocked or reported them, and from which address."""
        key = self._pseudonyms.of(user)
        async for entry in _pages({"actorKey": key}):
            own = entry.get("targetKey") in (None, key)
            yield _shown(entry, ("actor", "target", "address", "agent", *(("device",) if own else ())))
        async for entry in _pages({"targetKey": key}):
            if entry["actorKey"] != key and not entry["act"].startswith(_CONFIDENTIAL):
                yield _shown(entry, ("actor", "target", "device"))

    async def page(
        self,
        *,
        limit: int,
        user: str | None = None,
        act: str | None = None,
    ) -> list[dict[str, Any]]:
        """For operators: the last ``limit`` entries, newest first, about one person or of one act when named. Times in
        milliseconds."""
        queries: list[dict[str, Any]] = [{}]
        if user is not None:
            key = self._pseudonyms.of(user)
            queries = [{"actorKey": key}, {"targetKey": key}]
        found: dict[int, dict[str, Any]] = {}
        for query in queries:
            if act is not None:
                query["act"] = act
            cursor = AuditEntry.get_motor_collection().find(query).sort([("_id", -1)]).limit(limit)
            async for entry in cursor:
                found[entry["_id"]] = {**_told(entry), **_values(entry), "hash": entry["hash"]}
        return [found[number] for number in sorted(found, reverse=True)[:limit]]

    async def forget(self, user: str) -> None:
        """Drops the personal values of one person, everywhere. What stays are their pseudonym and salted hashes. Safe to
        repeat."""
        key = self._pseudonyms.of(user)
        await _drop({"actorKey": key}, ("actor", "address", "agent"))
        await _drop({"targetKey": key}, ("target", "device"))
        # Where somebody tried to log in as this person from is about this person: nobody else is named there.
        await _drop({"targetKey": key, "actorKey": self._pseudonyms.of(NOBODY)}, ("address", "agent"))


async def _drop(query: Mapping[str, Any], names: Sequence[str]) -> None:
    change = {"$unset": {f"personal.{name}": "" for name in names}}
    collection = AuditEntry.get_motor_collection()
    last = 0
    while numbers := [
        row["_id"]
        async for row in collection.find({**query, "_id": {"$gt": last}}, {"_id": 1})
        .sort([("_id", 1)])
        .limit(_PAGE)
    ]:
        await collection.update_many({"_id": {"$in": numbers}}, change)
        last = numbers[-1]


def _finish(item: _Act) -> None:
    if not item.done.done():
        item.done.set_result(None)


async def _settle(items: Sequence[_Act]) -> None:
    """Finds out which of these are in the chain after all."""
    of_hash = {name: item for item in items for name in item.tried}
    numbers = list({number for item in items for number in item.tried.values()})
    if numbers:
        async for entry in committed().find({"_id": {"$in": numbers}}, {"hash": 1}):
            if entry["hash"] in of_hash:
                _finish(of_hash[entry["hash"]])


async def _pages(query: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    last = 0
    while True:
        cursor = AuditEntry.get_motor_collection().find({**query, "_id": {"$gt": last}}).sort([("_id", 1)])
        page = await cursor.limit(_PAGE).to_list(_PAGE)
        for entry in page:
            yield entry
        if len(page) < _PAGE:
            return
        last = page[-1]["_id"]


def _told(entry: Mapping[str, Any]) -> dict[str, Any]:
    told = {"entry": entry["_id"], "at": milliseconds(entry["at"]), "act": entry["act"]}
    return {**told, "details": entry["details"]} if entry.get("details") else told


def _shown(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    personal = _values(entry)
    return {**_told(entry), **{name: personal[name] for name in names if name in personal}}


def _values(entry: Mapping[str, Any]) -> dict[str, str]:
    return {name: found["value"] for name, found in entry.get("personal", {}).items()}
