"""``users`` and ``devices``: who exists. The ids are the tokens' claims; a device's id is its device key."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

from beanie import Document
from pydantic import BaseModel, Field
from pymongo import ASCENDING, IndexModel


class User(Document):
    """A person. ``id`` is the user id."""

    id: str  # type: ignore[assignment]
    createdAt: datetime

    class Settings:
        name = "users"


class Gap(BaseModel):
    """Since when a device may have missed messages, and why (``full``, ``inactive`` or ``reset``)."""

    since: datetime
    why: str


class Device(Document):
    """One installation of the app. ``id`` is ``user/device``; ``lastSeen`` is absent until its first connection."""

    id: str  # type: ignore[assignment]
    user: str
    createdAt: datetime
    lastSeen: datetime | None = Field(default=None)
    gap: Gap | None = Field(default=None)

    class Settings:
        name = "devices"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("user", ASCENDING), ("lastSeen", ASCENDING)], name="user_lastSeen")
        ]
