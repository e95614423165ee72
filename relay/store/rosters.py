"""Rosters: everything that decides who receives a message, and who may send one, read for many conversations at once."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

from models.accounts import Device, User
from models.contacts import Contact
from models.conversations import Conversation, Membership
from relay.store.accounts import milliseconds
from relay.store.audience import Refusal, Roster
from relay.store.contacts import blocks_among
from relay.store.mongo import time_limit
from relay.wire.clock import utc_now
from relay.wire.ids import any_device_key, blocked_key, user_of

_LOAD: Final = 500
_BLOCKED: Final[Refusal] = ("blocked", "you have blocked this person; unblock them to write")
_CONTACTS_ONLY: Final[Refusal] = ("forbidden", "this person takes messages from their contacts only")
_FULL: Final[Refusal] = (
    "mailbox_full",
    "too many messages wait for this person already; send again when they have fetched some",
)
_MODERATORS_ONLY: Final[Refusal] = ("forbidden", "only admins and moderators may write here")


class Rosters:
    """Reads rosters. ``inactive``: a device that was not seen for so long gets no new messages."""

    def __init__(self, *, inactive: timedelta, timeout: float = 2) -> None:
        self._inactive = inactive
        self._timeout = timeout

    async def load(self, conversations: list[str]) -> Mapping[str, Roster]:
        """The rosters of these conversations; those that do not exist are absent. Two rounds of queries for each five
        hundred."""
        found: dict[str, Roster] = {}
        with time_limit(self._timeout):
            for start in range(0, len(conversations), _LOAD):
                found.update(await self._load(conversations[start : start + _LOAD], {}))
        return found

    async def mailboxes(self, users: Sequence[str]) -> dict[str, list[str]]:
        """The mailboxes of these users: the keys of their active devices, or their placeholder."""
        with time_limit(self._timeout):
            devices, _ = await self._devices(users)
        return {user: sorted(devices.get(user, ())) or [any_device_key(user)] for user in users}

    async def _load(self, conversations: list[str], making: Mapping[str, Sequence[str]]) -> dict[str, Roster]:
        cursor = Membership.get_motor_collection().find(
            {"conversationId": {"$in": conversations}, "removedAt": None},
            {"conversationId": 1, "user": 1, "role": 1},
        )
        roles: dict[str, dict[str, str]] = {}
        async for row in cursor:
            roles.setdefault(row["conversationId"], {})[row["user"]] = row["role"]
        for name, people in making.items():
            roles[name] = {**dict.fromkeys(people, "member"), **roles.get(name, {})}
        users = list({user for members in roles.values() for user in members})
        (devices, full), settings, blocks = await asyncio.gather(
            self._devices(users), self._settings(list(roles)), blocks_among(users)
        )
        if not making and (making := _being_made(roles, settings)):
            return await self._load(conversations, making)
        direct = {name: roles[name] for name, one in settings.items() if one["type"] == "direct"}
        closed = await self._closed(direct)
        full |= await self._full_placeholders(
            [user for user in users if user not in devices], {owner for owner, _ in blocks}
        )
        found: dict[str, Roster] = {}
        for name, members in roles.items():
            among = frozenset(pair for pair in blocks if pair[0] in members and pair[1] in members)
            refusals: dict[str, Refusal] = {}
            if name in direct:
                refusals.update((user, _CONTACTS_ONLY) for user in members if (name, user) in closed)
                refusals.update((owner, _BLOCKED) for owner, _ in among)
                for user in members:
                    if full and _are_full((other for other in members if other != user), devices, full):
                        refusals.setdefault(user, _FULL)
            elif settings.get(name, {}).get("whoMayPost") == "moderators":
                refusals.update(
                    (user, _MODERATORS_ONLY) for user, role in members.items() if role == "member"
                )
            found[name] = Roster(
                members={user: list(devices.get(user, ())) for user in members},
                relinked={
                    key: moment for user in members for key, moment in devices.get(user, {}).items() if moment
                },
                blocks=among,
                refusals=refusals,
                full=frozenset(key for key in full if user_of(key) in members) if full else frozenset(),
            )
        return found

    async def full_among(self, keys: Sequence[str]) -> set[str]:
        """Those of these mailboxes that take no more messages now."""
        with time_limit(self._timeout):
            query = {"_id": {"$in": list(keys)}, "fullSince": {"$exists": True}}
            found = {row["_id"] async for row in Device.get_motor_collection().find(query, {"_id": 1})}
            return found | await self._full_placeholders(
                [user_of(key) for key in keys if key == any_device_key(user_of(key))], ()
            )

    async def _devices(self, users: Sequence[str]) -> tuple[dict[str, dict[str, int]], set[str]]:
        """The active devices by user, with when their keys became another installation's (ms, or 0); and which are full."""
        cutoff = utc_now() - self._inactive
        query: dict[str, Any] = {
            "user": {"$in": list(users)},
            "removedAt": None,
            "$or": [{"lastSeen": None}, {"lastSeen": {"$gte": cutoff}}],
        }
        found: dict[str, dict[str, int]] = {}
        full: set[str] = set()
        fields = {"user": 1, "relinkedAt": 1, "fullSince": 1}
        async for row in Device.get_motor_collection().find(query, fields):
            moment = row.get("relinkedAt")
            found.setdefault(row["user"], {})[row["_id"]] = 0 if moment is None else milliseconds(moment)
            if row.get("fullSince") is not None:
                full.add(row["_id"])
        return found, full

    async def _full_placeholders(self, away: Sequence[str], blockers: Collection[str]) -> set[str]:
        """The full ones among the mailboxes of people without a device, and of what people have blocked."""
        absent = set(away)
        users = absent.union(blockers)
        if not users:
            return set()
        cursor = User.get_motor_collection().find(
            {"_id": {"$in": list(users)}, "full": {"$exists": True}}, {"full": 1}
        )
        found: set[str] = set()
        async for row in cursor:
            if row["full"].get("any") is not None and row["_id"] in absent:
                found.add(any_device_key(row["_id"]))
            if row["full"].get("blocked") is not None and row["_id"] in blockers:
                found.add(blocked_key(row["_id"]))
        return found

    async def _settings(self, conversations: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        cursor = Conversation.get_motor_collection().find(
            {"_id": {"$in": list(conversations)}},
            {"type": 1, "whoMayPost": 1, "rev": 1, "memberCount": 1, "pending.event": 1, "pending.users": 1},
        )
        return {row["_id"]: row async for row in cursor}

    async def _closed(self, direct: Mapping[str, Collection[str]]) -> set[tuple[str, str]]:
        """(conversation, user) pairs: the other one takes messages from contacts only, and this user is none."""
        people = list({user for members in direct.values() for user in members})
        if not people:
            return set()
        cursor = User.get_motor_collection().find(
            {"_id": {"$in": people}, "whoMayMessage": "contacts"}, {"_id": 1}
        )
        strict = {row["_id"] async for row in cursor}
        if not strict:
            return set()
        asked = [
            (name, owner, user)
            for name, members in direct.items()
            for owner in strict.intersection(members)
            for user in members
            if user != owner
        ]
        rows = Contact.get_motor_collection().find(
            {"_id": {"$in": [f"{owner} {user}" for _, owner, user in asked]}, "listed": True}, {"_id": 1}
        )
        listed = {row["_id"] async for row in rows}
        return {(name, user) for name, owner, user in asked if f"{owner} {user}" not in listed}


def _being_made(
    roles: Mapping[str, Collection[str]], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Sequence[str]]:
    """The conversations whose memberships were not all written when they were read, and who is to be in those that are
    still being made: who sees a conversation early writes to everybody in it."""
    return {
        name: one["pending"]["users"] if one.get("pending", {}).get("event") == "created" else ()
        for name, one in settings.items()
        if one.get("memberCount", 0) > len(roles[name])
    }


def _are_full(users: Iterable[str], devices: Mapping[str, Collection[str]], full: Collection[str]) -> bool:
    """Whether there is somebody, and every mailbox of theirs is full. Whom somebody has blocked is told what others are."""
    keys = [key for user in users for key in (devices.get(user) or [any_device_key(user)])]
    return bool(keys) and all(key in full for key in keys)
