"""Read cursors: how far members have read. Moved in groups, and found by when they moved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from pymongo import UpdateOne

from models.accounts import User
from models.conversations import Conversation, Membership
from relay.store.accounts import milliseconds
from relay.store.contacts import blocks_among
from relay.store.mongo import time_limit
from relay.wire.frames import MAX_LIVE_MEMBERS

_CHUNK: Final = 200
_CONVERSATIONS: Final = 20_000
_FIELDS: Final = {"conversationId": 1, "user": 1, "readUpTo": 1, "readAt": 1}

Reader = tuple[str, str]
"""A conversation and one of its members."""


@dataclass(frozen=True, slots=True)
class ReadCursor:
    """How far a member has read, oneself included. ``at`` in milliseconds."""

    conversation: str
    user: str
    up_to: int
    at: int


@dataclass(frozen=True, slots=True)
class Moved:
    """What became of a group of marks: who is a member at all, whose cursor was ``moved``, when (ms), who of these people are
    ``private`` (others shall not learn how far they have read), and which of the conversations are too ``large`` for that."""

    members: frozenset[Reader]
    moved: frozenset[Reader]
    private: frozenset[str]
    at: int
    large: frozenset[str] = frozenset()


class ReadCursors:
    """The read cursors on the memberships."""

    def __init__(self, *, timeout: float) -> None:
        self._timeout = timeout

    async def move(self, marks: Mapping[Reader, int]) -> Moved:
        """Moves cursors forward, never back, with one write for all, durably."""
        rows = Membership.get_motor_collection()
        wanted = {_id(reader): reader for reader in marks}
        now = datetime.now(UTC)
        with time_limit(self._timeout):
            found = rows.find({"_id": {"$in": list(wanted)}, "removedAt": None}, {"readUpTo": 1})
            before = {wanted[row["_id"]]: row.get("readUpTo") async for row in found}
            ahead = {reader for reader, up_to in before.items() if up_to is None or up_to < marks[reader]}
            private: set[str] = set()
            large: set[str] = set()
            if ahead:
                await rows.bulk_write(
                    [_forward(reader, marks[reader], now) for reader in ahead], ordered=False
                )
                private = await private_readers({user for _, user in ahead})
                large = await _large({conversation for conversation, _ in ahead})
        return Moved(
            frozenset(before), frozenset(ahead), frozenset(private), milliseconds(now), frozenset(large)
        )

    async def since(self, user: str, moment: int, limit: int) -> list[ReadCursor]:
        """The cursors that moved since ``moment`` (ms) and that this user is told of live, the oldest first; when there are
        more than ``limit``, the newest."""
        rows = Membership.get_motor_collection()
        after = datetime.fromtimestamp(moment / 1000, UTC)
        found: list[Mapping[str, Any]] = []
        with time_limit(self._timeout):
            cursor = rows.find({"user": user, "removedAt": None}, _FIELDS).limit(_CONVERSATIONS)
            own = {row["conversationId"]: row async for row in cursor}
            names = list(own)
            for start in range(0, len(names), _CHUNK):
                chunk = names[start : start + _CHUNK]
                large = await _large(chunk)
                small = [name for name in chunk if name not in large]
                query = {"conversationId": {"$in": small}, "removedAt": None, "readAt": {"$gte": after}}
                newest = rows.find(query, _FIELDS).sort([("readAt", -1), ("_id", -1)]).limit(limit)
                found += await newest.to_list(limit)
                found += [own[name] for name in large if _moved_since(own[name], moment)]
            hidden = await hidden_readers(user, {row["user"] for row in found} - {user})
        found = [row for row in found if row["user"] not in hidden]
        found.sort(key=lambda row: (row["readAt"], row["_id"]))
        return [cursor_of(row) for row in found[-limit:]]


async def private_readers(users: Iterable[str]) -> set[str]:
    """Who of these people does not let others see how far they have read, with one query."""
    wanted = list(users)
    if not wanted:
        return set()
    cursor = User.get_motor_collection().find({"_id": {"$in": wanted}, "readReceipts": False}, {"_id": 1})
    return {row["_id"] async for row in cursor}


async def hidden_readers(viewer: str, users: Iterable[str]) -> set[str]:
    """Whose read cursors of these people's ``viewer`` is not told: who does not let others see them, whom they have blocked,
    and who has blocked them. Two queries."""
    wanted = set(users)
    if not wanted:
        return set()
    pairs = await blocks_among([viewer, *wanted])
    apart = {other for pair in pairs if viewer in pair for other in pair if other != viewer}
    return apart | await private_readers(wanted)


def cursor_of(row: Mapping[str, Any]) -> ReadCursor:
    """The read cursor of a stored membership that has one."""
    return ReadCursor(row["conversationId"], row["user"], row["readUpTo"], milliseconds(row["readAt"]))


async def _large(conversations: Collection[str]) -> set[str]:
    """Those in which nobody is told how far others have read."""
    cursor = Conversation.get_motor_collection().find(
        {"_id": {"$in": list(conversations)}, "memberCount": {"$gt": MAX_LIVE_MEMBERS}}, {"_id": 1}
    )
    return {row["_id"] async for row in cursor}


def _moved_since(row: Mapping[str, Any], moment: int) -> bool:
    return row.get("readAt") is not None and milliseconds(row["readAt"]) >= moment


def _forward(reader: Reader, up_to: int, now: datetime) -> UpdateOne:
    return UpdateOne(
        {
            "_id": _id(reader),
            "removedAt": None,
            "$or": [{"readUpTo": None}, {"readUpTo": {"$lt": up_to}}],
        },
        {"$set": {"readUpTo": up_to, "readAt": now}},
    )


def _id(reader: Reader) -> str:
    return f"{reader[0]} {reader[1]}"
