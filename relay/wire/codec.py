"""JSON text to typed operations and back; the only module that imports ujson.

ujson accepts what JSON, BSON or JavaScript cannot hold: NaN and Infinity, lone surrogates, integers of any size. ``decode``
refuses them before anything else sees them. Of duplicate keys the last one wins (RFC 8259 4 leaves it open).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final, get_args

import msgspec
import ujson

from relay.wire import errors
from relay.wire.errors import FrameError, RelayError
from relay.wire.frames import MAX_IDS, MAX_OPERATIONS, AnyOperation, Operation, Send
from relay.wire.limits import Limit

MAX_DEPTH: Final = 32
SAFE_INTEGER: Final = (1 << 53) - 1
_MESSAGE_LENGTH: Final = 200

_STRICT: Final = msgspec.json.Decoder(msgspec.Raw)

# msgspec reads a union anew at every call; one look-up by tag is six times faster.
_TYPES: Final[dict[str, type[Operation]]] = {
    str(kind.__struct_config__.tag): kind for kind in get_args(AnyOperation)
}


@dataclass(frozen=True, slots=True)
class Refused:
    """An operation that is wrong, and what its error frame names (``ref``, ``id``, ``conv``)."""

    error: RelayError
    about: dict[str, str]


def decode(text: str) -> list[Operation | Refused]:
    """The operations of one frame, in order; each is right or refused by itself.

    Raises FrameError when the frame as a whole is not JSON objects.
    """
    strict = _is_json(text)
    try:
        value = ujson.loads(text)
    except (ValueError, RecursionError):  # ujson.JSONDecodeError is a ValueError
        raise FrameError(errors.NOT_JSON) from None
    if type(value) is dict:
        value = [value]
    if type(value) is not list:
        raise FrameError(errors.NOT_JSON)
    if len(value) > MAX_OPERATIONS:
        found = RelayError(
            "too_large",
            f"a frame holds at most {MAX_OPERATIONS} operations, this one {len(value)}",
            limit=Limit.OPERATIONS,
        )
        return [Refused(found, {})]
    for item in value:
        if type(item) is not dict:
            raise FrameError(errors.NOT_JSON)
    operations = [_operation(item, strict) for item in value]
    if not strict and not any(isinstance(operation, Refused) for operation in operations):
        # Not JSON, for another reason than a value that an operation is refused for.
        raise FrameError(errors.NOT_JSON)
    return operations


def decode_send(value: object) -> Send:
    """A ``send`` that came over HTTP, as parsed JSON without ``t``. Raises RelayError."""
    if type(value) is not dict or "t" in value:
        raise RelayError("bad_request", "the request body must be a send operation without t")
    _check_value(value, 0)
    try:
        return msgspec.convert(value | {"t": "send"}, Send)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None


def loads(text: str) -> Any:
    """Parsed JSON, with everything refused that BSON or JavaScript cannot hold. Raises RelayError."""
    strict = _is_json(text)
    try:
        value = ujson.loads(text)
    except (ValueError, RecursionError):
        raise RelayError("bad_request", "the request body is not JSON") from None
    _check_value(value, 0)
    if not strict:
        raise RelayError("bad_request", "the request body is not JSON")
    return value


def dumps(value: object) -> str:
    """Compact JSON text. Only for values that ``decode`` let in or that the relay made."""
    return ujson.dumps(value, ensure_ascii=False, escape_forward_slashes=False)


def join(frames: Iterable[str]) -> str:
    """Several encoded frames as one array frame."""
    return f"[{','.join(frames)}]"


def _is_json(text: str) -> bool:
    """ujson also takes ``01``, ``1.``, ``-``, NaN, lone surrogates and raw control characters in strings."""
    try:
        _STRICT.decode(text)
    except (ValueError, RecursionError):  # msgspec.DecodeError is a ValueError
        return False
    return True


def _operation(value: dict[str, Any], strict: bool) -> Operation | Refused:
    try:
        # In JSON proper, what BSON or JavaScript cannot hold hides only in an object body or in a field whose type
        # refuses it, so plain text messages need no walk.
        if not strict or type(value.get("body")) is dict:
            _check_value(value, 0)
        return msgspec.convert(value, _TYPES[value["t"]])
    except (KeyError, TypeError):
        return Refused(
            RelayError("bad_request", "t must name an operation: " + ", ".join(_TYPES)), _about(value)
        )
    except RelayError as error:
        return Refused(error, _about(value))
    except msgspec.ValidationError as error:
        return Refused(_invalid(error), _about(value))
    except (RecursionError, OverflowError):
        return Refused(RelayError("bad_request", "a value is too deep or too large"), _about(value))


def _about(value: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("ref", "id", "conv"):
        item = value.get(name)
        if type(item) is str and len(item) <= 64 and _encodable(item):
            found[name] = item
    return found


def _invalid(error: msgspec.ValidationError) -> RelayError:
    text = str(error)
    if "Expected `array` of length <=" in text or "Expected `object` of length <=" in text:
        return RelayError("too_large", text[:_MESSAGE_LENGTH], limit=Limit.LIST)
    if "matching regex" in text:
        text = "a value has the wrong form" + text.partition("'")[2].rpartition("'")[2]
    if not text.isprintable() or not _encodable(text):
        text = "a field is unknown, or a value cannot be written as text"
    return RelayError("bad_request", text[:_MESSAGE_LENGTH])


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_value(value: object, depth: int) -> None:
    """Refuses what BSON or JavaScript cannot hold; walks at most MAX_DEPTH levels."""
    kind = type(value)
    if kind is str:
        if not _encodable(value):  # type: ignore[arg-type]
            raise RelayError("bad_request", "a string holds a lone surrogate")
    elif kind is int:
        if not -SAFE_INTEGER <= value <= SAFE_INTEGER:  # type: ignore[operator]
            raise RelayError("bad_request", "an integer lies beyond 2^53; send it as a string")
    elif kind is float:
        if not isfinite(value):  # type: ignore[arg-type]
            raise RelayError("bad_request", "NaN and Infinity are not JSON")
    elif kind is dict:
        if depth >= MAX_DEPTH:
            raise RelayError("bad_request", f"values nest deeper than {MAX_DEPTH} levels")
        for name, item in value.items():  # type: ignore[attr-defined]
            if "\0" in name or not _encodable(name):
                raise RelayError("bad_request", "a field name holds a NUL or a lone surrogate")
            _check_value(item, depth + 1)
    elif kind is list:
        if depth >= MAX_DEPTH:
            raise RelayError("bad_request", f"values nest deeper than {MAX_DEPTH} levels")
        for item in value:  # type: ignore[attr-defined]
            _check_value(item, depth + 1)


def check_ids(ids: list[str]) -> None:
    """Refuses a list of more than MAX_IDS ids. Raises RelayError."""
    if len(ids) > MAX_IDS:
        raise RelayError("too_large", f"at most {MAX_IDS} ids at once, these are {len(ids)}", limit=Limit.IDS)
