"""``ack``: these messages are on this device's disk."""

from __future__ import annotations

from collections.abc import Awaitable
from time import monotonic

from handlers.context import Context, Peer
from relay.store.batcher import BatcherClosed
from relay.store.endings import Sole
from relay.wire import replies
from relay.wire.codec import check_ids
from relay.wire.errors import RelayError
from relay.wire.frames import Ack
from relay.wire.ids import document_id


def ack(ctx: Context, peer: Peer, op: Ack) -> Awaitable[None] | None:
    """Queues the acknowledgement. Messages stay in flight until it is durable; when it cannot be made so they are
    delivered again. Waits only when a conversation of many devices has acknowledged more than can be ended. Raises
    RelayError."""
    check_ids(op.ids)
    in_flight = peer.delivery.in_flight
    messages: dict[str, Sole | None] = {}
    for message in op.ids:
        doc_id = document_id(op.conv, message)
        found = in_flight.get(doc_id)
        if found is None:
            messages[doc_id] = None
        else:
            # Only once: a second acknowledgement must look whether the first was enough.
            messages[found.stored_id], found.sole = found.sole, None
            if found.stored_id != doc_id:
                # A part: this conversation has many devices.
                ctx.endings.note_crowd(op.conv)
    now = ctx.clock.now()

    def done(durable: bool) -> None:
        if not durable:
            peer.delivery.redeliver(messages)
            if op.ref is not None:
                failure = RelayError(
                    "unavailable", "the acknowledgement could not be stored in time; send it again"
                )
                peer.outbox.put(replies.error(failure, {"ref": op.ref, "conv": op.conv}))
        elif op.ref is not None:
            peer.outbox.put(replies.acked(op.conv, op.ids, op.ref))

    if not messages:
        done(True)
        return None
    try:
        ctx.endings.acknowledge(
            op.conv,
            peer.user,
            peer.device,
            messages,
            at=now,
            deadline=monotonic() + ctx.limits.send_deadline,
            done=done,
            quiet=peer.quiet,
        )
    except BatcherClosed:
        raise RelayError(
            "unavailable", "the relay is stopping; acknowledge again", retry_after=1000
        ) from None
    return ctx.endings.crowd_room(op.conv)
