"""``users`` and ``devices``: who exists. The ids are the tokens' claims; a device's id is its device key."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar, Literal

from beanie import Document
from pydantic import BaseModel, Field
from pymongo import ASCENDING, IndexModel

# A removed device is remembered for longer than any token of a foreign issuer should live: an old one must not bring it back.
REMOVED_SECONDS = 400 * 86_400
Circle = Literal["anyone", "contacts"]


class Full(BaseModel):
    """Since when placeholders of a user take no more messages: ``user/*`` (``any``) and ``user/!`` (``blocked``)."""

    any: datetime | None = Field(default=None)
    blocked: datetime | None = Field(default=None)


class Gap(BaseModel):
    """Since when a device may have missed messages, and why (``full``, ``inactive`` or ``reset``). ``latest``: when the last
    message was left out of its full mailbox, as far as that is known."""

    since: datetime
    why: str
    latest: datetime | None = Field(default=None)


class Search(BaseModel):
    """One of the last searches of a user."""

    q: str
    at: datetime


class User(Document):
    """A person. ``id`` is the user id; a user that a token brought has no ``username`` and no ``password``.

    ``usernameKey``, ``nameKey`` and ``phoneKey`` are what others find the user by, folded for comparison; each is absent
    when the user does not want to be found by it, is suspended or is being erased. ``deliveredReceipts`` and ``readReceipts``
    are False when others shall not be told what the user has received and read; ``receiptsAt`` is when the former last changed:
    nodes follow it. ``gap`` is for the device that comes
    next: messages were left out of the full ``user/*``.
    """

    id: str  # type: ignore[assignment]
    createdAt: datetime
    updatedAt: datetime | None = Field(default=None)
    username: str | None = Field(default=None)
    password: str | None = Field(default=None)
    name: str | None = Field(default=None)
    phone: str | None = Field(default=None)
    picture: str | None = Field(default=None)
    about: str | None = Field(default=None)
    findableByName: bool | None = Field(default=None)
    findableByPhone: bool | None = Field(default=None)
    usernameKey: str | None = Field(default=None)
    nameKey: str | None = Field(default=None)
    phoneKey: str | None = Field(default=None)
    whoMayMessage: Circle | None = Field(default=None)
    whoMayAdd: Circle | None = Field(default=None)
    deliveredReceipts: bool | None = Field(default=None)
    receiptsAt: datetime | None = Field(default=None)
    readReceipts: bool | None = Field(default=None)
    suspendedAt: datetime | None = Field(default=None)
    erasingAt: datetime | None = Field(default=None)
    searches: list[Search] | None = Field(default=None)
    full: Full | None = Field(default=None)
    gap: Gap | None = Field(default=None)

    class Settings:
        name = "users"
        keep_nulls = False
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel(
                [("username", ASCENDING)],
                name="username",
                unique=True,
                partialFilterExpression={"username": {"$type": "string"}},
            ),
            IndexModel(
                [("usernameKey", ASCENDING), ("_id", ASCENDING)],
                name="usernameKey",
                partialFilterExpression={"usernameKey": {"$exists": True}},
            ),
            IndexModel(
                [("nameKey", ASCENDING), ("_id", ASCENDING)],
                name="nameKey",
                partialFilterExpression={"nameKey": {"$exists": True}},
            ),
            IndexModel(
                [("phoneKey", ASCENDING), ("_id", ASCENDING)],
                name="phoneKey",
                partialFilterExpression={"phoneKey": {"$exists": True}},
            ),
            IndexModel(
                [("suspendedAt", ASCENDING)],
                name="suspendedAt",
                partialFilterExpression={"suspendedAt": {"$exists": True}},
            ),
            IndexModel(
                [("erasingAt", ASCENDING)],
                name="erasingAt",
                partialFilterExpression={"erasingAt": {"$exists": True}},
            ),
            IndexModel(
                [("receiptsAt", ASCENDING)],
                name="receiptsAt",
                partialFilterExpression={"receiptsAt": {"$exists": True}},
            ),
        ]


class Push(BaseModel):
    """Where a device is told that something waits."""

    provider: str
    token: str


class Session(BaseModel):
    """The refresh-token family of a device. ``id``, ``current`` and ``previous`` are hashes; ``successor`` is the current
    token encrypted under the previous one, so that a lost answer can be repeated. ``repeatedAt``: when such a repetition was
    last noted in the audit trail."""

    id: str
    current: str
    previous: str | None = Field(default=None)
    successor: str | None = Field(default=None)
    createdAt: datetime
    rotatedAt: datetime
    repeatedAt: datetime | None = Field(default=None)


class Device(Document):
    """One installation of the app. ``id`` is ``user/device``; ``lastSeen`` is absent until its first connection.

    ``liveAt`` is when it was last heard on a WebSocket, as far as was noted: what happened before was told to it live.
    ``since`` is when this incarnation began to receive (absent: ``createdAt``), ``backAt`` when it was last back from
    inactivity. ``endedAt``: tokens issued up to then are
    refused, and so are tokens of another session. ``removedAt``: it is no recipient any more.
    ``relinkedAt``: its keys are another installation's since then. ``fullSince``: its mailbox is full, it is left out of
    new messages.
    """

    id: str  # type: ignore[assignment]
    user: str
    createdAt: datetime
    updatedAt: datetime | None = Field(default=None)
    since: datetime | None = Field(default=None)
    lastSeen: datetime | None = Field(default=None)
    liveAt: datetime | None = Field(default=None)
    backAt: datetime | None = Field(default=None)
    gap: Gap | None = Field(default=None)
    fullSince: datetime | None = Field(default=None)
    name: str | None = Field(default=None)
    platform: str | None = Field(default=None)
    push: Push | None = Field(default=None)
    session: Session | None = Field(default=None)
    endedAt: datetime | None = Field(default=None)
    removedAt: datetime | None = Field(default=None)
    registrationId: int | None = Field(default=None)
    relinkedAt: datetime | None = Field(default=None)

    class Settings:
        name = "devices"
        keep_nulls = False
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("user", ASCENDING), ("lastSeen", ASCENDING)], name="user_lastSeen"),
            IndexModel(
                [("session.id", ASCENDING)],
                name="session",
                unique=True,
                partialFilterExpression={"session.id": {"$type": "string"}},
            ),
            IndexModel(
                [("endedAt", ASCENDING)],
                name="endedAt",
                partialFilterExpression={"endedAt": {"$exists": True}},
            ),
            IndexModel(
                [("fullSince", ASCENDING), ("_id", ASCENDING)],
                name="fullSince",
                partialFilterExpression={"fullSince": {"$exists": True}},
            ),
            IndexModel(
                [("removedAt", ASCENDING)],
                name="removedAt_ttl",
                expireAfterSeconds=REMOVED_SECONDS,
                # Only what is on its way out: MongoDB would choose an index of everything for "is absent".
                partialFilterExpression={"removedAt": {"$exists": True}},
            ),
        ]
