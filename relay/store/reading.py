"""Read cursors: how far members have read. Moved in groups, and found by when they moved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
from relay.wire.stamps import stamp_now

_CHUNK: Final = 200
_CONVERSATIONS: Final = 20_000
# For several users together.
_CONVERSATIONS_TOGETHER: Final = 10_000
_CURSORS_TOGETHER: Final = 10_000
_CHUNK_TOGETHER: Final = 1000
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
        now = stamp_now()
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
        return _oldest_first(found, hidden, limit)

    async def since_for(self, asked: Sequence[tuple[str, int]], limit: int) -> list[list[ReadCursor]] | None:
        """As ``since``, for several users and their moments, best about the same, with a number of queries that does not grow
        with the users. None when that is too much to read together."""
        rows = Membership.get_motor_collection()
        oldest = datetime.fromtimestamp(min(moment for _, moment in asked) / 1000, UTC)
        own: dict[str, dict[str, Mapping[str, Any]]] = {user: {} for user, _ in asked}
        moved: dict[str, list[Mapping[str, Any]]] = {}
        with time_limit(self._timeout):
            count = 0
            async for row in rows.find({"user": {"$in": list(own)}, "removedAt": None}, _FIELDS).limit(
                _CONVERSATIONS_TOGETHER
            ):
                own[row["user"]][row["conversationId"]] = row
                count += 1
            if count >= _CONVERSATIONS_TOGETHER:
                return None
            names = list({name for its in own.values() for name in its})
            large: set[str] = set()
            left = _CURSORS_TOGETHER
            for start in range(0, len(names), _CHUNK_TOGETHER):
                chunk = names[start : start + _CHUNK_TOGETHER]
                large |= await _large(chunk)
                small = [name for name in chunk if name not in large]
                query = {"conversationId": {"$in": small}, "removedAt": None, "readAt": {"$gte": oldest}}
                async for row in rows.find(query, _FIELDS).limit(left):
                    moved.setdefault(row["conversationId"], []).append(row)
                    left -= 1
                if left <= 0:
                    return None
            found = [_of_one(own[user], moved, large, moment) for user, moment in asked]
            hidden = await _hidden_from([user for user, _ in asked], found)
        return [_oldest_first(*one, limit) for one in zip(found, hidden, strict=True)]


def _of_one(
    own: Mapping[str, Mapping[str, Any]],
    moved: Mapping[str, Sequence[Mapping[str, Any]]],
    large: Collection[str],
    moment: int,
) -> list[Mapping[str, Any]]:
    """The rows that one user may be told of: of a large conversation only their own."""
    found = [row for name in own for row in moved.get(name, ()) if _moved_since(row, moment)]
    return found + [row for name, row in own.items() if name in large and _moved_since(row, moment)]


def _oldest_first(rows: Iterable[Mapping[str, Any]], hidden: Collection[str], limit: int) -> list[ReadCursor]:
    """Without those of hidden people; when there are more than ``limit``, the newest."""
    found = [row for row in rows if row["user"] not in hidden]
    found.sort(key=lambda row: (row["readAt"], row["_id"]))
    return [cursor_of(row) for row in found[-limit:]]


async def _hidden_from(
    viewers: Sequence[str], found: Sequence[Sequence[Mapping[str, Any]]]
) -> list[set[str]]:
    """``hidden_readers`` for each of several viewers and the rows they would be told of, with two queries."""
    others = [{row["user"] for row in rows} - {viewer} for viewer, rows in zip(viewers, found, strict=True)]
    wanted = {user for its in others for user in its}
    if not wanted:
        return [set() for _ in viewers]
    pairs = await blocks_among(wanted.union(viewers))
    private = await private_readers(wanted)
    apart: dict[str, set[str]] = {}
    for owner, blocked in pairs:
        apart.setdefault(owner, set()).add(blocked)
        apart.setdefault(blocked, set()).add(owner)
    return [its & (private | apart.get(viewer, set())) for viewer, its in zip(viewers, others, strict=True)]


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
