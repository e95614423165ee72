"""Groups of any size for the bench, written as documents: ten thousand requests would take minutes."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from pymongo import MongoClient, WriteConcern

from relay.wire.ids import device_key
from scripts.tools.bench.crowd_messages import Group

DEVICE: Final = "bench"
_BATCH: Final = 2000
_SELECT_MS: Final = 5000

Row = dict[str, Any]


def user_name(number: int) -> str:
    """The user id of a member of the crowd."""
    return f"crowd-{number}"


def make(uri: str, database: str, sizes: Sequence[int]) -> list[Group]:
    """Writes a group of each size, with its own people, who have one device each. The collections and their indexes must
    exist; the relay must not have been asked about these people. Raises PyMongoError."""
    now = datetime.now(UTC).replace(microsecond=0)
    groups: list[Group] = []
    first = 0
    for size in sizes:
        groups.append(Group(str(uuid.uuid4()), first, size))
        first += size
    with MongoClient[Row](uri, serverSelectionTimeoutMS=_SELECT_MS) as client:
        db = client.get_database(database, write_concern=WriteConcern(w=1))
        for start in range(0, first, _BATCH):
            users = [user_name(number) for number in range(start, min(first, start + _BATCH))]
            db["users"].insert_many([{"_id": user, "createdAt": now} for user in users], ordered=False)
            db["devices"].insert_many([_device(user, now) for user in users], ordered=False)
        for group in groups:
            users = [user_name(number) for number in range(group.first, group.first + group.count)]
            db["conversations"].insert_one(
                {
                    "_id": group.conversation,
                    "type": "group",
                    "createdBy": users[0],
                    "createdAt": now,
                    "rev": 1,
                    "memberCount": group.count,
                    "name": f"crowd of {group.count}",
                }
            )
            for start in range(0, group.count, _BATCH):
                rows = [_membership(group, user, now) for user in users[start : start + _BATCH]]
                db["memberships"].insert_many(rows, ordered=False)
    return groups


def _device(user: str, now: datetime) -> Row:
    return {
        "_id": device_key(user, DEVICE),
        "user": user,
        "createdAt": now,
        "updatedAt": now,
        "lastSeen": now,
        "name": DEVICE,
        "platform": "bench",
    }


def _membership(group: Group, user: str, now: datetime) -> Row:
    return {
        "_id": f"{group.conversation} {user}",
        "conversationId": group.conversation,
        "user": user,
        "role": "admin" if user == user_name(group.first) else "member",
        "joinedAt": now,
        "updatedAt": now,
        "rev": 1,
    }
