"""JSON text to typed operations and back; the only module that imports ujson.

ujson accepts what JSON, BSON or JavaScript cannot hold: NaN and Infinity, lone surrogates, integers of any size. ``decode``
refuses them before anything else sees them. Of duplicate keys the last one wins (RFC 8259 4 leaves it open).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final, get_args

import msgspec
import ujson

from relay.wire import errors
from relay.wire.errors import FrameError, RelayError
from relay.wire.frames import MAX_IDS, MAX_OPERATIONS, AnyOperation, Operation, Send

MAX_DEPTH: Final = 32
SAFE_INTEGER: Final = (1 << 53) - 1
_MESSAGE_LENGTH: Final = 200

# ujson takes raw control characters in strings, which JSON forbids; escaped on the way out they would be six times as long.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")

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
    if _CONTROL.search(text) is not None:
        raise FrameError(errors.NOT_JSON)
    try:
        value = ujson.loads(text)
    except (ValueError, RecursionError):  # ujson.JSONDecodeError is a ValueError
        raise FrameError(errors.NOT_JSON) from None
    if type(value) is dict:
        return [_operation(value, text)]
    if type(value) is not list:
        raise FrameError(errors.NOT_JSON)
    if len(value) > MAX_OPERATIONS:
        found = RelayError(
            "too_large", f"a frame holds at most {MAX_OPERATIONS} operations, this one {len(value)}"
        )
        return [Refused(found, {})]
    for item in value:
        if type(item) is not dict:
            raise FrameError(errors.NOT_JSON)
    return [_operation(item, text) for item in value]


def decode_send(value: object) -> Send:
    """A ``send`` that came over HTTP, as parsed JSON without ``t``. Raises RelayError."""
    if type(value) is not dict or "t" in value:
        raise RelayError("bad_request", "the request body must be a send operation without t")
    _check_value(value, 1)
    try:
        return msgspec.convert(value | {"t": "send"}, Send)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None


def loads(text: str) -> Any:
    """Parsed JSON, with everything refused that BSON or JavaScript cannot hold. Raises RelayError."""
    try:
        value = ujson.loads(text)
    except (ValueError, RecursionError):
        raise RelayError("bad_request", "the request body is not JSON") from None
    _check_value(value, 0)
    return value


def dumps(value: object) -> str:
    """Compact JSON text. Only for values that ``decode`` let in or that the relay made."""
    return ujson.dumps(value, ensure_ascii=False, escape_forward_slashes=False)


def join(frames: Iterable[str]) -> str:
    """Several encoded frames as one array frame."""
    return f"[{','.join(frames)}]"


def _operation(value: dict[str, Any], text: str) -> Operation | Refused:
    try:
        # Escapes are the only way a lone surrogate gets into valid UTF-8; the other two only hide in an object body or
        # in a field whose type refuses them, so plain text messages need no walk at all.
        if "\\u" in text or type(value.get("body")) is dict:
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
        return RelayError("too_large", text[:_MESSAGE_LENGTH])
    if "matching regex" in text:
        text = "a value has the wrong form" + text.partition("'")[2].rpartition("'")[2]
    if not _encodable(text):
        text = "a value cannot be written as UTF-8"
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
        raise RelayError("too_large", f"at most {MAX_IDS} ids at once, these are {len(ids)}")
