"""Conversations and who is in them.

There are no transactions (a sharded cluster's control collections need none): a creation writes the conversation with its
``forming`` members, then the memberships, then clears ``forming``. Whoever finds it half done finishes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from pymongo import UpdateOne

from models.conversations import Conversation, Membership
from relay.store.accounts import Accounts, milliseconds
from relay.store.mongo import DuplicateKeyError, time_limit
from relay.wire import ids
from relay.wire.cursor import cursor_at, place_of
from relay.wire.errors import RelayError

ConversationType = Literal["direct", "group"]
_LOAD: Final = 500
_REPAIR: Final = 100


@dataclass(frozen=True, slots=True)
class Member:
    """One person in a conversation."""

    user: str
    role: str


@dataclass(frozen=True, slots=True)
class ConversationView:
    """A conversation as its members see it. ``created_at`` in milliseconds."""

    id: str
    type: ConversationType
    name: str | None
    members: list[Member]
    created_at: int


class Conversations:
    """The ``conversations`` and ``memberships`` collections."""

    def __init__(self, accounts: Accounts, *, timeout: float = 2) -> None:
        self._accounts = accounts
        self._timeout = timeout

    async def create(
        self,
        creator: str,
        kind: ConversationType,
        members: Sequence[str],
        *,
        name: str | None,
        ref: str | None,
    ) -> tuple[ConversationView, bool]:
        """Makes a conversation, or finds the one that exists: the direct one of the same pair, or the one this user
        made with the same ``ref``. The second value says whether it is new."""
        people = list(dict.fromkeys([creator, *members]))
        if kind == "direct":
            unique: str | None = "direct " + " ".join(sorted(people))
        else:
            unique = None if ref is None else f"ref {creator} {ref}"
        document: dict[str, Any] = {
            "_id": ids.new_id(),
            "type": kind,
            "createdBy": creator,
            "createdAt": datetime.now(UTC),
            "forming": people,
        }
        if name is not None:
            document["name"] = name
        if unique is not None:
            document["unique"] = unique
        created = True
        collection = Conversation.get_motor_collection()
        try:
            await collection.insert_one(document)
        except DuplicateKeyError:
            created = False
            found = await collection.find_one({"unique": unique})
            if found is None:
                raise RelayError("unavailable", "the conversation is being changed; try again") from None
            document = found
        await self._form(document)
        return (await self._views([document]))[0], created

    async def get(self, conversation: str, user: str) -> ConversationView:
        """One conversation of this user. Raises RelayError ``not_found`` when it is absent or not theirs."""
        if (
            await Membership.get_motor_collection().find_one({"_id": f"{conversation} {user}"}, {"_id": 1})
            is None
        ):
            raise RelayError("not_found", "no such conversation")
        document = await Conversation.get_motor_collection().find_one({"_id": conversation})
        if document is None:
            raise RelayError("not_found", "no such conversation")
        return (await self._views([document]))[0]

    async def page(
        self, user: str, *, limit: int, cursor: str | None
    ) -> tuple[list[ConversationView], str | None]:
        """This user's conversations, last changed first, and the cursor of the next page. Raises RelayError
        ``bad_request`` for a cursor that is none."""
        query: dict[str, Any] = {"user": user}
        if cursor is not None:
            changed, membership = _open_cursor(cursor)
            query["$or"] = [
                {"updatedAt": {"$lt": changed}},
                {"updatedAt": changed, "_id": {"$gt": membership}},
            ]
        found = (
            await Membership.get_motor_collection()
            .find(query)
            .sort([("updatedAt", -1), ("_id", 1)])
            .limit(limit + 1)
            .to_list(limit + 1)
        )
        more = len(found) > limit
        found = found[:limit]
        wanted = [row["conversationId"] for row in found]
        documents = {
            document["_id"]: document
            async for document in Conversation.get_motor_collection().find({"_id": {"$in": wanted}})
        }
        views = await self._views([documents[name] for name in wanted if name in documents])
        return views, cursor_at(milliseconds(found[-1]["updatedAt"]), found[-1]["_id"]) if more else None

    async def audiences(self, conversations: list[str]) -> Mapping[str, Mapping[str, list[str]]]:
        """Members and their active device keys, by conversation; two queries for each five hundred."""
        with time_limit(self._timeout):
            return await self._audiences(conversations)

    async def _audiences(self, conversations: list[str]) -> Mapping[str, Mapping[str, list[str]]]:
        found: dict[str, dict[str, list[str]]] = {}
        for start in range(0, len(conversations), _LOAD):
            cursor = Membership.get_motor_collection().find(
                {"conversationId": {"$in": conversations[start : start + _LOAD]}},
                {"conversationId": 1, "user": 1},
            )
            rows = [(row["conversationId"], row["user"]) async for row in cursor]
            devices = await self._accounts.active_devices(list({user for _, user in rows}))
            for conversation, user in rows:
                found.setdefault(conversation, {})[user] = list(devices.get(user, ()))
        return found

    async def repair(self) -> int:
        """Finishes creations that died half-way; returns how many."""
        cursor = Conversation.get_motor_collection().find({"forming": {"$exists": True}}).limit(_REPAIR)
        documents = await cursor.to_list(_REPAIR)
        for document in documents:
            await self._form(document)
        return len(documents)

    async def _form(self, document: dict[str, Any]) -> None:
        people = document.get("forming")
        if people is None:
            return
        name, moment = document["_id"], document["createdAt"]
        rows = [
            UpdateOne(
                {"_id": f"{name} {user}"},
                {
                    "$setOnInsert": {
                        "conversationId": name,
                        "user": user,
                        "role": "admin"
                        if document["type"] == "group" and user == document["createdBy"]
                        else "member",
                        "joinedAt": moment,
                        "updatedAt": moment,
                    }
                },
                upsert=True,
            )
            for user in people
        ]
        await Membership.get_motor_collection().bulk_write(rows, ordered=False)
        await Conversation.get_motor_collection().update_one({"_id": name}, {"$unset": {"forming": ""}})

    async def _views(self, documents: Sequence[Mapping[str, Any]]) -> list[ConversationView]:
        wanted = [document["_id"] for document in documents]
        members: dict[str, list[Member]] = {}
        cursor = (
            Membership.get_motor_collection().find({"conversationId": {"$in": wanted}}).sort([("user", 1)])
        )
        async for row in cursor:
            members.setdefault(row["conversationId"], []).append(Member(row["user"], row["role"]))
        return [
            ConversationView(
                id=document["_id"],
                type=document["type"],
                name=document.get("name"),
                members=members.get(document["_id"], []),
                created_at=milliseconds(document["createdAt"]),
            )
            for document in documents
        ]


def _open_cursor(cursor: str) -> tuple[datetime, str]:
    changed, membership = place_of(cursor)
    try:
        return datetime.fromtimestamp(changed / 1000, UTC), membership
    except (ValueError, OverflowError, OSError):
        raise RelayError("bad_request", "cursor is not one of ours") from None
