"""The frames the relay sends, as encoded text. Hot ones are put together by hand: every value comes from an alphabet
that needs no escaping (relay.wire.ids), except ``ref``, which is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from relay.wire.codec import dumps
from relay.wire.errors import RelayError

PROTOCOL_VERSION = 1


def stored(conversation: str, message: str, seq: int, at: int, ref: str | None) -> str:
    """The message is durable, or was already."""
    tail = "}" if ref is None else f',"ref":{dumps(ref)}}}'
    return f'{{"t":"stored","conv":"{conversation}","id":"{message}","seq":{seq},"at":{at}{tail}'


def acked(conversation: str, messages: list[str], ref: str) -> str:
    """The acknowledgement is durable."""
    return f'{{"t":"acked","conv":"{conversation}","ids":{dumps(messages)},"ref":{dumps(ref)}}}'


def receipt(conversation: str, messages: Iterable[str], user: str, device: str, at: int) -> str:
    """Own messages reached that device's disk."""
    listed = '","'.join(messages)
    return (
        f'{{"t":"receipt","conv":"{conversation}","ids":["{listed}"],'
        f'"by":{{"user":"{user}","device":"{device}"}},"at":{at}}}'
    )


def done(ref: str) -> str:
    """What was asked for is done, durably where that says something."""
    return _with_ref({"t": "done"}, ref)


def read(conversation: str, user: str, up_to: int, at: int) -> str:
    """A member has read up to here, since ``at`` (ms)."""
    return f'{{"t":"read","conv":"{conversation}","user":"{user}","upTo":{up_to},"at":{at}}}'


def typing(conversation: str, user: str, on: bool) -> str:
    """A member types, or has stopped."""
    return f'{{"t":"typing","conv":"{conversation}","user":"{user}","on":{"true" if on else "false"}}}'


def presence(user: str, online: bool, last_seen: int | None) -> str:
    """Whether somebody is online, and when they were last seen (ms)."""
    seen = "null" if last_seen is None else str(last_seen)
    return f'{{"t":"presence","user":"{user}","online":{"true" if online else "false"},"lastSeen":{seen}}}'


def status(conversation: str, items: list[dict[str, object]], ref: str | None) -> str:
    """What became of own messages."""
    return _with_ref({"t": "status", "conv": conversation, "items": items}, ref)


def drained(count: int) -> str:
    """All that waited at connect is delivered and durably acknowledged."""
    return f'{{"t":"drained","count":{count}}}'


def pong(now: int, ref: str | None) -> str:
    """Answer to a ping."""
    return _with_ref({"t": "pong", "time": now}, ref)


def authed(expires: int, ref: str | None) -> str:
    """The renewed token is accepted; ``expires`` in seconds."""
    return _with_ref({"t": "authed", "exp": expires}, ref)


def keys(one_time: int) -> str:
    """The stock of one-time prekeys of this device runs low."""
    return f'{{"t":"keys","oneTime":{one_time}}}'


def bye(retry_after: int) -> str:
    """The node drains; come back after so many milliseconds."""
    return f'{{"t":"bye","retryAfter":{retry_after}}}'


def error(failure: RelayError, about: Mapping[str, str | None]) -> str:
    """What failed and why; ``about`` names the operation (``ref``, ``id``, ``conv``)."""
    frame: dict[str, object] = {"t": "error", **failure.fields()}
    frame.update({name: value for name, value in about.items() if value is not None})
    return dumps(frame)


def welcome(fields: Mapping[str, object]) -> str:
    """The first frame of an authenticated connection."""
    return dumps({"t": "welcome", "v": PROTOCOL_VERSION, **fields})


def _with_ref(frame: dict[str, object], ref: str | None) -> str:
    if ref is not None:
        frame["ref"] = ref
    return dumps(frame)
