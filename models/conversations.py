"""``conversations`` and ``memberships``: who talks with whom."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar, Literal

from beanie import Document
from pydantic import Field
from pymongo import ASCENDING, DESCENDING, IndexModel


class Conversation(Document):
    """A direct or group conversation. ``unique`` is the key under which a second creation finds the first.

    ``forming`` holds the members until their memberships are written: a creation that died in between is finished by
    whoever meets it next.
    """

    id: str  # type: ignore[assignment]
    type: Literal["direct", "group"]
    name: str | None = Field(default=None)
    createdBy: str
    createdAt: datetime
    unique: str | None = Field(default=None)
    forming: list[str] | None = Field(default=None)

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
            IndexModel(
                [("forming", ASCENDING)],
                name="forming",
                partialFilterExpression={"forming": {"$exists": True}},
            ),
        ]


class Membership(Document):
    """One person in one conversation. ``id`` is ``"<conversation> <user>"``."""

    id: str  # type: ignore[assignment]
    conversationId: str
    user: str
    role: Literal["admin", "member"]
    joinedAt: datetime
    updatedAt: datetime

    class Settings:
        name = "memberships"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("conversationId", ASCENDING), ("user", ASCENDING)], name="conversation_user"),
            IndexModel(
                [("user", ASCENDING), ("updatedAt", DESCENDING), ("_id", ASCENDING)], name="user_updatedAt"
            ),
        ]
