"""Cursors of lists: the place of the last thing of a page, opaque to clients. A page costs the same at any depth."""

from __future__ import annotations

import base64
import binascii

from relay.wire import codec
from relay.wire.errors import RelayError


def cursor_at(number: int, name: str) -> str:
    """The cursor behind a place in an order by ``(number, name)``."""
    return base64.urlsafe_b64encode(codec.dumps([number, name]).encode()).decode()


def place_of(cursor: str) -> tuple[int, str]:
    """The place that a cursor names. Raises RelayError ``bad_request`` for one that is not ours."""
    try:
        number, name = codec.loads(base64.urlsafe_b64decode(cursor.encode()).decode())
        if type(number) is not int or type(name) is not str:
            raise ValueError
    except (ValueError, TypeError, binascii.Error, RelayError):
        raise RelayError("bad_request", "cursor is not one of ours") from None
    return number, name


def text_cursor_at(key: str, name: str) -> str:
    """The cursor behind a place in an order by ``(key, name)`` with a text for a key."""
    return base64.urlsafe_b64encode(codec.dumps([key, name]).encode()).decode()


def text_place_of(cursor: str) -> tuple[str, str]:
    """The place that a cursor of ``text_cursor_at`` names. Raises RelayError ``bad_request`` for one that is not ours."""
    try:
        key, name = codec.loads(base64.urlsafe_b64decode(cursor.encode()).decode())
        if type(key) is not str or type(name) is not str:
            raise ValueError
    except (ValueError, TypeError, binascii.Error, RelayError):
        raise RelayError("bad_request", "cursor is not one of ours") from None
    return key, name
