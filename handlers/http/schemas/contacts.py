"""Contacts, blocks and reports."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from handlers.http.schemas.base import Answer, ConversationId, MessageId, Request, UserId
from handlers.http.schemas.names import Name
from handlers.http.schemas.people import LongText, ProfileAnswer

_BOB: Final = {"id": "bob", "username": "bob", "name": "Bob", "picture": None, "about": "at work"}


class AddContact(Request):
    """Somebody to list, with an own name for them; without one a name that was given before stays."""

    user: UserId = Field(examples=["bob"])
    name: Name | None = Field(default=None, examples=["Bob next door"])


class ContactPatch(Request):
    """The own name (null clears it), and whether the person is blocked."""

    name: Name | None = Field(default=None, examples=["Bob next door"])
    blocked: bool | None = None


class ContactAnswer(Answer):
    """What one keeps of ``user``: ``name`` is one's own name for them, ``profile`` what they show of themselves (null when
    there is no such account any more). Somebody may be blocked without being ``listed``. ``createdAt`` in milliseconds."""

    user: str
    name: str | None = Field(examples=["Bob next door"])
    listed: bool = Field(examples=[True])
    blocked: bool
    profile: ProfileAnswer | None = Field(examples=[_BOB])
    created_at: int = Field(alias="createdAt")


class ContactPage(Answer):
    """A page of contacts, sorted by name, or of the blocked, by user id."""

    items: list[ContactAnswer]
    next: str | None


class OnlineAnswer(Answer):
    """A contact from whom this node has heard within the heartbeat and 5 s; ``lastSeen`` (ms) is when a device of theirs was last
    heard or noted."""

    user: str
    last_seen: int | None = Field(alias="lastSeen")


class OnlinePage(Answer):
    """A page of contacts who are online; it may be empty though ``next`` names another."""

    items: list[OnlineAnswer]
    next: str | None


class ReportRequest(Request):
    """A complaint about somebody; ``messages`` are ids in ``conversation``."""

    user: UserId = Field(examples=["bob"])
    reason: Literal["spam", "abuse", "impersonation", "other"]
    text: LongText | None = None
    conversation: ConversationId | None = None
    messages: list[MessageId] | None = Field(default=None, max_length=20)


class ReportAnswer(Answer):
    """The id of a complaint."""

    id: str
