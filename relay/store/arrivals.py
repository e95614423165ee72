"""Devices that connect at the same time, in groups: a node that restarts gets all of its devices back at once.

What a group needs is read with two queries and noted with one write, however many they are; devices never seen before are
made with three more. Whoever has more to tell than "here again" (back from inactivity or removal, a gap of their user to take over)
arrives alone, as ``Accounts.arrive`` says, and so does everybody whose group has failed: whatever is wrong with one of them, it
is that one's trouble only.

Who is to be made or brought back leaves the group, waits until the audit trail has it, and comes again with a later one. Whatever
the trail's state, nobody else waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import structlog
from pymongo.errors import ConnectionFailure, NetworkTimeout

from models.accounts import Device, User
from relay.metrics import Metrics
from relay.store.accounts import (
    PERSON,
    Accounts,
    Arrival,
    arrival_of,
    is_barred,
    is_new,
    is_quiet,
    standing_of,
)
from relay.store.arriving import PROVISION, Arriving, Provision
from relay.store.audit import Audit
from relay.store.gatherer import Gatherer, GathererClosed, GathererFull
from relay.store.mongo import BulkWriteError, PyMongoError, brief, time_limit
from relay.wire.clock import utc_now
from relay.wire.errors import RelayError
from relay.wire.stamps import stamp_now

_MOST: Final = 250
_QUEUE: Final = 20_000
# A group that takes longer gives way, and its devices arrive one by one: a single document that somebody holds must not hold up
# hundreds of them.
_GROUP_SECONDS: Final = 2.0
_PATIENCE: Final = 0.1
_BESIDE: Final = 8
_ALONE: Final = 8
_ALONE_SECONDS: Final = 10.0
# Enough to fill what the trail writes at once, and few enough to leave its queue to others: however many are new, a log-in's entry
# waits behind three inserts of theirs.
_NOTING: Final = 300
_NEW_SECONDS: Final = 20.0
# Who is nearly inactive is not judged by a query and written by another one.
_NEARLY: Final = timedelta(minutes=1)
_DUPLICATE: Final = 11000
_FIELDS: Final = {
    "lastSeen": 1,
    "liveAt": 1,
    "createdAt": 1,
    "since": 1,
    "backAt": 1,
    "gap": 1,
    "fullSince": 1,
    "removedAt": 1,
    "endedAt": 1,
    "session.id": 1,
}

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Siblings:
    """The connections of one device that arrive at the same moment. One at a time has it made, and counts it in ``made``."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    count: int = 0
    made: int = 0


# ``alone``: this device cannot arrive with others; ``beside``: another connection of it has made it at this moment.
_Outcome = Arrival | Provision | None | Literal["alone", "beside"]
_Verdict = Arrival | None | Literal["alone", "new"]


class Arrivals:
    """``Accounts.arrive`` for many devices at once."""

    def __init__(self, accounts: Accounts, audit: Audit, metrics: Metrics) -> None:
        self._accounts = accounts
        self._audit = audit
        self._gatherer: Gatherer[Arriving, _Outcome] = Gatherer(
            "arrivals",
            self._ask,
            metrics=metrics,
            most=_MOST,
            queue=_QUEUE,
            patience=_PATIENCE,
            beside=_BESIDE,
        )
        self._alone = asyncio.Semaphore(_ALONE)
        self._noting = asyncio.Semaphore(_NOTING)
        self._siblings: dict[str, _Siblings] = {}
        self._unnoted = 0
        metrics.watch_queue("new devices", lambda: self._unnoted)

    async def arrive(self, one: Arriving) -> Arrival | None:
        """As ``Accounts.arrive``; what is made or brought back is in the trail before. Raises RelayError ``unavailable`` when the
        trail cannot be written (then nothing is made), when too many devices wait, or the node is stopping; and PyMongoError."""
        siblings = self._siblings.setdefault(one.key, _Siblings())
        siblings.count += 1
        try:
            return await self._arrive_beside(one, siblings)
        finally:
            siblings.count -= 1
            if not siblings.count:
                del self._siblings[one.key]

    async def _arrive_beside(self, one: Arriving, siblings: _Siblings) -> Arrival | None:
        loop = asyncio.get_running_loop()
        until = loop.time() + _NEW_SECONDS
        while True:
            made = siblings.made
            found = await self._in_turn(one)
            if not isinstance(found, Provision):
                return found
            if self._unnoted >= _QUEUE or loop.time() > until:
                raise _too_many()
            self._unnoted += 1
            try:
                async with _turn(siblings.lock, until):
                    # Whoever was ahead may have made it since this one looked.
                    if siblings.made == made:
                        await self._note(one, found, until)
                        found = await self._in_turn(replace(one, noted=found))
                        if not isinstance(found, Provision):
                            siblings.made += 1
                            return found
            finally:
                self._unnoted -= 1

    async def _note(self, one: Arriving, wanted: Provision, until: float) -> None:
        """Has it written down that this device is made or brought back. In no group: nobody who is known waits for the trail."""
        async with _turn(self._noting, until):
            await self._audit.record(
                PROVISION,
                actor=one.user,
                target=one.user,
                address=one.address,
                agent=one.agent,
                device=one.device,
                details=wanted.details,
            )

    async def _in_turn(self, one: Arriving) -> Arrival | Provision | None:
        """With others that come now, or alone."""
        until = asyncio.get_running_loop().time() + _ALONE_SECONDS
        try:
            outcome = await self._gatherer.answer(one)
        except (GathererFull, GathererClosed):
            raise _too_many() from None
        if outcome != "alone" and outcome != "beside":
            return outcome
        arrival = await self._arrive_alone(one, until)
        if outcome == "beside" and isinstance(arrival, Arrival):
            return replace(arrival, changed=True)
        return arrival

    async def close(self) -> None:
        """Nobody arrives any more."""
        await self._gatherer.close()

    async def _arrive_alone(self, one: Arriving, until: float) -> Arrival | Provision | None:
        try:
            async with asyncio.timeout_at(until):
                await self._alone.acquire()
        except TimeoutError:
            raise PyMongoError("the store answers too slowly for all who arrive") from None
        try:
            return await self._accounts.arrive(one)
        finally:
            self._alone.release()

    async def _ask(self, group: list[Arriving]) -> Sequence[_Outcome | Exception]:
        try:
            with time_limit(_GROUP_SECONDS):
                if len(group) == 1:
                    return [await self._accounts.arrive(group[0])]
                return await self._arrive(group)
        except PyMongoError as error:
            if _concerns_all(error):
                raise
            log.warning(
                "devices that came together arrive one by one", devices=len(group), error=brief(error)
            )
        except Exception:
            log.exception("devices that came together arrive one by one", devices=len(group))
        return ["alone"] * len(group)

    async def _arrive(self, group: list[Arriving]) -> list[_Outcome | Exception]:
        people = await _read(_users(), {one.user for one in group}, PERSON)
        rows = await _read(_devices(), {one.key for one in group}, _FIELDS)
        now = utc_now()
        outcomes: list[_Outcome | Exception] = ["alone"] * len(group)
        here: dict[str, int] = {}
        new: dict[str, int] = {}
        unnoted: dict[str, int] = {}
        known: set[str] = set()
        for number, one in enumerate(group):
            if one.key in known:
                # It comes twice; the second time it is known.
                continue
            known.add(one.key)
            try:
                verdict = self._judge(one, people.get(one.user), rows.get(one.key), now)
            except (KeyError, TypeError, ValueError, AttributeError):
                # What is stored of it makes no sense. Alone it fails by itself.
                continue
            if verdict == "new":
                (new if one.is_noted(returned=False) else unnoted)[one.key] = number
            else:
                outcomes[number] = verdict
                if isinstance(verdict, Arrival):
                    here[one.key] = number
        for key in await self._write(here, group, now):
            outcomes[here[key]] = "alone"
        if unnoted:
            erased = await self._erased([group[number] for number in unnoted.values()], people, now)
            for number in unnoted.values():
                user = group[number].user
                if user in erased:
                    outcomes[number] = None
                else:
                    outcomes[number] = Provision(returned=False, account=user not in people)
        if new:
            found = await self._create({key: group[number] for key, number in new.items()}, people)
            for key, number in new.items():
                outcomes[number] = found[key]
        return outcomes

    def _judge(
        self, one: Arriving, person: Mapping[str, Any] | None, row: Mapping[str, Any] | None, now: datetime
    ) -> _Verdict:
        if person is None:
            if not one.may_create:
                return None
            return "new" if row is None else "alone"
        if is_barred(person):
            return None
        if person.get("gap") is not None:
            return "alone"
        if row is None:
            return "new" if one.may_create else None
        if row.get("removedAt") is not None:
            return "alone"
        if not standing_of(row).accepts(int(one.moment(now).timestamp()), one.session):
            return None
        seen = row.get("lastSeen")
        if seen is not None and seen < now - self._accounts.inactive + _NEARLY:
            return "alone"
        arrival = arrival_of(row.get("gap"), row, changed=is_new(row, now), quiet=is_quiet(person))
        return replace(arrival, full=row.get("fullSince") is not None)

    async def _write(self, here: Mapping[str, int], group: Sequence[Arriving], now: datetime) -> list[str]:
        """Notes that these are here; returns those that must look again: they were removed meanwhile. Whose session ends at this
        moment is noted all the same, and cut off like who had arrived a moment before."""
        gone: list[str] = []
        for live in (True, False):
            keys = [key for key, number in here.items() if group[number].live is live]
            if not keys:
                continue
            change = {"lastSeen": now, "liveAt": now} if live else {"lastSeen": now}
            there = {"_id": {"$in": keys}, "removedAt": None}
            result = await _devices().update_many(there, {"$set": change})
            if result.matched_count < len(keys):
                left = {row["_id"] async for row in _devices().find(there, {"_id": 1})}
                gone += [key for key in keys if key not in left]
        return gone

    async def _erased(
        self, new: Iterable[Arriving], people: Mapping[str, Mapping[str, Any]], now: datetime
    ) -> set[str]:
        unknown = _unknown(new, people, now)
        return await self._accounts.erased(unknown) if unknown else set()

    async def _create(
        self, new: Mapping[str, Arriving], people: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, _Outcome | Exception]:
        """Makes devices that were never here, and their users where they are unknown."""
        unknown = _unknown(new.values(), people, utc_now())
        allowed = (await self._accounts.provision(unknown) if unknown else set()) | people.keys()
        found: dict[str, _Outcome | Exception] = dict.fromkeys(new)
        wanted = {key: one for key, one in new.items() if one.user in allowed}
        made = list(wanted)
        if made:
            # The moment is that of the write: for a few seconds whoever meets a new device tells of it, too.
            now = utc_now()
            try:
                await _devices().insert_many([_document(one, now) for one in wanted.values()], ordered=False)
            except BulkWriteError as error:
                failed = {int(one["index"]): one.get("code") for one in error.details.get("writeErrors", ())}
                if not failed:
                    raise
                for index, code in failed.items():
                    found[made[index]] = "beside" if code == _DUPLICATE else "alone"
                made = [key for index, key in enumerate(made) if index not in failed]
        # A suspension names the user first and ends their devices then: it has ended these, or is seen here.
        again = await _read(_users(), {new[key].user for key in made}, PERSON)
        for key in made:
            user = new[key].user
            person = again.get(user)
            arrival = arrival_of(None, {}, changed=True, quiet=is_quiet(person or {}))
            if person is None or is_barred(person):
                found[key] = await self._accounts.unless_barred(user, key, arrival)
            else:
                found[key] = arrival
        return found


def _unknown(
    new: Iterable[Arriving], people: Mapping[str, Mapping[str, Any]], now: datetime
) -> dict[str, datetime]:
    """The unknown users of these devices, with the moment of their latest token."""
    unknown: dict[str, datetime] = {}
    for one in new:
        if one.user not in people:
            moment = one.moment(now)
            unknown[one.user] = max(moment, unknown.get(one.user, moment))
    return unknown


@asynccontextmanager
async def _turn(lock: asyncio.Lock | asyncio.Semaphore, until: float) -> AsyncIterator[None]:
    """Holds it. Raises RelayError ``unavailable`` when it is not free by then."""
    try:
        async with asyncio.timeout_at(until):
            await lock.acquire()
    except TimeoutError:
        raise _too_many() from None
    try:
        yield
    finally:
        lock.release()


def _too_many() -> RelayError:
    return RelayError("unavailable", "too many devices connect at once; try again", retry_after=1000)


def _concerns_all(error: PyMongoError) -> bool:
    """Whether MongoDB is away: asking for each device would only take longer. What took too long may be one's fault."""
    return isinstance(error, ConnectionFailure) and not isinstance(error, NetworkTimeout)


def _document(one: Arriving, now: datetime) -> dict[str, Any]:
    here = {"lastSeen": now, "liveAt": now} if one.live else {"lastSeen": now}
    return {"_id": one.key, "user": one.user, "createdAt": now, "updatedAt": stamp_now(), **here}


async def _read(collection: Any, ids: Iterable[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    wanted = list(ids)
    # One batch: what is read is small.
    cursor = collection.find({"_id": {"$in": wanted}}, fields, batch_size=len(wanted) + 1)
    return {row["_id"]: row async for row in cursor}


def _users() -> Any:
    return User.get_motor_collection()


def _devices() -> Any:
    return Device.get_motor_collection()
