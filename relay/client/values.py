"""The values a device hands to the application: messages, and what else happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from relay.client.errors import DeviceError

Body = str | dict[str, Any] | None
State = Literal["queued", "stored", "failed", "received"]

WITHDRAWN: Final = "withdrawn"
_SEQ_LIMIT: Final = 1 << 53
_KNOWN: Final = frozenset({"t", "id", "conv", "seq", "at", "from", "kind", "body", "replyTo"})


@dataclass(frozen=True, slots=True)
class Message:
    """One row of the history.

    ``seq`` is None until the relay has stored an own message; (``seq``, ``id``) is the order of a conversation. ``at`` is in
    milliseconds. ``extra`` holds every field that the device has no column for (``media``, ``sealed``…). ``error`` is the
    code of a ``failed`` message.
    """

    conv: str
    id: str
    seq: int | None
    at: int
    user: str
    device: str
    kind: str
    body: Body
    reply_to: str | None = None
    state: State = "received"
    extra: Mapping[str, Any] | None = None
    error: str | None = None

    @classmethod
    def from_frame(cls, frame: Mapping[str, Any]) -> Message | None:
        """The message of a ``msg`` frame; None when it lacks what storing and acknowledging need."""
        conv, message, seq = frame.get("conv"), frame.get("id"), frame.get("seq")
        if (
            type(conv) is not str
            or type(message) is not str
            or type(seq) is not int
            or not 0 <= seq < _SEQ_LIMIT
        ):
            return None
        sender = frame.get("from")
        origin: Mapping[str, Any] = sender if isinstance(sender, dict) else {}
        at, body, reply_to = frame.get("at"), frame.get("body"), frame.get("replyTo")
        extra = {name: value for name, value in frame.items() if name not in _KNOWN}
        return cls(
            conv=conv,
            id=message,
            seq=seq,
            at=at if type(at) is int and 0 <= at < _SEQ_LIMIT else 0,
            user=str(origin.get("user", "")),
            device=str(origin.get("device", "")),
            kind=str(frame.get("kind", "")),
            body=body if body is None or isinstance(body, str | dict) else {"value": body},
            reply_to=reply_to if isinstance(reply_to, str) else None,
            extra=extra or None,
        )


@dataclass(frozen=True, slots=True)
class Draft:
    """A message to be sent. ``id`` is its idempotency key: the same id in the same conversation is sent once."""

    conv: str
    id: str
    body: Body
    kind: str = "text"
    reply_to: str | None = None
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class Connected:
    """The relay said welcome."""

    user: str
    device: str


@dataclass(frozen=True, slots=True)
class Disconnected:
    """There is no connection; the next attempt starts in ``retry_in`` seconds. ``code`` is None when none was made."""

    code: int | None
    reason: str
    retry_in: float


@dataclass(frozen=True, slots=True)
class Stored:
    """The relay has an own message durably."""

    conv: str
    id: str
    seq: int
    at: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The relay refused an own message for good; its state is ``failed``."""

    conv: str
    id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """Own messages are on the disk of that device."""

    conv: str
    ids: tuple[str, ...]
    user: str
    device: str
    at: int


@dataclass(frozen=True, slots=True)
class ReadCursor:
    """A member, perhaps oneself on another device, has read a conversation up to this ``seq``. ``at`` in milliseconds."""

    conv: str
    user: str
    up_to: int
    at: int


@dataclass(frozen=True, slots=True)
class Typing:
    """A member types, or has stopped; take it for ended 15 s after the last ``on``."""

    conv: str
    user: str
    on: bool


@dataclass(frozen=True, slots=True)
class Presence:
    """Whether somebody watched is online, and when they were last seen (milliseconds; None: unknown, or none of one's
    business)."""

    user: str
    online: bool
    last_seen: int | None


@dataclass(frozen=True, slots=True)
class Drained:
    """All that waited when this connection began is on this disk and acknowledged; ``count`` messages."""

    count: int


@dataclass(frozen=True, slots=True)
class NewConversation:
    """The first message of a conversation this device had never seen; fetch its details over HTTP."""

    conv: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Messages since ``since`` (milliseconds) were missed for good; ``why`` is ``full``, ``inactive`` or ``reset``."""

    since: int
    why: str


@dataclass(frozen=True, slots=True)
class Live:
    """Any other operation of the relay (``error``, ``keys``, later ones), as it came."""

    frame: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stopped:
    """The device gave up and does not reconnect."""

    error: DeviceError


Event = (
    Connected
    | Disconnected
    | Stored
    | Failed
    | Receipt
    | ReadCursor
    | Typing
    | Presence
    | Drained
    | NewConversation
    | Gap
    | Live
    | Stopped
)
