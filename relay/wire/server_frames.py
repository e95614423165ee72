"""What the relay sends, as types: the other half of PROTOCOL 2, for descriptions and for checks.

The frames themselves are put together by hand (relay.wire.replies, relay.wire.envelope), which is fast; the tests check every
frame they receive against these types, so that what is sent and what is described cannot differ.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from relay.wire.errors import Code
from relay.wire.frames import (
    MAX_IDS,
    ConversationId,
    DeviceKey,
    Kind,
    MediaId,
    MessageId,
    Ref,
    Seq,
    UserId,
)
from relay.wire.ids import DEVICE_PATTERN, RELAY_USER, USER_PATTERN

Value = TypeVar("Value")
# Absent or of this type; null is neither.
Maybe: TypeAlias = Value | UnsetType

Milliseconds = Annotated[int, Meta(ge=0, description="Milliseconds since the epoch")]
Duration = Annotated[int, Meta(ge=0, description="Milliseconds")]
Count = Annotated[int, Meta(ge=0)]
SenderId = Annotated[
    str,
    Meta(
        pattern=rf"^({USER_PATTERN}|\{RELAY_USER})\Z",
        description=f"A user id, or `{RELAY_USER}` for the relay",
    ),
]
DeviceId = Annotated[str, Meta(pattern=rf"^{DEVICE_PATTERN}\Z")]
Fate = Literal["delivered", "expired", "withdrawn", "released", "trimmed", "unknown"]


class Part(Struct, forbid_unknown_fields=True, rename="camel", frozen=True, kw_only=True):
    """A part of a frame."""


class ServerFrame(Part, tag_field="t", frozen=True):
    """A frame of the relay."""


class Limits(Part, frozen=True):
    """``frame`` and ``body`` in bytes, ``ops`` operations in one frame."""

    frame: Count
    body: Count
    ops: Count


class Gap(Part, frozen=True):
    """Since when this device may have missed messages, and why."""

    since: Milliseconds
    why: Literal["full", "inactive", "reset"]


class Welcome(ServerFrame, tag="welcome", frozen=True):
    """The first frame of an authenticated connection. ``gap`` is there while this device may have missed messages."""

    v: Literal[1]
    user: UserId
    device: DeviceId
    time: Milliseconds
    heartbeat: Duration
    window: Count
    window_bytes: Count
    limits: Limits
    features: list[str]
    gap: Maybe[Gap] = UNSET


class Stored(ServerFrame, tag="stored", frozen=True):
    """The message is durable; the first answer again for one that was stored before."""

    conv: ConversationId
    id: MessageId
    seq: Seq
    at: Milliseconds
    ref: Maybe[Ref] = UNSET


class Acked(ServerFrame, tag="acked", frozen=True):
    """The acknowledgement that carried this ``ref`` is durable."""

    conv: ConversationId
    ids: Annotated[list[MessageId], Meta(max_length=MAX_IDS)]
    ref: Ref


class Waiting(Part, frozen=True):
    """An own message that ``awaiting`` people have not got yet; ``delivered`` names those who have. When they are too many for
    the frame it is empty, and ``deliveredCount`` says how many."""

    id: MessageId
    awaiting: Count
    delivered: list[UserId]
    delivered_count: Maybe[Count] = UNSET


class Gone(Part, frozen=True):
    """An own message that waits for nobody any more, and why; ``delivered`` as in `Waiting`."""

    id: MessageId
    gone: Literal[True]
    fate: Fate
    delivered: list[UserId]
    delivered_count: Maybe[Count] = UNSET


class StatusReply(ServerFrame, tag="status", frozen=True):
    """What became of own messages; an item is of the shape `Waiting` or `Gone`."""

    conv: ConversationId
    # msgspec cannot tell untagged structs apart; ``check_server_frame`` and the description know both.
    items: list[dict[str, Any]]
    ref: Maybe[Ref] = UNSET


class Origin(Part, frozen=True):
    """Who sent a message, from which device."""

    user: SenderId
    device: str


class Msg(ServerFrame, tag="msg", frozen=True):
    """A message to store. Sort a conversation by (``seq``, ``id``). ``sealed`` is this device's own entry."""

    id: MessageId
    conv: ConversationId
    seq: Seq
    at: Milliseconds
    sender: Origin = msgspec.field(name="from")
    kind: Kind
    body: str | dict[str, Any] | None
    reply_to: Maybe[MessageId] = UNSET
    media: Maybe[list[MediaId]] = UNSET
    sealed: Maybe[str] = UNSET


class Drained(ServerFrame, tag="drained", frozen=True):
    """All that waited for this device when it connected is delivered and durably acknowledged."""

    count: Count


class Holder(Part, frozen=True):
    """The device that has the messages."""

    user: UserId
    device: DeviceId


class Receipt(ServerFrame, tag="receipt", frozen=True):
    """Own messages reached that device's disk. Not stored: after an absence ask ``status``."""

    conv: ConversationId
    ids: list[MessageId]
    by: Holder
    at: Milliseconds


class Done(ServerFrame, tag="done", frozen=True):
    """The ``read`` or ``presence`` that carried this ``ref`` is done: the cursor is durable, or everybody watched is told."""

    ref: Ref


class ReadCursor(ServerFrame, tag="read", frozen=True):
    """A member, perhaps oneself on another device, has read a conversation up to here."""

    conv: ConversationId
    user: UserId
    up_to: Seq
    at: Milliseconds


class TypingNow(ServerFrame, tag="typing", frozen=True):
    """A member types, or has stopped. Live only."""

    conv: ConversationId
    user: UserId
    on: bool


class Seen(ServerFrame, tag="presence", frozen=True):
    """Whether somebody who is watched is online, and when they were last seen; null when that is unknown or does not concern
    one."""

    user: UserId
    online: bool
    last_seen: Milliseconds | None


class Pong(ServerFrame, tag="pong", frozen=True):
    """The answer to ``ping``: the relay's time."""

    time: Milliseconds
    ref: Maybe[Ref] = UNSET


class Authed(ServerFrame, tag="authed", frozen=True):
    """The renewed token is accepted; ``exp`` in seconds since the epoch."""

    exp: Count
    ref: Maybe[Ref] = UNSET


class Bye(ServerFrame, tag="bye", frozen=True):
    """The node stops; come back after so many milliseconds. Close 1012 follows."""

    retry_after: Duration


class KeysLow(ServerFrame, tag="keys", frozen=True):
    """The stock of one-time prekeys of this device runs low: publish more with ``PUT /v1/keys``."""

    one_time: Count


class Error(ServerFrame, tag="error", frozen=True):
    """What failed and why. ``ref``, ``id`` and ``conv`` name the operation; ``missing``, ``extra``, ``stale`` (device
    keys) and ``devicesRev`` come with ``device_mismatch``."""

    code: Code
    message: str
    retry: bool
    retry_after: Maybe[Duration] = UNSET
    ref: Maybe[Ref] = UNSET
    id: Maybe[str] = UNSET
    conv: Maybe[str] = UNSET
    missing: Maybe[list[DeviceKey]] = UNSET
    extra: Maybe[list[DeviceKey]] = UNSET
    stale: Maybe[list[DeviceKey]] = UNSET
    devices_rev: Maybe[str] = UNSET


AnyServerFrame = (
    Welcome
    | Stored
    | Acked
    | StatusReply
    | Msg
    | Drained
    | Receipt
    | Done
    | ReadCursor
    | TypingNow
    | Seen
    | Pong
    | Authed
    | Bye
    | KeysLow
    | Error
)
ITEMS: Final = (Waiting, Gone)


def check_server_frame(value: dict[str, Any]) -> None:
    """Raises ValueError when one operation from the relay is not of a described kind, lacks a field, has one that is not
    described, or holds a value of another type or form."""
    try:
        found: ServerFrame = msgspec.convert(value, AnyServerFrame)
        if isinstance(found, StatusReply):
            for item in found.items:
                msgspec.convert(item, Gone if "gone" in item else Waiting)
        if isinstance(found, Error) and (found.devices_rev is UNSET) == (found.code == "device_mismatch"):
            raise ValueError("devicesRev comes with device_mismatch, and only then")
    except msgspec.ValidationError as error:
        raise ValueError(f"{value.get('t')}: {error}") from None
