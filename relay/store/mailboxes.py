"""Full mailboxes: how many messages wait in one, and which of them are latched as full.

A latch is written on the device (``fullSince``), and for the placeholders of a person on the user (``full``), where every
node's rosters see it. With it comes a gap, before any message is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from pymongo import UpdateOne

from models.accounts import Device, User
from models.messages import WAITING_INDEX
from relay.store.mongo import Mongo, time_limit
from relay.store.shards import Shards
from relay.wire.ids import any_device_key, is_placeholder, user_of

_COUNTERS: Final = 2
_BULK: Final = 1000


class LeftOut(NamedTuple):
    """When a mailbox was first and last left out of a message."""

    since: datetime
    latest: datetime


class Count(NamedTuple):
    """How many messages wait in a mailbox; not ``whole`` when a shard was down: what waits there was not counted."""

    waiting: int
    whole: bool


class Mailboxes:
    """Counts, latches and unlatches. ``timeout`` (s) is for one call."""

    def __init__(self, mongo: Mongo, shards: Shards, *, timeout: float) -> None:
        self._messages = mongo.messages
        self._shards = shards
        self._timeout = timeout
        self._counters = asyncio.Semaphore(_COUNTERS)

    @property
    def whole(self) -> bool:
        """Whether every shard answers, so that everything that waits is counted."""
        return not self._shards.down

    async def count(self, key: str, most: int) -> Count:
        """How many messages wait in a mailbox, on the shards that answer; ``most`` when there are as many or more. Raises
        PyMongoError."""
        async with self._counters:
            # What is true now, not when it came: a shard may have died while it waited for its turn.
            reachable = self._shards.reachable
            options = {"hint": WAITING_INDEX} if reachable else {}
            with time_limit(self._timeout):
                waiting = await self._messages.count_documents(
                    {"awaiting": key, **reachable}, limit=most, **options
                )
            return Count(int(waiting), whole=not reachable)

    async def latch(self, keys: Sequence[str], now: datetime) -> None:
        """Marks mailboxes as full, with a gap. May be repeated."""
        await self._write(
            [
                _latch_placeholder(key, now) if is_placeholder(key) else _latch_device(key, now)
                for key in keys
            ],
            keys,
        )

    async def unlatch(self, keys: Sequence[str]) -> None:
        """These take messages again. Their gaps stay. May be repeated."""
        steps = []
        for key in keys:
            if is_placeholder(key):
                steps.append(UpdateOne({"_id": user_of(key)}, _UNLATCH[_part(key)]))
            else:
                steps.append(UpdateOne({"_id": key}, {"$unset": {"fullSince": ""}}))
        await self._write(steps, keys)

    async def latched_since(self, moment: datetime, most: int) -> dict[str, datetime]:
        """The devices whose mailboxes were latched since then and are still, by whatever node, and when; at most so many."""
        query = {"fullSince": {"$gte": moment}}
        with time_limit(self._timeout):
            cursor = Device.get_motor_collection().find(query, {"fullSince": 1}).limit(most)
            return {row["_id"]: row["fullSince"] async for row in cursor}

    async def note_left_out(self, moments: Mapping[str, LeftOut]) -> None:
        """Messages were left out of these: each has a gap that tells so, and that is not closed for having been shown
        before."""
        steps, keys = [], []
        for key, moment in moments.items():
            if is_placeholder(key) and _part(key) == "blocked":
                continue
            name = user_of(key) if is_placeholder(key) else key
            change = [{"$set": {"gap": _gap(moment.since, moment.latest)}}]
            steps.append(UpdateOne({"_id": name}, change))
            keys.append(key)
        await self._write(steps, keys)

    async def _write(self, steps: Sequence[UpdateOne], keys: Iterable[str]) -> None:
        users = [step for step, key in zip(steps, keys, strict=True) if is_placeholder(key)]
        devices = [step for step, key in zip(steps, keys, strict=True) if not is_placeholder(key)]
        for model, wanted in ((Device, devices), (User, users)):
            for start in range(0, len(wanted), _BULK):
                with time_limit(self._timeout):
                    await model.get_motor_collection().bulk_write(
                        wanted[start : start + _BULK], ordered=False
                    )


def _part(key: str) -> str:
    return "any" if key == any_device_key(user_of(key)) else "blocked"


def _gap(since: datetime, latest: datetime) -> dict[str, Any]:
    """The first gap stays; ``latest`` moves on."""
    return {
        "$mergeObjects": [
            {"since": since, "why": "full"},
            {"$ifNull": ["$gap", {}]},
            {"latest": {"$max": ["$gap.latest", latest]}},
        ]
    }


def _first_gap(full: str, now: datetime) -> dict[str, Any]:
    """The gap that comes with a latch; one that is latched already has it."""
    return {"$cond": [{"$gt": [full, None]}, "$gap", _gap(now, now)]}


def _latch_device(key: str, now: datetime) -> UpdateOne:
    change = [{"$set": {"fullSince": {"$ifNull": ["$fullSince", now]}, "gap": _first_gap("$fullSince", now)}}]
    return UpdateOne({"_id": key, "removedAt": None}, change)


def _latch_placeholder(key: str, now: datetime) -> UpdateOne:
    part = _part(key)
    fields: dict[str, Any] = {f"full.{part}": {"$ifNull": [f"$full.{part}", now]}}
    if part == "any":
        fields["gap"] = _first_gap("$full.any", now)
    return UpdateOne({"_id": user_of(key)}, [{"$set": fields}])


_UNLATCH: Final[Mapping[str, Mapping[str, Any]]] = {
    part: {"$unset": {f"full.{part}": ""}} for part in ("any", "blocked")
}
