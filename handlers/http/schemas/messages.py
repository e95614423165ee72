"""Messages over HTTP."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from handlers.http.schemas.base import Answer, ConversationId, MessageId, Request
from relay.wire.clock import SEQ_LIMIT
from relay.wire.frames import MAX_IDS


class AckGroup(Request):
    """Messages of one conversation that are on this device's disk."""

    conv: ConversationId
    ids: list[MessageId] = Field(max_length=MAX_IDS)


class ReadMark(Request):
    """The caller has read a conversation up to this ``seq``; a mark never moves back."""

    conv: ConversationId
    up_to: Annotated[int, Field(ge=0, lt=SEQ_LIMIT, alias="upTo")]


class Acknowledge(Request):
    """Acknowledgements of several conversations, and how far they were read."""

    acks: list[AckGroup] = Field(max_length=256)
    reads: list[ReadMark] | None = Field(default=None, max_length=256)


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
