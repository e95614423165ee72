"""What changed since a cursor."""

from __future__ import annotations

from pydantic import Field

from handlers.http.schemas.base import Answer
from handlers.http.schemas.conversations import ConversationAnswer


class ReadCursorAnswer(Answer):
    """How far a member has read, the caller included (on another device); ``at`` in milliseconds."""

    conv: str
    user: str
    up_to: int = Field(alias="upTo")
    at: int


class ContactChangeAnswer(Answer):
    """A contact as it is now; neither ``listed`` nor ``blocked`` means that it is gone."""

    user: str
    name: str | None = Field(examples=["Bob next door"])
    listed: bool = Field(examples=[True])
    blocked: bool


class DeviceChangeAnswer(Answer):
    """An own device as it is now; ``createdAt`` in milliseconds."""

    id: str
    name: str | None
    platform: str | None
    removed: bool
    created_at: int = Field(alias="createdAt")


class ChangesAnswer(Answer):
    """``removed`` names conversations that the caller is no member of any more. ``me``: the own profile or preferences have
    changed, fetch ``/v1/me``. ``next`` is the next ``since``; with ``more`` ask again at once. What changed in the last
    seconds may be told twice."""

    conversations: list[ConversationAnswer]
    removed: list[str]
    reads: list[ReadCursorAnswer]
    contacts: list[ContactChangeAnswer]
    devices: list[DeviceChangeAnswer]
    me: bool
    next: str
    more: bool
