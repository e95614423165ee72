"""Users and devices: who exists, when a device was last seen, what it may have missed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pymongo import ReturnDocument, UpdateOne

from models.accounts import Device, User
from relay.store.mongo import DuplicateKeyError
from relay.wire.ids import device_key

_BULK: Final = 1000


@dataclass(frozen=True, slots=True)
class Arrival:
    """A device has connected. ``changed``: it is new, or back from inactivity, so recipients must be resolved again.
    ``gap_since`` (ms) and ``gap_why`` are set while it may have missed messages."""

    changed: bool
    gap_since: int | None
    gap_why: str | None


class Accounts:
    """The ``users`` and ``devices`` collections."""

    def __init__(self, *, inactive: timedelta) -> None:
        self._inactive = inactive

    async def exists(self, user: str) -> bool:
        """Whether this user is known."""
        return await User.find_one(User.id == user) is not None

    async def add_users(self, users: Iterable[str]) -> None:
        """Creates the users that are unknown. Safe to repeat and to race."""
        now = datetime.now(UTC)
        wanted = [
            UpdateOne({"_id": user}, {"$setOnInsert": {"createdAt": now}}, upsert=True)
            for user in dict.fromkeys(users)
        ]
        if wanted:
            await User.get_motor_collection().bulk_write(wanted, ordered=False)

    async def missing_users(self, users: Sequence[str]) -> list[str]:
        """Those of these users that are unknown."""
        cursor = User.get_motor_collection().find({"_id": {"$in": list(users)}}, {"_id": 1})
        known = {document["_id"] async for document in cursor}
        return [user for user in users if user not in known]

    async def arrive(self, user: str, device: str, *, provision: bool) -> Arrival | None:
        """Notes that a device is here now; creates it (and its user) when ``provision``. None when the user or the
        device is unknown and may not be created."""
        key = device_key(user, device)
        now = datetime.now(UTC)
        devices = Device.get_motor_collection()
        cutoff = now - self._inactive
        here = {"$set": {"lastSeen": now}}
        before = await devices.find_one_and_update(
            {"_id": key, "$or": [{"lastSeen": None}, {"lastSeen": {"$gte": cutoff}}]},
            here,
            return_document=ReturnDocument.BEFORE,
        )
        if before is not None:
            return _arrival(before.get("gap"), changed=False)
        before = await devices.find_one({"_id": key})
        if before is None:
            if not provision:
                return None
            await self.add_users([user])
            try:
                await devices.insert_one({"_id": key, "user": user, "createdAt": now, "lastSeen": now})
            except DuplicateKeyError:
                return await self._arrive_beside(user, device, provision=provision)
            return _arrival(None, changed=True)
        if before.get("lastSeen") is None or before["lastSeen"] >= cutoff:
            return await self._arrive_beside(user, device, provision=provision)
        # The gap first: should this die in between, the device still counts as away, and the next arrival finds both.
        gap = before.get("gap")
        if gap is None:
            gap = {"since": before["lastSeen"] + self._inactive, "why": "inactive"}
            await devices.update_one({"_id": key, "gap": None}, {"$set": {"gap": gap}})
        await devices.update_one({"_id": key}, here)
        return _arrival(gap, changed=True)

    async def _arrive_beside(self, user: str, device: str, *, provision: bool) -> Arrival | None:
        """Another connection of this device arrives at the same moment, and may not have told anybody yet."""
        arrival = await self.arrive(user, device, provision=provision)
        return None if arrival is None else replace(arrival, changed=True)

    async def close_gap(self, user: str, device: str) -> None:
        """The device has drained: it knows that it missed something."""
        await Device.get_motor_collection().update_one(
            {"_id": device_key(user, device)}, {"$unset": {"gap": ""}}
        )

    async def seen(self, keys: Iterable[str]) -> None:
        """Notes that these devices are, or were just now, connected."""
        now = datetime.now(UTC)
        wanted = list(keys)
        for start in range(0, len(wanted), _BULK):
            await Device.get_motor_collection().update_many(
                {"_id": {"$in": wanted[start : start + _BULK]}}, {"$max": {"lastSeen": now}}
            )

    async def active_devices(self, users: Sequence[str]) -> Mapping[str, list[str]]:
        """The device keys that get new messages, by user: seen within the time of inactivity, or never connected yet."""
        cutoff = datetime.now(UTC) - self._inactive
        query: dict[str, Any] = {
            "user": {"$in": list(users)},
            "$or": [{"lastSeen": None}, {"lastSeen": {"$gte": cutoff}}],
        }
        found: dict[str, list[str]] = {}
        async for document in Device.get_motor_collection().find(query, {"user": 1}):
            found.setdefault(document["user"], []).append(document["_id"])
        return found


def _arrival(gap: Mapping[str, Any] | None, *, changed: bool) -> Arrival:
    if gap is None:
        return Arrival(changed, None, None)
    return Arrival(changed, milliseconds(gap["since"]), str(gap["why"]))


def milliseconds(moment: datetime) -> int:
    """Since the epoch. A stored time without a zone is UTC."""
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
