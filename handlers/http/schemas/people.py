"""People: profiles, preferences, searches, push."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from handlers.http.schemas.auth import Phone
from handlers.http.schemas.base import Answer, MediaId, Request

# No control characters, no line or paragraph separators, no signs that turn the direction of what follows around.
_SIGNS: Final = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_LINE: Final = rf"^[^{_SIGNS}]*[^{_SIGNS}\s][^{_SIGNS}]*$"
_LINES: Final = rf"^(?:[^{_SIGNS}]|\n)*$"

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=_LINE), AfterValidator(str.strip)]
"""A name that a person typed: one line, not blank."""
About = Annotated[str, Field(max_length=256, pattern=_LINES)]
LongText = Annotated[str, Field(max_length=1000, pattern=_LINES)]
Circle = Literal["anyone", "contacts"]


class PreferencesPatch(Request):
    """Preferences to change; null goes back to the default (findable, ``anyone``)."""

    findable_by_name: bool | None = Field(default=None, alias="findableByName")
    findable_by_phone: bool | None = Field(default=None, alias="findableByPhone")
    who_may_message: Circle | None = Field(default=None, alias="whoMayMessage")
    who_may_add: Circle | None = Field(default=None, alias="whoMayAdd")


class ProfilePatch(Request):
    """What to change of one's own profile; null clears, what is absent stays."""

    name: Name | None = Field(default=None, examples=["Ann"])
    phone: Phone | None = Field(default=None, examples=["+49 30 5550100"])
    picture: MediaId | None = None
    about: About | None = Field(default=None, examples=["at work"])
    preferences: PreferencesPatch | None = Field(default=None, examples=[{"whoMayAdd": "contacts"}])


class Preferences(Answer):
    """Whether others find one by name and user name, and by phone; who may write, and who may add one to groups."""

    findable_by_name: bool = Field(alias="findableByName")
    findable_by_phone: bool = Field(alias="findableByPhone")
    who_may_message: Circle = Field(alias="whoMayMessage")
    who_may_add: Circle = Field(alias="whoMayAdd")


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
    lists as a contact or shares a conversation with, and has not blocked. ``online`` is a connection to this node;
    ``lastSeen`` is when a device was last noted, now and then while it stays connected."""

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

    provider: Literal["apns", "fcm", "expo", "webpush"]
    token: str = Field(
        min_length=1, max_length=512, pattern=rf"^[^{_SIGNS}]+$", examples=["ExponentPushToken[xyz]"]
    )
