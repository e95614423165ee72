"""Pages of waiting messages. A cursor is the place of the last message of the page before, so a page costs the same at any
depth."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from handlers.context import Context
from handlers.http.route import Caller, page_limit, paging
from relay.wire import codec
from relay.wire.cursor import cursor_at, place_of
from relay.wire.errors import RelayError
from relay.wire.ids import any_device_key, device_key

_DEFAULT: Final = 100
_MOST: Final = 256
_BYTES: Final = 4_194_304
PAGE_QUERY: Final = paging(_MOST, _DEFAULT)


async def message_page(
    ctx: Context, caller: Caller, request: web.Request, conversation: str | None
) -> tuple[list[str], str]:
    """The encoded messages of a page, and its encoded ``next``. Raises RelayError."""
    limit = page_limit(request, _DEFAULT, _MOST)
    cursor = request.query.get("cursor")
    key = device_key(caller.user, caller.device)
    page = await ctx.messages.waiting(
        (key, any_device_key(caller.user)),
        ctx.clock.now(),
        limit=limit,
        max_bytes=_BYTES,
        conversation=conversation,
        after=None if cursor is None else place_of(cursor),
    )
    if not page.complete:
        raise RelayError("unavailable", "a part of the store does not answer; try again", retry_after=1000)
    frames = [envelope.frame_for(key) for envelope in page.envelopes]
    if page.exhausted or not page.envelopes:
        return frames, "null"
    last = page.envelopes[-1]
    return frames, codec.dumps(cursor_at(last.seq, last.stored_id))
