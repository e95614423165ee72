"""Users and devices: who exists, when a device was last seen, what it may have missed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, Final

from pymongo import ReturnDocument, UpdateOne

from models.accounts import Device, User
from models.housekeeping import Tombstone
from relay.security.pseudonyms import Pseudonyms
from relay.store.arriving import Arriving, Provision
from relay.store.mongo import DuplicateKeyError
from relay.wire.clock import utc_now
from relay.wire.ids import device_key
from relay.wire.stamps import stamp_now

# As long as resolved recipients are believed, and a commit takes.
_NEW: Final = timedelta(seconds=10)
_BULK: Final = 1000
_MAX_STANDINGS: Final = 100_000
_MOST_ENDED: Final = 100_000
PERSON: Final = {"suspendedAt": 1, "erasingAt": 1, "deliveredReceipts": 1, "gap": 1}
_DEVICE: Final = {"endedAt": 1, "removedAt": 1, "session.id": 1}


@dataclass(frozen=True, slots=True)
class Arrival:
    """A device has connected. ``changed``: it is new, or back from inactivity or removal, so recipients must be resolved
    again; ``returned``: back from removal, so its keys are not what they were.
    ``gap_since`` (ms) and ``gap_why`` are set while it may have missed messages. ``live_until`` (ms): up to when it was told what
    happens live, as far as is known; None for a new device. ``quiet``: others shall not be told what it receives. ``full``: it
    is left out of new messages."""

    changed: bool
    gap_since: int | None
    gap_why: str | None
    returned: bool = False
    live_until: int | None = None
    quiet: bool = False
    full: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """Which tokens of a device are good. ``ended`` (ms): those issued up to then are not; ``session``: the only one whose
    tokens are; ``barred``: none is, as the device is removed, or its user suspended or being erased."""

    ended: int | None
    session: str | None
    barred: bool

    def accepts(self, issued: int, session: str | None) -> bool:
        """Whether a token issued at ``issued`` (s), of ``session`` or of another issuer (None), is good."""
        if self.barred:
            return False
        if session is not None:
            return session == self.session
        return self.ended is None or issued * 1000 > self.ended


class Accounts:
    """The ``users`` and ``devices`` collections. ``inactive``: a device that was not seen for so long gets no new
    messages."""

    def __init__(self, *, inactive: timedelta, pseudonyms: Pseudonyms) -> None:
        self.inactive = inactive
        self._pseudonyms = pseudonyms
        self._standings: dict[str, tuple[float, Standing]] = {}
        self._forgotten = 0

    async def exists(self, user: str) -> bool:
        """Whether this user is known, and not being erased."""
        return not await self.missing_users([user])

    async def add_users(self, users: Iterable[str]) -> None:
        """Creates the users that are unknown, but not those who were erased. Safe to repeat and to race."""
        wanted = list(dict.fromkeys(users))
        known = {row["_id"] async for row in _users().find({"_id": {"$in": wanted}}, {"_id": 1})}
        # In this order: an erased user's tombstone is written before the user is deleted.
        unknown = {self._pseudonyms.of(user): user for user in wanted if user not in known}
        if not unknown:
            return
        graves = Tombstone.get_motor_collection().find({"_id": {"$in": list(unknown)}}, {"_id": 1})
        async for grave in graves:
            del unknown[grave["_id"]]
        await self._insert_users(unknown.values())

    async def missing_users(self, users: Sequence[str]) -> list[str]:
        """Those of these users that are unknown, or being erased."""
        cursor = _users().find({"_id": {"$in": list(users)}, "erasingAt": None}, {"_id": 1})
        known = {document["_id"] async for document in cursor}
        return [user for user in users if user not in known]

    async def arrive(self, one: Arriving) -> Arrival | Provision | None:
        """Notes that a device is here now.

        When it may be created, so may its user, and a device that was removed before the token was issued is brought back; but
        only what the trail says already is done: what it has yet to say is the answer, and nothing has been made. None when the
        token is not good for this device (``Standing``), or the user or the device is unknown and may not be created.
        """
        user, key = one.user, one.key
        now = utc_now()
        moment = one.moment(now)
        person = await _users().find_one({"_id": user}, PERSON)
        if person is None:
            if not one.may_create or await self.erased({user: moment}):
                return None
            if one.noted is None:
                row = await _devices().find_one({"_id": key}, {"removedAt": 1})
                return Provision(returned=row is not None and row.get("removedAt") is not None, account=True)
            await self._insert_users([user])
        elif is_barred(person):
            return None
        cutoff = now - self.inactive
        here = {"$set": {"lastSeen": now, "liveAt": now} if one.live else {"lastSeen": now}}
        quiet = is_quiet(person or {})
        good: dict[str, Any] = (
            {"$or": [{"endedAt": None}, {"endedAt": {"$lt": moment}}]}
            if one.session is None
            else {"session.id": one.session}
        )
        active = {"$or": [{"lastSeen": None}, {"lastSeen": {"$gte": cutoff}}]}
        before = await _devices().find_one_and_update(
            {"_id": key, "removedAt": None, "$and": [active, good]},
            here,
            return_document=ReturnDocument.BEFORE,
        )
        if before is not None:
            arrival = arrival_of(before.get("gap"), before, changed=is_new(before, now), quiet=quiet)
            arrival = replace(arrival, full=before.get("fullSince") is not None)
            return await self._with_gap_of(person, key, arrival)
        before = await _devices().find_one({"_id": key})
        if before is None:
            if not one.may_create:
                return None
            if not one.is_noted(returned=False):
                return Provision(returned=False, account=False)
            try:
                made = {"createdAt": now, "updatedAt": stamp_now(), **here["$set"]}
                await _devices().insert_one({"_id": key, "user": user, **made})
            except DuplicateKeyError:
                return await self._arrive_beside(one)
            arrival = await self._with_gap_of(person, key, arrival_of(None, {}, changed=True, quiet=quiet))
            return await self.unless_barred(user, key, arrival)
        if not standing_of({**before, "removedAt": None}).accepts(int(moment.timestamp()), one.session):
            return None
        if before.get("removedAt") is not None:
            if not one.may_create:
                return None
            if not one.is_noted(returned=True):
                return Provision(returned=True, account=False)
            return await self.unless_barred(user, key, await self._return(before, now, quiet=quiet))
        if before.get("lastSeen") is None or before["lastSeen"] >= cutoff:
            return await self._arrive_beside(one)
        # The gap first: should this die in between, the device still counts as away, and the next arrival finds both.
        gap = before.get("gap")
        if gap is None:
            gap = {"since": before["lastSeen"] + self.inactive, "why": "inactive"}
            await _devices().update_one({"_id": key, "gap": None}, {"$set": {"gap": gap}})
        await _devices().update_one({"_id": key}, {"$set": {**here["$set"], "backAt": now}})
        return arrival_of(gap, before, changed=True, quiet=quiet)

    async def _with_gap_of(self, person: Mapping[str, Any] | None, key: str, arrival: Arrival) -> Arrival:
        """Messages for whichever device comes next were left out of a full mailbox: this one takes that gap over."""
        gap = None if person is None else person.get("gap")
        if person is None or gap is None or arrival.gap_since is not None:
            return arrival
        await _devices().update_one({"_id": key, "gap": None}, {"$set": {"gap": gap}})
        await _users().update_one(
            {"_id": person["_id"], "gap.latest": gap.get("latest")}, {"$unset": {"gap": ""}}
        )
        return replace(arrival, gap_since=milliseconds(gap["since"]), gap_why=str(gap["why"]))

    async def _arrive_beside(self, one: Arriving) -> Arrival | Provision | None:
        """Another connection of this device arrives at the same moment, and may not have told anybody yet."""
        arrival = await self.arrive(one)
        return replace(arrival, changed=True) if isinstance(arrival, Arrival) else arrival

    async def _return(self, before: Mapping[str, Any], now: datetime, *, quiet: bool) -> Arrival:
        """A removed device is here again, as a new one with an old name: what it missed is gone."""
        gap = gap_of_return(before)
        await _devices().update_one(
            {"_id": before["_id"], "removedAt": before["removedAt"]},
            {
                "$set": {"since": now, "lastSeen": now, "updatedAt": stamp_now(), "gap": gap},
                "$unset": {"removedAt": "", "fullSince": ""},
            },
        )
        return arrival_of(gap, {}, changed=True, returned=True, quiet=quiet)

    async def unless_barred(self, user: str, key: str, arrival: Arrival) -> Arrival | None:
        """For a device that was made a recipient just now. A suspension names the user first and ends their devices then:
        it has ended this one, or is seen here."""
        person = await _users().find_one({"_id": user}, PERSON)
        if person is not None and not is_barred(person):
            return arrival
        now = utc_now()
        await _devices().update_one({"_id": key}, {"$set": {"endedAt": now, "updatedAt": stamp_now()}})
        return None

    async def provision(self, users: Mapping[str, datetime]) -> set[str]:
        """Creates the users whom tokens of these moments bring, but those who were erased since; returns the former."""
        created = set(users) - await self.erased(users)
        await self._insert_users(created)
        return created

    async def erased(self, users: Mapping[str, datetime]) -> set[str]:
        """Those of these users who were erased since these moments."""
        named = {self._pseudonyms.of(user): user for user in users}
        graves = Tombstone.get_motor_collection().find({"_id": {"$in": list(named)}})
        return {named[one["_id"]] async for one in graves if users[named[one["_id"]]] <= one["at"]}

    async def _insert_users(self, users: Iterable[str]) -> None:
        now = utc_now()
        wanted = [
            UpdateOne({"_id": user}, {"$setOnInsert": {"createdAt": now}}, upsert=True) for user in users
        ]
        if wanted:
            await _users().bulk_write(wanted, ordered=False)

    async def standing(self, user: str, device: str, *, within: float = 0) -> Standing | None:
        """Which tokens of a device are good, as of at most ``within`` seconds ago; None when user or device is unknown."""
        key = device_key(user, device)
        asked, forgotten = monotonic(), self._forgotten
        found = self._standings.get(key)
        if found is not None and asked - found[0] < within:
            return found[1]
        person = await _users().find_one({"_id": user}, PERSON)
        row = None if person is None else await _devices().find_one({"_id": key}, _DEVICE)
        if person is None or row is None:
            return None
        standing = standing_of(row, barred=is_barred(person))
        # What ended while this was read may be missing from it.
        if forgotten == self._forgotten:
            if len(self._standings) >= _MAX_STANDINGS:
                self._standings.clear()
            self._standings[key] = (asked, standing)
        return standing

    def forget(self, key: str) -> None:
        """The standing of a device has changed: the next question about it goes to the store."""
        self._forgotten += 1
        self._standings.pop(key, None)

    async def ended_since(self, moment: datetime) -> AsyncIterator[tuple[str, Standing]]:
        """The devices whose sessions or tokens were ended since then, and which tokens are still good; at most a hundred
        thousand."""
        cursor = _devices().find({"endedAt": {"$gte": moment}}, _DEVICE).limit(_MOST_ENDED)
        async for row in cursor:
            yield row["_id"], standing_of(row)

    async def barred_since(self, moment: datetime) -> AsyncIterator[str]:
        """The users who were suspended, or whose erasure began, since then; at most a hundred thousand of each."""
        for mark in ("suspendedAt", "erasingAt"):
            cursor = _users().find({mark: {"$gte": moment}}, {"_id": 1}).limit(_MOST_ENDED)
            async for row in cursor:
                yield row["_id"]

    async def close_gap(self, user: str, device: str, shown: datetime | None = None) -> None:
        """The device has drained: it knows that it missed something. Not while it is full, and not when more was left out
        since it was ``shown`` the gap."""
        query: dict[str, Any] = {"_id": device_key(user, device), "fullSince": None}
        if shown is not None:
            query["$or"] = [{"gap.latest": None}, {"gap.latest": {"$lt": shown}}]
        await _devices().update_one(query, {"$unset": {"gap": ""}})

    async def seen(self, heard: Mapping[str, datetime]) -> None:
        """Notes when these devices were last heard on a WebSocket: what had been told to them by then, they have."""
        wanted = [
            UpdateOne({"_id": key}, {"$max": {"lastSeen": moment, "liveAt": moment}})
            for key, moment in heard.items()
        ]
        for start in range(0, len(wanted), _BULK):
            await _devices().bulk_write(wanted[start : start + _BULK], ordered=False)

    async def active_devices(self, users: Sequence[str]) -> Mapping[str, list[str]]:
        """The device keys that get new messages, by user: seen within the time of inactivity, or never connected yet."""
        cutoff = utc_now() - self.inactive
        query: dict[str, Any] = {
            "user": {"$in": list(users)},
            "removedAt": None,
            "$or": [{"lastSeen": None}, {"lastSeen": {"$gte": cutoff}}],
        }
        found: dict[str, list[str]] = {}
        async for document in _devices().find(query, {"user": 1}):
            found.setdefault(document["user"], []).append(document["_id"])
        return found


def is_new(device: Mapping[str, Any], now: datetime) -> bool:
    """Whether a stored device became a recipient just now: who made it one may not have told it yet, or have died before."""
    moments = [device[name] for name in ("createdAt", "since", "backAt") if device.get(name) is not None]
    return bool(moments) and now - max(moments) < _NEW


def gap_of_return(before: Mapping[str, Any]) -> dict[str, Any]:
    """The gap of a device that was removed and is back: what waited for it when it was last seen is gone."""
    found: dict[str, Any] | None = before.get("gap")
    return found or {"since": before.get("lastSeen") or before["removedAt"], "why": "reset"}


def arrival_of(
    gap: Mapping[str, Any] | None,
    before: Mapping[str, Any],
    *,
    changed: bool,
    quiet: bool,
    returned: bool = False,
) -> Arrival:
    """The arrival of a device that was stored as ``before`` (nothing of a new one) and has this gap."""
    live = before.get("liveAt")
    until = None if live is None else milliseconds(live)
    if gap is None:
        return Arrival(changed, None, None, returned, until, quiet)
    return Arrival(changed, milliseconds(gap["since"]), str(gap["why"]), returned, until, quiet)


def standing_of(row: Mapping[str, Any], *, barred: bool = False) -> Standing:
    """The standing of a stored device; ``barred``: its user may not use the relay."""
    ended = row.get("endedAt")
    return Standing(
        ended=None if ended is None else milliseconds(ended),
        session=(row.get("session") or {}).get("id"),
        barred=barred or row.get("removedAt") is not None,
    )


def is_barred(person: Mapping[str, Any]) -> bool:
    """Whether a stored user may not use the relay."""
    return person.get("suspendedAt") is not None or person.get("erasingAt") is not None


def is_quiet(person: Mapping[str, Any]) -> bool:
    """Whether a stored user does not want others to be told what their devices have received."""
    return person.get("deliveredReceipts") is False


def _users() -> Any:
    return User.get_motor_collection()


def _devices() -> Any:
    return Device.get_motor_collection()


def milliseconds(moment: datetime) -> int:
    """Since the epoch. A stored time without a zone is UTC."""
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
