"""``read``: how far the user has read a conversation."""

from __future__ import annotations

from functools import partial

from handlers.context import Context, Peer
from relay.wire import replies
from relay.wire.errors import RelayError
from relay.wire.frames import Read


def read(ctx: Context, peer: Peer, op: Read) -> None:
    """Queues the mark; ``done`` follows, when the operation has a ``ref``, once the cursor is durably there or further.
    Raises RelayError."""
    if ctx.clock.too_far_ahead(op.up_to):
        raise RelayError("bad_request", "upTo lies more than two hours in the future")
    ctx.live.reads.mark(
        op.conv,
        peer.user,
        op.up_to,
        partial(_answer, ctx, peer, op),
        device=peer.key,
        each=op.ref is not None,
    )


def _answer(ctx: Context, peer: Peer, op: Read, failure: RelayError | None) -> None:
    if failure is not None:
        ctx.metrics.errors.labels(failure.code).inc()
        peer.outbox.put(replies.error(failure, {"ref": op.ref, "conv": op.conv}))
    elif op.ref is not None:
        peer.outbox.put(replies.done(op.ref))
