"""Operations into frames, within the limits that the relay told in ``welcome``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from relay.client.database import Waiting
from relay.client.errors import InvalidMessage
from relay.client.values import Draft
from relay.wire import codec, frames

MAX_ACK_IDS: Final = frames.MAX_IDS
_ID_BYTES: Final = 39  # a quoted UUID and its comma
_ACK_BYTES: Final = 128  # the rest of an ack: its names and the longest conversation id


@dataclass(frozen=True, slots=True)
class Limits:
    """What one frame may hold: ``frame`` in bytes of UTF-8, ``ops`` operations."""

    frame: int = 262_144
    ops: int = 256

    @classmethod
    def from_welcome(cls, welcome: Mapping[str, Any]) -> Limits:
        """The limits of this connection; what the relay leaves out keeps its usual value."""
        told = welcome.get("limits")
        found = told if isinstance(told, dict) else {}
        usual = cls()
        return cls(
            _positive(found.get("frame"), usual.frame), min(_positive(found.get("ops"), usual.ops), usual.ops)
        )


def encode(draft: Draft) -> str:
    """The JSON text of a ``send``. Raises InvalidMessage for what no relay would accept."""
    operation: dict[str, object] = {"t": "send", "id": draft.id, "conv": draft.conv, "kind": draft.kind}
    operation["body"] = draft.body
    if draft.reply_to is not None:
        operation["replyTo"] = draft.reply_to
    if draft.ttl is not None:
        operation["ttl"] = draft.ttl
    try:
        text = codec.dumps(operation)
        text.encode()
        checked = codec.decode(text)[0]
    except Exception as error:  # the encoder calls whatever methods the body's objects have
        raise InvalidMessage(f"message {draft.id} cannot be written as JSON: {error}") from error
    if isinstance(checked, codec.Refused):
        raise InvalidMessage(f"message {draft.id}: {checked.error.message}")
    return text


def attempt(row: Waiting, *, again: bool) -> str:
    """The operation of an outbox row as it goes out now."""
    tail = f',"after":{row.after}' if row.after else ""
    if again:
        tail += ',"again":true'
    return f"{row.operation[:-1]}{tail}}}"


def acknowledgements(keys: Iterable[tuple[str, str]], limits: Limits) -> Iterator[str]:
    """``ack`` operations for (conversation, id) pairs, one a conversation unless there are too many ids for one."""
    by_conversation: dict[str, dict[str, None]] = {}
    for conv, message in keys:
        by_conversation.setdefault(conv, {})[message] = None
    most = max(1, min(MAX_ACK_IDS, (limits.frame - _ACK_BYTES) // _ID_BYTES))
    for conv, found in by_conversation.items():
        listed = list(found)
        for start in range(0, len(listed), most):
            yield codec.dumps({"t": "ack", "conv": conv, "ids": listed[start : start + most]})


def pack(operations: Iterable[str], limits: Limits) -> Iterator[str]:
    """Frames of as many operations as fit, in order. One that is too large alone makes a frame of its own."""
    held: list[str] = []
    size = 2
    for operation in operations:
        needed = len(operation.encode()) + 1
        if held and (len(held) >= limits.ops or size + needed > limits.frame):
            yield _frame(held)
            held, size = [], 2
        held.append(operation)
        size += needed
    if held:
        yield _frame(held)


def _frame(operations: list[str]) -> str:
    return operations[0] if len(operations) == 1 else codec.join(operations)


def _positive(value: object, usual: int) -> int:
    return value if type(value) is int and value > 0 else usual
