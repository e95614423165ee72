"""Conversations and who is in them, as their members see them. Changes of members and settings are revisions.py's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from models.conversations import Conversation, Membership
from relay.store.accounts import milliseconds
from relay.store.people import names_of
from relay.store.revisions import ConversationType
from relay.wire.cursor import cursor_at, place_of
from relay.wire.errors import RelayError
from relay.wire.stamps import stamp_now

_SHOWN_IN_LISTS: Final = 16
_SHOWN: Final = 100
_SCANNED: Final = 200
_COUNTED_AT_ONCE: Final = 16
_MOST_SCANNED: Final = 1000


@dataclass(frozen=True, slots=True)
class Member:
    """One person in a conversation. ``joined_at`` in milliseconds."""

    user: str
    role: str
    name: str | None
    joined_at: int


@dataclass(frozen=True, slots=True)
class Own:
    """What a conversation is to one member. Times in milliseconds."""

    role: str
    muted_until: int | None
    pinned: bool
    archived: bool
    read_up_to: int | None
    joined_at: int


@dataclass(frozen=True, slots=True)
class ConversationView:
    """A conversation as one of its members sees it. Times in milliseconds. ``members`` holds the first hundred, in lists all
    of small conversations and only the member themselves of others; ``member_count`` counts all."""

    id: str
    type: ConversationType
    name: str | None
    picture: str | None
    description: str | None
    who_may_post: str
    members: list[Member]
    member_count: int
    created_at: int
    updated_at: int
    me: Own


class Conversations:
    """The ``conversations`` and ``memberships`` collections."""

    async def get(self, conversation: str, user: str) -> ConversationView:
        """One conversation of this user. Raises RelayError ``not_found`` when it is absent or not theirs."""
        row = await self._row(conversation, user)
        document = await Conversation.get_motor_collection().find_one(
            {"_id": conversation, "dissolvedAt": None}
        )
        if document is None:
            raise _not_found()
        people = await self._members({"conversationId": conversation, "removedAt": None}, _SHOWN)
        return (await self._views([(document, row, people)]))[0]

    async def check_member(self, conversation: str, user: str) -> None:
        """Raises RelayError ``not_found`` when the conversation is absent or not this user's."""
        await self._row(conversation, user)

    async def page(
        self, user: str, *, limit: int, cursor: str | None, q: str | None = None
    ) -> tuple[list[ConversationView], str | None]:
        """This user's conversations, last changed first, and the cursor of the next page; with ``q`` only those whose name
        or a member's name has a word that begins so (a page may then hold fewer than asked for, and still have a next).
        Raises RelayError ``bad_request`` for a cursor that is none."""
        if q is None:
            rows = await self._rows(user, cursor, limit + 1)
            more = len(rows) > limit
            rows = rows[:limit]
            return await self.listed(rows), _cursor(rows[-1]) if more else None
        wanted = q.casefold().split()
        found: list[ConversationView] = []
        for _ in range(_MOST_SCANNED // _SCANNED):
            rows = await self._rows(user, cursor, _SCANNED)
            for row, view in zip(rows, await self.listed(rows, everything=False), strict=True):
                cursor = _cursor(row)
                if _matches(view, user, wanted):
                    found.append(view)
                    if len(found) == limit:
                        return found, cursor
            if len(rows) < _SCANNED:
                return found, None
        return found, cursor

    async def members(
        self, conversation: str, user: str, *, limit: int, cursor: str | None
    ) -> tuple[list[Member], str | None]:
        """The members, by user id, and the cursor of the next page. Raises RelayError ``not_found``, ``bad_request``."""
        await self._row(conversation, user)
        query: dict[str, Any] = {"conversationId": conversation, "removedAt": None}
        if cursor is not None:
            query["user"] = {"$gt": place_of(cursor)[1]}
        rows = await self._members(query, limit + 1)
        names = await names_of([row["user"] for row in rows[:limit]])
        page = [_member(row, names) for row in rows[:limit]]
        return page, cursor_at(0, page[-1].user) if len(rows) > limit else None

    async def member(self, conversation: str, user: str) -> Member:
        """One member. Raises RelayError ``not_found``."""
        row = await self._row(conversation, user)
        return _member(row, await names_of([user]))

    async def members_among(self, conversation: str, users: Sequence[str]) -> set[str]:
        """Who of these users is in a conversation."""
        names = [f"{conversation} {user}" for user in users]
        cursor = Membership.get_motor_collection().find(
            {"_id": {"$in": names}, "removedAt": None}, {"user": 1}
        )
        return {row["user"] async for row in cursor}

    async def set_own(self, conversation: str, user: str, fields: Mapping[str, Any]) -> None:
        """Sets what this member keeps for themselves (``mutedUntil`` a datetime, ``pinned``, ``archived``; None unsets).
        Raises RelayError ``not_found``."""
        change: dict[str, Any] = {
            "$set": {
                "updatedAt": stamp_now(),
                **{name: value for name, value in fields.items() if value is not None},
            }
        }
        gone = {name: "" for name, value in fields.items() if value is None}
        if gone:
            change["$unset"] = gone
        result = await Membership.get_motor_collection().update_one(
            {"_id": f"{conversation} {user}", "removedAt": None}, change
        )
        if not result.matched_count:
            raise _not_found()

    async def of_user(self, user: str, limit: int) -> list[tuple[str, str]]:
        """Ids and types of up to so many conversations that this user is in."""
        cursor = Membership.get_motor_collection().find(
            {"user": user, "removedAt": None}, {"conversationId": 1}
        )
        names = [row["conversationId"] for row in await cursor.limit(limit).to_list(limit)]
        documents: dict[str, Mapping[str, Any]] = {}
        for start in range(0, len(names), _SCANNED):
            documents.update(await self._documents(names[start : start + _SCANNED]))
        return [(name, documents[name]["type"]) for name in names if name in documents]

    async def crowded(self, users: Sequence[str], most: int) -> list[str]:
        """Those of these users who are in ``most`` conversations or more."""
        rows = Membership.get_motor_collection()
        found: list[str] = []
        for start in range(0, len(users), _COUNTED_AT_ONCE):
            some = users[start : start + _COUNTED_AT_ONCE]
            counts = await asyncio.gather(
                *(rows.count_documents({"user": user, "removedAt": None}, limit=most) for user in some)
            )
            found += [user for user, count in zip(some, counts, strict=True) if count >= most]
        return found

    async def successor(self, conversation: str, user: str) -> str | None:
        """Who shall be admin when this one goes: the member for longest among moderators, else among members."""
        rows = Membership.get_motor_collection()
        for role in ("moderator", "member"):
            query = {"conversationId": conversation, "removedAt": None, "role": role, "user": {"$ne": user}}
            found = (
                await rows.find(query, {"user": 1}).sort([("joinedAt", 1), ("_id", 1)]).limit(1).to_list(1)
            )
            if found:
                return str(found[0]["user"])
        return None

    async def forget_creator(self, user: str, pseudonym: str) -> None:
        """Replaces a person's id in the conversations they made, and drops the keys under which a creation of theirs would
        be found again."""
        collection = Conversation.get_motor_collection()
        await collection.update_many(
            {"createdBy": user}, {"$set": {"createdBy": pseudonym}, "$unset": {"unique": ""}}
        )
        rows = Membership.get_motor_collection()
        names = [row["conversationId"] async for row in rows.find({"user": user}, {"conversationId": 1})]
        for start in range(0, len(names), _SCANNED):
            await collection.update_many(
                {"_id": {"$in": names[start : start + _SCANNED]}, "type": "direct"},
                {"$unset": {"unique": ""}},
            )

    async def _row(self, conversation: str, user: str) -> Mapping[str, Any]:
        row: Mapping[str, Any] | None = await Membership.get_motor_collection().find_one(
            {"_id": f"{conversation} {user}", "removedAt": None}
        )
        if row is None:
            raise _not_found()
        return row

    async def _rows(self, user: str, cursor: str | None, limit: int) -> list[Mapping[str, Any]]:
        query: dict[str, Any] = {"user": user, "removedAt": None}
        if cursor is not None:
            changed, membership = _open_cursor(cursor)
            query["updatedAt"] = {"$lte": changed}
            query["$or"] = [{"updatedAt": {"$lt": changed}}, {"_id": {"$gt": membership}}]
        found: list[Mapping[str, Any]] = (
            await Membership.get_motor_collection()
            .find(query)
            .sort([("updatedAt", -1), ("_id", 1)])
            .limit(limit)
            .to_list(limit)
        )
        return found

    async def _members(self, query: Mapping[str, Any], limit: int) -> list[Mapping[str, Any]]:
        cursor = Membership.get_motor_collection().find(query).sort([("user", 1)]).limit(limit)
        found: list[Mapping[str, Any]] = await cursor.to_list(limit)
        return found

    async def _documents(self, conversations: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        query = {"_id": {"$in": list(conversations)}, "dissolvedAt": None}
        return {row["_id"]: row async for row in Conversation.get_motor_collection().find(query)}

    async def listed(
        self, rows: Sequence[Mapping[str, Any]], *, everything: bool = True
    ) -> list[ConversationView]:
        """The conversations of these membership documents, in their order; dissolved ones are left out, or with
        ``everything`` False stand without content."""
        documents = await self._documents([row["conversationId"] for row in rows])
        small = [
            name
            for name, document in documents.items()
            if document.get("memberCount", _SHOWN_IN_LISTS) <= _SHOWN_IN_LISTS
        ]
        people: dict[str, list[Mapping[str, Any]]] = {}
        cursor = Membership.get_motor_collection().find({"conversationId": {"$in": small}, "removedAt": None})
        async for row in cursor:
            people.setdefault(row["conversationId"], []).append(row)
        parts = []
        for row in rows:
            document = documents.get(row["conversationId"])
            if document is None:
                if everything:
                    continue
                document = {"_id": row["conversationId"], "type": "group", "createdAt": row["joinedAt"]}
            members = sorted(people.get(row["conversationId"], [row]), key=lambda one: str(one["user"]))
            parts.append((document, row, members))
        return await self._views(parts)

    async def _views(
        self, parts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Sequence[Mapping[str, Any]]]]
    ) -> list[ConversationView]:
        names = await names_of([row["user"] for _, _, members in parts for row in members])
        return [
            ConversationView(
                id=document["_id"],
                type=document["type"],
                name=document.get("name"),
                picture=document.get("picture"),
                description=document.get("description"),
                who_may_post=document.get("whoMayPost") or "members",
                members=[_member(row, names) for row in members],
                member_count=document.get("memberCount") or len(members),
                created_at=milliseconds(document["createdAt"]),
                updated_at=milliseconds(own["updatedAt"]),
                me=own_of(own),
            )
            for document, own, members in parts
        ]


def own_of(row: Mapping[str, Any]) -> Own:
    """What a stored membership says for its member."""
    muted = row.get("mutedUntil")
    return Own(
        role=row["role"],
        muted_until=None if muted is None else milliseconds(muted),
        pinned=bool(row.get("pinned")),
        archived=bool(row.get("archived")),
        read_up_to=row.get("readUpTo"),
        joined_at=milliseconds(row["joinedAt"]),
    )


def _member(row: Mapping[str, Any], names: Mapping[str, str | None]) -> Member:
    return Member(row["user"], row["role"], names.get(row["user"]), milliseconds(row["joinedAt"]))


def _matches(view: ConversationView, user: str, wanted: Sequence[str]) -> bool:
    texts = [view.name, *(member.name or member.user for member in view.members if member.user != user)]
    words = [word for text in texts if text for word in text.casefold().split()]
    return all(any(word.startswith(part) for word in words) for part in wanted)


def _cursor(row: Mapping[str, Any]) -> str:
    return cursor_at(milliseconds(row["updatedAt"]), row["_id"])


def _open_cursor(cursor: str) -> tuple[datetime, str]:
    changed, membership = place_of(cursor)
    try:
        return datetime.fromtimestamp(changed / 1000, UTC), membership
    except (ValueError, OverflowError, OSError):
        raise RelayError("bad_request", "cursor is not one of ours") from None


def _not_found() -> RelayError:
    return RelayError("not_found", "no such conversation")
