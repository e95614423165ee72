"""From an operation to its handler, and from what goes wrong to an error frame."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import structlog

from handlers.context import Context, Peer
from handlers.ws.ack import ack
from handlers.ws.presence import presence
from handlers.ws.read import read
from handlers.ws.send import resolve, send
from handlers.ws.session import auth, ping
from handlers.ws.status import status
from handlers.ws.typing import typing
from relay.store.mongo import PyMongoError, brief
from relay.wire import replies
from relay.wire.codec import Refused
from relay.wire.errors import RelayError
from relay.wire.frames import Ack, Auth, Operation, Ping, Presence, Read, Send, Status, Typing

Handler = Callable[[Context, Peer, Any], Awaitable[None] | None]

HANDLERS: Final[dict[type[Operation], Handler]] = {
    Send: send,
    Ack: ack,
    Status: status,
    Read: read,
    Typing: typing,
    Presence: presence,
    Ping: ping,
    Auth: auth,
}

log = structlog.get_logger(__name__)


async def dispatch(ctx: Context, peer: Peer, operations: Sequence[Operation | Refused]) -> None:
    """Runs the operations of one frame in order; each succeeds or fails alone."""
    if len(operations) > 1:
        # When this fails each send asks again and is told by itself.
        with contextlib.suppress(PyMongoError):
            await resolve(ctx, {op.conv for op in operations if type(op) is Send})
    counted = ctx.metrics.operations
    for op in operations:
        if isinstance(op, Refused):
            _fail(ctx, peer, op.error, op.about)
            continue
        counted[type(op)].inc()
        try:
            waiting = HANDLERS[type(op)](ctx, peer, op)
            if waiting is not None:
                await waiting
            if peer.crowded and isinstance(op, Send):
                # One to many devices is work for milliseconds: others are served before this frame's next.
                peer.crowded = False
                await ctx.sends.large_room(op.conv)
                await asyncio.sleep(0)
        except RelayError as error:
            _fail(ctx, peer, error, _about(op))
        except PyMongoError as error:
            log.warning("store did not answer", op=op.__struct_config__.tag, error=brief(error))
            _fail(
                ctx,
                peer,
                RelayError("unavailable", "the store did not answer; try again", retry_after=1000),
                _about(op),
            )
        except Exception:
            log.exception("operation failed", op=op.__struct_config__.tag)
            _fail(ctx, peer, RelayError("internal", "something went wrong in the relay"), _about(op))


def _fail(ctx: Context, peer: Peer, error: RelayError, about: dict[str, Any]) -> None:
    ctx.metrics.errors.labels(error.code).inc()
    ctx.metrics.reached(error.limit)
    peer.outbox.put(replies.error(error, about))


def _about(op: Operation) -> dict[str, Any]:
    return {"ref": op.ref, "id": getattr(op, "id", None), "conv": getattr(op, "conv", None)}
