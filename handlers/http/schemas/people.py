"""People: profiles, preferences, searches, push."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from handlers.http.schemas.auth import Phone
from handlers.http.schemas.base import Answer, MediaId, Request
from handlers.http.schemas.names import LINES, SIGNS, Name
from handlers.http.wording import form

About = Annotated[str, Field(max_length=256, pattern=LINES)]
LongText = Annotated[str, Field(max_length=1000, pattern=LINES)]
Circle = Literal["anyone", "contacts"]


class PreferencesPatch(Request):
    """Preferences to change; null goes back to the default (findable, ``anyone``, receipts on)."""

    findable_by_name: bool | None = Field(default=None, alias="findableByName")
    findable_by_phone: bool | None = Field(default=None, alias="findableByPhone")
    who_may_message: Circle | None = Field(default=None, alias="whoMayMessage")
    who_may_add: Circle | None = Field(default=None, alias="whoMayAdd")
    delivered_receipts: bool | None = Field(default=None, alias="deliveredReceipts")
    read_receipts: bool | None = Field(default=None, alias="readReceipts")


class ProfilePatch(Request):
    """What to change of one's own profile; null clears, what is absent stays."""

    name: Name | None = Field(default=None, examples=["Ann"])
    phone: Phone | None = Field(default=None, examples=["+49 30 5550100"])
    picture: MediaId | None = None
    about: About | None = Field(default=None, examples=["at work"])
    preferences: PreferencesPatch | None = Field(default=None, examples=[{"whoMayAdd": "contacts"}])


class Preferences(Answer):
    """Whether others find one by name and user name, and by phone; who may write, and who may add one to groups; whether others
    are told what one's devices have received, and what one has read."""

    findable_by_name: bool = Field(alias="findableByName", examples=[True])
    findable_by_phone: bool = Field(alias="findableByPhone", examples=[True])
    who_may_message: Circle = Field(alias="whoMayMessage")
    who_may_add: Circle = Field(alias="whoMayAdd")
    delivered_receipts: bool = Field(alias="deliveredReceipts")
    read_receipts: bool = Field(alias="readReceipts")


class OwnProfileAnswer(Answer):
    """One's own profile; ``createdAt`` in milliseconds. Nobody else is shown the phone number."""

    id: str
    username: str | None
    name: str | None
    phone: str | None
    picture: str | None
    about: str | None
    created_at: int = Field(alias="createdAt")
    preferences: Preferences


class ProfileAnswer(Answer):
    """What everybody may see of a person."""

    id: str
    username: str | None
    name: str | None
    picture: str | None
    about: str | None


class PersonAnswer(ProfileAnswer):
    """A person. ``online`` and ``lastSeen`` (ms) are null for whom it does not concern: it is told to people whom that person
    lists as a contact or shares a conversation with, and has not blocked. ``online``: a connection to
    this node was heard from within the heartbeat and 5 s; ``lastSeen`` is when a device was last heard or noted."""

    online: bool | None
    last_seen: int | None = Field(alias="lastSeen")


class PeoplePage(Answer):
    """A page of people; it may be shorter than asked for, or empty, though ``next`` names another."""

    items: list[ProfileAnswer]
    next: str | None


class SearchAnswer(Answer):
    """One of the last searches; ``at`` in milliseconds."""

    q: str
    at: int


class SearchPage(Answer):
    """The last 15 searches, newest first."""

    items: list[SearchAnswer]
    next: None = None


class PushRequest(Request):
    """Where this device is told that something waits."""

    provider: Literal["apns", "fcm", "expo", "webpush"] = Field(examples=["expo"])
    token: str = Field(
        min_length=1,
        max_length=512,
        pattern=form(rf"^[^{SIGNS}]+$", "text without control characters"),
        examples=["ExponentPushToken[xyz]"],
    )
