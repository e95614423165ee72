"""People: profiles, preferences, how they are found, and who of them is suspended.

Whatever others find a person by is derived from the profile (``search_keys``) and written together with it, on the condition
that the profile is still the one that was read: two changes at once cannot leave keys that belong to neither.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, TypedDict

from pymongo import ReturnDocument

from models.accounts import Device, User
from models.conversations import Membership
from relay.store.accounts import is_quiet, milliseconds
from relay.store.searching import find_people, fold, search_keys
from relay.wire.clock import utc_now
from relay.wire.errors import RelayError
from relay.wire.ids import device_key
from relay.wire.stamps import stamp_now

__all__ = [
    "Circle",
    "OwnProfile",
    "PastSearch",
    "People",
    "Profile",
    "Restriction",
    "fold",
    "is_present",
    "later_than",
    "search_keys",
    "shown",
]

Circle = Literal["anyone", "contacts"]
SEARCHES: Final = 15
_ATTEMPTS: Final = 20
_TICK: Final = timedelta(milliseconds=1)
_SHARED_MOST: Final = 5000
_SHARED_BATCH: Final = 500
_MOST_CHANGED: Final = 100_000
_GUARDED: Final = (
    "username",
    "name",
    "phone",
    "findableByName",
    "findableByPhone",
    "suspendedAt",
    "erasingAt",
    "updatedAt",
)
_PUBLIC: Final = {"username": 1, "name": 1, "picture": 1, "about": 1, "suspendedAt": 1, "erasingAt": 1}
_OWN: Final = {
    **_PUBLIC,
    "phone": 1,
    "createdAt": 1,
    "updatedAt": 1,
    "findableByName": 1,
    "findableByPhone": 1,
    "whoMayMessage": 1,
    "whoMayAdd": 1,
    "deliveredReceipts": 1,
    "receiptsAt": 1,
    "readReceipts": 1,
}


class Restriction(TypedDict):
    """Whom a person lets write to them, and add them to groups."""

    whoMayMessage: Circle
    whoMayAdd: Circle


@dataclass(frozen=True, slots=True)
class Profile:
    """What everybody may see of a person."""

    id: str
    username: str | None
    name: str | None
    picture: str | None
    about: str | None


@dataclass(frozen=True, slots=True)
class OwnProfile:
    """What a person sees of themselves. ``created_at`` in milliseconds, as ``receipts_at``: when ``delivered_receipts`` last
    changed, 0 for never."""

    id: str
    username: str | None
    name: str | None
    phone: str | None
    picture: str | None
    about: str | None
    created_at: int
    findable_by_name: bool
    findable_by_phone: bool
    who_may_message: Circle
    who_may_add: Circle
    delivered_receipts: bool
    read_receipts: bool
    receipts_at: int = 0


@dataclass(frozen=True, slots=True)
class PastSearch:
    """A search of a person; ``at`` in milliseconds."""

    q: str
    at: int


class People:
    """The profiles in the ``users`` collection. Needs no running node."""

    async def own(self, user: str) -> OwnProfile:
        """A person's profile for themselves. Raises RelayError ``not_found``."""
        document = await User.get_motor_collection().find_one({"_id": user}, _OWN)
        if document is None:
            raise _unknown()
        return _own(document)

    async def change(self, user: str, changes: Mapping[str, str | bool | None]) -> OwnProfile:
        """Sets fields of the profile (named as in the document), None unsets; search keys follow. Changes of several
        callers at once all last. Raises RelayError ``not_found``."""
        return _own(await self._change(user, changes))

    async def profile(self, user: str) -> Profile | None:
        """What everybody may see of this person; None when unknown, suspended or being erased."""
        return (await self.profiles([user])).get(user)

    async def profiles(self, users: Iterable[str]) -> dict[str, Profile]:
        """What everybody may see of these people, with one query. Who is unknown, suspended or being erased is absent."""
        cursor = User.get_motor_collection().find({"_id": {"$in": list(users)}}, _PUBLIC)
        return {document["_id"]: shown(document) async for document in cursor if is_present(document)}

    async def names(self, users: Iterable[str]) -> dict[str, str | None]:
        """What to call these people (their name, else their user name, else None), with one query. Unknown ones are
        absent."""
        return await names_of(users)

    async def restricted(self, users: Iterable[str]) -> dict[str, Restriction]:
        """Those of these people who do not let anybody write to them or add them, with one query."""
        cursor = User.get_motor_collection().find(
            {
                "_id": {"$in": list(users)},
                "$or": [{"whoMayMessage": "contacts"}, {"whoMayAdd": "contacts"}],
            },
            {"whoMayMessage": 1, "whoMayAdd": 1},
        )
        return {
            row["_id"]: Restriction(
                whoMayMessage=_circle(row, "whoMayMessage"), whoMayAdd=_circle(row, "whoMayAdd")
            )
            async for row in cursor
        }

    async def is_quiet(self, user: str) -> bool:
        """Whether others shall not be told what this person's devices have received."""
        query = {"_id": user, "deliveredReceipts": False}
        return await User.get_motor_collection().find_one(query, {"_id": 1}) is not None

    async def receipts_changed_since(self, moment: datetime) -> AsyncIterator[tuple[str, bool, int]]:
        """Who has changed since then whether others are told what their devices have received: whether they shall not be, and
        when that changed (ms). At most a hundred thousand."""
        cursor = User.get_motor_collection().find(
            {"receiptsAt": {"$gte": moment}}, {"deliveredReceipts": 1, "receiptsAt": 1}
        )
        async for row in cursor.limit(_MOST_CHANGED):
            yield row["_id"], is_quiet(row), milliseconds(row["receiptsAt"])

    async def last_seen(self, users: Iterable[str]) -> dict[str, int]:
        """When a device of each of these people was last noted (ms), with one query. Who never connected is absent. A device
        that stays connected is noted now and then only."""
        cursor = Device.get_motor_collection().find(
            {"user": {"$in": list(users)}, "lastSeen": {"$type": "date"}},
            {"_id": 0, "user": 1, "lastSeen": 1},
        )
        found: dict[str, int] = {}
        async for row in cursor:
            found[row["user"]] = max(found.get(row["user"], 0), milliseconds(row["lastSeen"]))
        return found

    async def share_conversation(self, user: str, other: str) -> bool:
        """Whether both are members of one conversation. Looks at the ``_SHARED_MOST`` conversations of ``user`` that changed
        last."""
        memberships = Membership.get_motor_collection()
        cursor = (
            memberships.find({"user": user, "removedAt": None}, {"conversationId": 1})
            .sort([("updatedAt", -1), ("_id", 1)])
            .limit(_SHARED_MOST)
        )
        wanted: list[str] = []
        async for row in cursor:
            wanted.append(f"{row['conversationId']} {other}")
            if len(wanted) == _SHARED_BATCH:
                if await _any_member(wanted):
                    return True
                wanted = []
        return bool(wanted) and await _any_member(wanted)

    async def set_push(self, user: str, device: str, push: Mapping[str, str] | None) -> bool:
        """Where this device is told that something waits (``provider`` and ``token``); None: nowhere. False when the device
        is unknown or removed."""
        change: dict[str, Any] = {"$set": {"updatedAt": stamp_now()}}
        if push is None:
            change["$unset"] = {"push": ""}
        else:
            change["$set"]["push"] = {"provider": push["provider"], "token": push["token"]}
        done = await Device.get_motor_collection().update_one(
            {"_id": device_key(user, device), "removedAt": None}, change
        )
        return bool(done.matched_count)

    async def search(self, q: str, *, limit: int, cursor: str | None) -> tuple[list[Profile], str | None]:
        """A page of the people found by ``q``, whoever asks, and the cursor of the next: by phone, exactly, when ``q`` looks
        like a number, else by the beginning of name or user name, in their folded order. Each once; also those who blocked
        who asks, who must not notice. A page may be shorter than ``limit`` though more follows. Raises RelayError
        ``bad_request`` for a cursor that is none."""
        found, following = await find_people(q, limit=limit, cursor=cursor, projection=_PUBLIC)
        return [shown(document) for document in found if is_present(document)], following

    async def remember_search(self, user: str, q: str) -> None:
        """Puts a search in front of the last ``SEARCHES``; each text stands there once."""
        users = User.get_motor_collection()
        await users.update_one({"_id": user}, {"$pull": {"searches": {"q": q}}})
        entry = {"q": q, "at": utc_now()}
        # Somebody may have put the same text there in between: then it is new already.
        await users.update_one(
            {"_id": user, "searches.q": {"$ne": q}},
            {"$push": {"searches": {"$each": [entry], "$position": 0, "$slice": SEARCHES}}},
        )

    async def searches(self, user: str) -> list[PastSearch]:
        """The last searches, newest first."""
        document = await User.get_motor_collection().find_one({"_id": user}, {"searches": 1})
        entries: Sequence[Mapping[str, Any]] = (document or {}).get("searches") or ()
        return [PastSearch(entry["q"], milliseconds(entry["at"])) for entry in entries]

    async def clear_searches(self, user: str) -> None:
        """Forgets the last searches."""
        await User.get_motor_collection().update_one({"_id": user}, {"$unset": {"searches": ""}})

    async def suspend(self, user: str) -> bool:
        """Nobody finds this person any more, and the sessions and tokens of all their devices end. Safe to repeat, which
        also finishes what a crash left half done. False when the person is unknown."""
        try:
            document = await self._change(user, {"suspendedAt": utc_now()}, keep={"suspendedAt"})
        except RelayError as error:
            if error.code != "not_found":
                raise
            return False
        now = utc_now()
        await Device.get_motor_collection().update_many(
            {"user": user, "$or": [{"endedAt": None}, {"endedAt": {"$lt": document["suspendedAt"]}}]},
            {"$set": {"endedAt": now, "updatedAt": stamp_now()}, "$unset": {"session": ""}},
        )
        return True

    async def unsuspend(self, user: str) -> bool:
        """The person may log in again. Safe to repeat. False when the person is unknown."""
        try:
            await self._change(user, {"suspendedAt": None})
        except RelayError as error:
            if error.code != "not_found":
                raise
            return False
        return True

    async def _change(
        self, user: str, changes: Mapping[str, str | bool | datetime | None], *, keep: Iterable[str] = ()
    ) -> dict[str, Any]:
        """``keep`` names fields that stay when they are there."""
        users = User.get_motor_collection()
        for _ in range(_ATTEMPTS):
            before = await users.find_one({"_id": user}, _OWN)
            if before is None:
                raise _unknown()
            wanted = {
                name: value
                for name, value in changes.items()
                if before.get(name) != value and not (name in keep and before.get(name) is not None)
            }
            keys, stale = search_keys({**before, **wanted})
            if not wanted:
                return dict(before)
            moment = later_than(before.get("updatedAt"))
            if "deliveredReceipts" in wanted:
                wanted["receiptsAt"] = moment
            after = await users.find_one_and_update(
                {"_id": user, **{name: before.get(name) for name in _GUARDED}},
                {
                    "$set": {
                        **{name: value for name, value in wanted.items() if value is not None},
                        **keys,
                        "updatedAt": moment,
                    },
                    "$unset": {
                        **{name: "" for name, value in wanted.items() if value is None},
                        **dict.fromkeys(stale, ""),
                    },
                },
                projection=_OWN,
                return_document=ReturnDocument.AFTER,
            )
            if after is not None:
                return dict(after)
        raise RelayError("unavailable", "the profile is being changed; try again", retry_after=200)


async def names_of(users: Iterable[str]) -> dict[str, str | None]:
    """What to call these people (their name, else their user name, else None), with one query. Unknown ones are
    absent."""
    cursor = User.get_motor_collection().find({"_id": {"$in": list(users)}}, {"name": 1, "username": 1})
    return {row["_id"]: row.get("name") or row.get("username") async for row in cursor}


def later_than(moment: datetime | None) -> datetime:
    """Now, and in any case later than this: what is compared to notice a change never stands still."""
    now = stamp_now()
    if moment is None:
        return now
    before = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(now, before + _TICK)


def is_present(document: Mapping[str, Any]) -> bool:
    """Whether a stored user is neither suspended nor being erased."""
    return document.get("suspendedAt") is None and document.get("erasingAt") is None


def shown(document: Mapping[str, Any]) -> Profile:
    """What everybody may see of a stored user."""
    return Profile(
        id=document["_id"],
        username=document.get("username"),
        name=document.get("name"),
        picture=document.get("picture"),
        about=document.get("about"),
    )


async def _any_member(memberships: Sequence[str]) -> bool:
    query = {"_id": {"$in": list(memberships)}, "removedAt": None}
    return await Membership.get_motor_collection().find_one(query, {"_id": 1}) is not None


def _own(document: Mapping[str, Any]) -> OwnProfile:
    return OwnProfile(
        id=document["_id"],
        username=document.get("username"),
        name=document.get("name"),
        phone=document.get("phone"),
        picture=document.get("picture"),
        about=document.get("about"),
        created_at=milliseconds(document["createdAt"]),
        findable_by_name=document.get("findableByName") is not False,
        findable_by_phone=document.get("findableByPhone") is not False,
        who_may_message=_circle(document, "whoMayMessage"),
        who_may_add=_circle(document, "whoMayAdd"),
        delivered_receipts=not is_quiet(document),
        read_receipts=document.get("readReceipts") is not False,
        receipts_at=milliseconds(document["receiptsAt"]) if document.get("receiptsAt") else 0,
    )


def _circle(document: Mapping[str, Any], name: str) -> Circle:
    return "contacts" if document.get(name) == "contacts" else "anyone"


def _unknown() -> RelayError:
    return RelayError("not_found", "no such user")
