"""What the relay sends, as values. Pure; whatever it holds, nothing raises."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from relay.client.values import Presence, ReadCursor, Receipt, Stored, Typing

_LOG: Final = logging.getLogger(__name__)


def operations_of(text: str) -> list[Mapping[str, Any]]:
    """The operations of a received frame; what is no JSON object is left out."""
    # Not relay.wire.codec: what the relay sends must be stored and acknowledged whatever it holds, or it comes for ever.
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        _LOG.warning("the relay sent a frame that is not JSON; it is ignored")
        return []
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


def stored_of(frame: Mapping[str, Any]) -> Stored | None:
    """The value of a ``stored`` frame; None when it names no message."""
    conv, message, seq, at = frame.get("conv"), frame.get("id"), frame.get("seq"), frame.get("at")
    if type(conv) is str and type(message) is str and type(seq) is int:
        return Stored(conv, message, seq, at if type(at) is int else 0)
    return None


def receipt_of(frame: Mapping[str, Any]) -> Receipt | None:
    """The value of a ``receipt`` frame; None when it names no messages."""
    conv, ids, by, at = frame.get("conv"), frame.get("ids"), frame.get("by"), frame.get("at")
    if type(conv) is str and isinstance(ids, list) and isinstance(by, dict):
        listed = tuple(item for item in ids if type(item) is str)
        return Receipt(
            conv, listed, str(by.get("user", "")), str(by.get("device", "")), at if type(at) is int else 0
        )
    return None


def live_of(frame: Mapping[str, Any]) -> ReadCursor | Typing | Presence | None:
    """The value of a ``read``, ``typing`` or ``presence`` frame; None for another, and for one that lacks something."""
    kind, conv, user = frame.get("t"), frame.get("conv"), frame.get("user")
    if type(user) is not str:
        return None
    if kind == "presence":
        seen, online = frame.get("lastSeen"), frame.get("online")
        return Presence(user, online, seen if type(seen) is int else None) if type(online) is bool else None
    if type(conv) is not str:
        return None
    if kind == "typing":
        on = frame.get("on")
        return Typing(conv, user, on) if type(on) is bool else None
    if kind == "read":
        up_to, at = frame.get("upTo"), frame.get("at")
        return ReadCursor(conv, user, up_to, at if type(at) is int else 0) if type(up_to) is int else None
    return None


def seconds(milliseconds: object, usual: float) -> float:
    """A time told in milliseconds, in seconds; ``usual`` when it is none."""
    return milliseconds / 1000 if type(milliseconds) in (int, float) and milliseconds >= 0 else usual  # type: ignore[operator]
