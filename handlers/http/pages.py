"""Pages of waiting messages. A cursor is the place of the last message of the page before, so a page costs the same at any
depth."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

from aiohttp import web

from handlers.context import Context
from handlers.http.route import Caller, only, page_limit
from relay.wire import codec
from relay.wire.errors import RelayError
from relay.wire.ids import any_device_key, device_key

_DEFAULT: Final = 100
_MOST: Final = 256
_BYTES: Final = 4_194_304
PAGE_QUERY: Final[dict[str, dict[str, Any]]] = {
    "cursor": {"type": "string", "description": "`next` of the page before"},
    "limit": {"type": "integer", "minimum": 1, "maximum": _MOST},
}


async def message_page(
    ctx: Context, caller: Caller, request: web.Request, conversation: str | None
) -> tuple[list[str], str]:
    """The encoded messages of a page, and its encoded ``next``. Raises RelayError."""
    only(request, "cursor", "limit")
    limit = page_limit(request, _DEFAULT, _MOST)
    cursor = request.query.get("cursor")
    key = device_key(caller.user, caller.device)
    page = await ctx.messages.waiting(
        (key, any_device_key(caller.user)),
        ctx.clock.now(),
        limit=limit,
        max_bytes=_BYTES,
        conversation=conversation,
        after=None if cursor is None else _open(cursor),
    )
    frames = [envelope.frame_for(key) for envelope in page.envelopes]
    if page.exhausted or not page.envelopes:
        return frames, "null"
    last = page.envelopes[-1]
    return frames, codec.dumps(_close(last.seq, last.doc_id))


def _close(seq: int, doc_id: str) -> str:
    return base64.urlsafe_b64encode(codec.dumps([seq, doc_id]).encode()).decode()


def _open(cursor: str) -> tuple[int, str]:
    try:
        seq, doc_id = codec.loads(base64.urlsafe_b64decode(cursor.encode()).decode())
        if type(seq) is not int or type(doc_id) is not str:
            raise ValueError
    except (ValueError, TypeError, binascii.Error, RelayError):
        raise RelayError("bad_request", "cursor is not one of ours") from None
    return seq, doc_id
