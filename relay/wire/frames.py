"""The operations a client may ask for, as types. PROTOCOL 2 in code: the documentation is checked against this module.

Unknown fields are refused. Every string has a pattern or a length, every number a range, so nothing after the codec needs
to ask again. Lengths of bodies are checked by the send handler, which knows the configured limit.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from relay.wire import ids
from relay.wire.clock import SEQ_LIMIT

MAX_IDS: Final = 1000
MAX_OPERATIONS: Final = 256
MAX_TTL_SECONDS: Final = 30 * 24 * 60 * 60
MAX_MEDIA: Final = 32
MAX_LIVE_MEMBERS: Final = 256
"""In larger conversations nobody is told how far others have read, or who types."""

# msgspec searches; \Z (not $, which also matches before a final newline) anchors the end.
MessageId = Annotated[str, Meta(pattern=rf"^{ids.UUID_PATTERN}\Z")]
ConversationId = Annotated[str, Meta(pattern=rf"^{ids.CONVERSATION_PATTERN}\Z")]
Kind = Annotated[str, Meta(pattern=rf"^{ids.KIND_PATTERN}\Z")]
MediaId = Annotated[str, Meta(pattern=rf"^{ids.MEDIA_PATTERN}\Z")]
UserId = Annotated[str, Meta(pattern=rf"^{ids.USER_PATTERN}\Z")]
DeviceKey = Annotated[str, Meta(pattern=rf"^{ids.USER_PATTERN}/{ids.DEVICE_PATTERN}\Z")]
Base64 = Annotated[str, Meta(pattern=r"^[A-Za-z0-9+/_-]*={0,2}\Z", min_length=1)]
Seq = Annotated[int, Meta(ge=0, lt=SEQ_LIMIT)]
Ref = Annotated[str, Meta(max_length=64)]
Body = str | dict[str, Any] | None


class Operation(Struct, tag_field="t", forbid_unknown_fields=True, rename="camel", frozen=True, kw_only=True):
    """What every operation may carry: ``ref`` comes back in its reply or error."""

    ref: Ref | None = None


class Send(Operation, tag="send", frozen=True):
    """Store a message for every other device of the conversation's members."""

    id: MessageId
    conv: ConversationId
    kind: Kind
    body: Body = None
    reply_to: MessageId | None = None
    media: Annotated[list[MediaId], Meta(max_length=MAX_MEDIA)] | None = None
    sealed: dict[DeviceKey, Base64] | None = None
    devices_rev: Annotated[str, Meta(max_length=64)] | None = None
    ttl: Annotated[int, Meta(ge=1, le=MAX_TTL_SECONDS)] | None = None
    silent: bool = False
    after: Seq | None = None
    again: bool = False


class Ack(Operation, tag="ack", frozen=True):
    """These messages are on this device's disk."""

    conv: ConversationId
    ids: list[MessageId]


class Status(Operation, tag="status", frozen=True):
    """What became of these own messages."""

    conv: ConversationId
    ids: list[MessageId]


class Read(Operation, tag="read", frozen=True):
    """The user has read this conversation up to here. A cursor never moves back."""

    conv: ConversationId
    up_to: Seq


class Typing(Operation, tag="typing", frozen=True):
    """The user types in this conversation, or has stopped. Never stored; ends by itself 10 s after the last ``on``."""

    conv: ConversationId
    on: bool


class Presence(Operation, tag="presence", frozen=True):
    """Watch whether these people are online, instead of those watched before; none: stop watching."""

    users: list[UserId]


class Ping(Operation, tag="ping", frozen=True):
    """Is anybody there; for clients that cannot send ping frames."""


class Auth(Operation, tag="auth", frozen=True):
    """Authenticate, or renew before the token expires."""

    token: Annotated[str, Meta(max_length=8192)]


AnyOperation = Send | Ack | Status | Read | Typing | Presence | Ping | Auth
FEATURES: Final = (
    "again",
    "after",
    "ttl",
    "sealed",
    "withdrawn",
    "status",
    "fates",
    "read",
    "typing",
    "presence",
)
