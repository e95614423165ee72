"""Requests and answers of the HTTP side, as pydantic models. ``/openapi.json`` is made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from relay.wire.frames import MAX_IDS
from relay.wire.ids import CONVERSATION_PATTERN, USER_PATTERN, UUID_PATTERN

UserId = Annotated[str, Field(pattern=f"^{USER_PATTERN}$")]
ConversationId = Annotated[str, Field(pattern=f"^{CONVERSATION_PATTERN}$")]
MessageId = Annotated[str, Field(pattern=f"^{UUID_PATTERN}$")]
MAX_MEMBERS = 1000


class Request(BaseModel):
    """A request: unknown fields are refused, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Answer(BaseModel):
    """An answer; it may grow fields."""

    model_config = ConfigDict(populate_by_name=True)


class CreateConversation(Request):
    """``members`` are the others; the creator is added. A repeated ``ref`` finds the first creation."""

    type: Literal["direct", "group"]
    members: list[UserId] = Field(max_length=MAX_MEMBERS)
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    ref: MessageId | None = None


class AckGroup(Request):
    """Messages of one conversation that are on this device's disk."""

    conv: ConversationId
    ids: list[MessageId] = Field(max_length=MAX_IDS)


class Acknowledge(Request):
    """Acknowledgements of several conversations."""

    acks: list[AckGroup] = Field(max_length=256)


class MemberAnswer(Answer):
    """One person in a conversation."""

    user: str
    role: Literal["admin", "moderator", "member"]


class ConversationAnswer(Answer):
    """A conversation as its members see it; ``createdAt`` in milliseconds."""

    id: str
    type: Literal["direct", "group"]
    name: str | None
    members: list[MemberAnswer]
    created_at: int = Field(alias="createdAt")


class ConversationPage(Answer):
    """A page of conversations, last changed first."""

    items: list[ConversationAnswer]
    next: str | None


class StoredAnswer(Answer):
    """The message is durable; ``at`` in milliseconds."""

    conv: str
    id: str
    seq: int
    at: int


class Sender(Answer):
    """Who sent a message."""

    user: str
    device: str


class Message(Answer):
    """A message to store on the device; sort a conversation by (``seq``, ``id``)."""

    t: Literal["msg"]
    id: str
    conv: str
    seq: int
    at: int
    sender: Sender = Field(alias="from")
    kind: str
    body: str | dict[str, Any] | None
    reply_to: str | None = Field(default=None, alias="replyTo")
    media: list[str] | None = None
    sealed: str | None = None


class MessagePage(Answer):
    """What waits for this device in one conversation."""

    items: list[Message]
    next: str | None


class SyncPage(Answer):
    """What waits for this device."""

    messages: list[Message]
    next: str | None


class DevicesAnswer(Answer):
    """The devices a message of this conversation goes to; ``devicesRev`` names this very set."""

    devices_rev: str = Field(alias="devicesRev")
    devices: list[str]


class LimitsAnswer(Answer):
    """Limits, in bytes and operations."""

    frame: int
    body: int
    ops: int


class InfoAnswer(Answer):
    """Versions, features and limits."""

    name: Literal["relay"]
    version: str
    protocol: int
    features: list[str]
    limits: LimitsAnswer
    window: int
    window_bytes: int = Field(alias="windowBytes")
    heartbeat: int
    ttl: int


class HealthAnswer(Answer):
    """``problems`` names what is wrong, by part."""

    status: Literal["ok", "ready", "draining", "unavailable"]
    problems: dict[str, str]


class DoneAnswer(Answer):
    """The request is durable."""

    done: Literal[True] = True


class ErrorBody(Answer):
    """What went wrong: ``message`` is for people, ``code`` for programs."""

    code: str
    message: str
    details: dict[str, Any] | None = None


class ErrorAnswer(Answer):
    """Every error looks like this."""

    error: ErrorBody
