"""``conversations`` and ``memberships``: who talks with whom."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Literal

from beanie import Document
from pydantic import Field
from pymongo import ASCENDING, DESCENDING, IndexModel

Role = Literal["admin", "moderator", "member"]
REMOVED_SECONDS = 30 * 86_400


class Conversation(Document):
    """A direct or group conversation. ``unique`` is the key under which a second creation finds the first.

    ``pending`` is the one change that is under way (relay.store.revisions): it is written here first, so that a change that
    died half-way is finished by whoever meets it next. ``rev`` counts changes; ``memberCount`` is as of the last one.
    """

    id: str  # type: ignore[assignment]
    type: Literal["direct", "group"]
    name: str | None = Field(default=None)
    picture: str | None = Field(default=None)
    description: str | None = Field(default=None)
    whoMayPost: Literal["members", "moderators"] | None = Field(default=None)
    createdBy: str
    createdAt: datetime
    unique: str | None = Field(default=None)
    rev: int = Field(default=0)
    memberCount: int | None = Field(default=None)
    pending: dict[str, Any] | None = Field(default=None)
    dissolvedAt: datetime | None = Field(default=None)

    class Settings:
        name = "conversations"
        keep_nulls = False
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel(
                [("unique", ASCENDING)],
                name="unique",
                unique=True,
                partialFilterExpression={"unique": {"$type": "string"}},
            ),
            IndexModel([("createdBy", ASCENDING)], name="createdBy"),
            IndexModel(
                [("pending.at", ASCENDING)],
                name="pending",
                partialFilterExpression={"pending.at": {"$exists": True}},
            ),
            IndexModel(
                [("pending.dueAt", ASCENDING), ("pending.at", ASCENDING), ("_id", ASCENDING)],
                name="pending_due",
                partialFilterExpression={"pending.at": {"$exists": True}},
            ),
            IndexModel(
                [("dissolvedAt", ASCENDING)],
                name="dissolvedAt_ttl",
                expireAfterSeconds=REMOVED_SECONDS + 86_400,
                # Only what is on its way out: MongoDB would choose an index of everything for "is absent".
                partialFilterExpression={"dissolvedAt": {"$exists": True}},
            ),
        ]


class Membership(Document):
    """One person in one conversation. ``id`` is ``"<conversation> <user>"``.

    ``rev`` is the conversation's change that last wrote role or membership; a late writer of an older change changes
    nothing. ``removedAt``: no member any more; kept a while for devices that were away. ``updatedAt`` moves with every
    change of the conversation or of what the member set; ``readAt`` with ``readUpTo``.
    """

    id: str  # type: ignore[assignment]
    conversationId: str
    user: str
    role: Role
    joinedAt: datetime
    updatedAt: datetime
    rev: int = Field(default=0)
    removedAt: datetime | None = Field(default=None)
    mutedUntil: datetime | None = Field(default=None)
    pinned: bool | None = Field(default=None)
    archived: bool | None = Field(default=None)
    readUpTo: int | None = Field(default=None)
    readAt: datetime | None = Field(default=None)

    class Settings:
        name = "memberships"
        keep_nulls = False
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel(
                [("conversationId", ASCENDING), ("removedAt", ASCENDING), ("user", ASCENDING)],
                name="conversation_removedAt_user",
            ),
            IndexModel(
                [
                    ("user", ASCENDING),
                    ("removedAt", ASCENDING),
                    ("updatedAt", DESCENDING),
                    ("_id", ASCENDING),
                ],
                name="user_removedAt_updatedAt",
            ),
            IndexModel(
                [("user", ASCENDING), ("updatedAt", ASCENDING), ("_id", ASCENDING)], name="user_changes"
            ),
            IndexModel(
                [("conversationId", ASCENDING), ("readAt", ASCENDING), ("_id", ASCENDING)],
                name="conversation_readAt_id",
                partialFilterExpression={"readAt": {"$exists": True}},
            ),
            IndexModel(
                [("removedAt", ASCENDING)],
                name="removedAt_ttl",
                expireAfterSeconds=REMOVED_SECONDS + 86_400,
                # Only what is on its way out: MongoDB would choose an index of everything for "is absent".
                partialFilterExpression={"removedAt": {"$exists": True}},
            ),
        ]
