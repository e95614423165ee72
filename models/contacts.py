"""``contacts`` and ``reports``: whom a person knows, blocks, or complains about."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

from beanie import Document
from pydantic import Field
from pymongo import ASCENDING, IndexModel

REMOVED_SECONDS = 30 * 86_400


class Contact(Document):
    """What ``owner`` keeps of ``user``. ``id`` is ``"<owner> <user>"``.

    ``listed``: it is in the owner's contact list (somebody may be blocked without being a contact). ``sortKey`` is what the
    list is sorted by. ``blockedAt``: since when they are blocked. ``removedAt``: neither listed nor blocked any more; kept a
    while for devices that were away.
    """

    id: str  # type: ignore[assignment]
    owner: str
    user: str
    name: str | None = Field(default=None)
    sortKey: str = Field(default="")
    listed: bool = Field(default=False)
    blocked: bool = Field(default=False)
    blockedAt: datetime | None = Field(default=None)
    createdAt: datetime
    updatedAt: datetime
    removedAt: datetime | None = Field(default=None)

    class Settings:
        name = "contacts"
        keep_nulls = False
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel(
                [("owner", ASCENDING), ("listed", ASCENDING), ("sortKey", ASCENDING), ("_id", ASCENDING)],
                name="owner_sortKey",
            ),
            IndexModel(
                [("owner", ASCENDING), ("updatedAt", ASCENDING), ("_id", ASCENDING)], name="owner_updatedAt"
            ),
            IndexModel([("user", ASCENDING)], name="user"),
            IndexModel(
                [("owner", ASCENDING), ("user", ASCENDING)],
                name="owner_blocked",
                partialFilterExpression={"blocked": True},
            ),
            IndexModel(
                [("removedAt", ASCENDING)],
                name="removedAt_ttl",
                expireAfterSeconds=REMOVED_SECONDS + 86_400,
                # Only what is on its way out: MongoDB would choose an index of everything for "is absent".
                partialFilterExpression={"removedAt": {"$exists": True}},
            ),
        ]


class Report(Document):
    """A complaint of ``reporter`` about ``user``, for the operators. ``openKey``, a hash of what it says, is there as long as
    it is open: the very same one is not kept twice."""

    id: str  # type: ignore[assignment]
    reporter: str
    user: str
    reason: str
    text: str | None = Field(default=None)
    conversation: str | None = Field(default=None)
    messages: list[str] | None = Field(default=None)
    createdAt: datetime
    closedAt: datetime | None = Field(default=None)
    openKey: str | None = Field(default=None)

    class Settings:
        name = "reports"
        keep_nulls = False
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel(
                [("closedAt", ASCENDING), ("createdAt", ASCENDING), ("_id", ASCENDING)],
                name="closedAt_createdAt",
            ),
            IndexModel([("user", ASCENDING)], name="user"),
            IndexModel([("reporter", ASCENDING)], name="reporter"),
            IndexModel(
                [("openKey", ASCENDING)],
                name="openKey",
                unique=True,
                partialFilterExpression={"openKey": {"$exists": True}},
            ),
        ]
