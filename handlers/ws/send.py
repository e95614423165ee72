"""``send``: store a message for every other device of the conversation's members."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from functools import partial

from handlers import sending
from handlers.context import Context, Peer
from handlers.sending import Sender
from relay.store.audience import Audience
from relay.store.submissions import Stored
from relay.wire import replies
from relay.wire.envelope import WITHDRAWN
from relay.wire.errors import RelayError
from relay.wire.frames import Send


def send(ctx: Context, peer: Peer, op: Send) -> Awaitable[None] | None:
    """Queues the message; ``stored`` follows once it is durable. Waits only for what is not cached, and for
    withdrawals. Raises RelayError."""
    audience = ctx.audiences.get(op.conv)
    if (
        audience is None
        or peer.user not in audience.members
        or peer.user in audience.refusals
        or op.kind == WITHDRAWN
        or op.sealed is not None
        or op.devices_rev is not None
    ):
        return _send_slowly(ctx, peer, op)
    try:
        _submit(ctx, peer, op, audience)
    except RelayError as refusal:
        if not sending.may_be_known(refusal):
            raise
        return _first_answer(ctx, peer, op, refusal)
    return None


async def resolve(ctx: Context, conversations: Iterable[str]) -> None:
    """Resolves the recipients of a whole frame's messages with one query."""
    missing = {name for name in conversations if ctx.audiences.get(name) is None}
    if missing:
        await ctx.audiences.resolve_all(missing)


async def _send_slowly(ctx: Context, peer: Peer, op: Send) -> None:
    sender = _sender(peer)
    sending.check(ctx, op)
    audience = await ctx.audiences.resolve(op.conv)
    try:
        if op.kind == WITHDRAWN and peer.user in audience.members:
            await sending.check_withdrawal(ctx, sender, op)
        _submit(ctx, peer, op, audience)
    except RelayError as refusal:
        await _first_answer(ctx, peer, op, refusal)


async def _first_answer(ctx: Context, peer: Peer, op: Send, refusal: RelayError) -> None:
    _answer(ctx, peer, op, await sending.first_answer(ctx, _sender(peer), op, refusal))


def _submit(ctx: Context, peer: Peer, op: Send, audience: Audience) -> None:
    submission = sending.submit(ctx, _sender(peer), op, audience, partial(_answer, ctx, peer, op))
    peer.last_seq = submission.envelope.seq
    ctx.live.typing.end(peer, op.conv)
    if submission.large:
        peer.crowded = True


def _sender(peer: Peer) -> Sender:
    return Sender(peer.user, peer.device, peer.key, peer.last_seq)


def _answer(ctx: Context, peer: Peer, op: Send, outcome: Stored | RelayError) -> None:
    if isinstance(outcome, Stored):
        peer.outbox.put(replies.stored(op.conv, op.id, outcome.seq, outcome.at, op.ref))
        if op.kind == WITHDRAWN:
            sending.withdraw(ctx, peer.user, op)
        return
    ctx.metrics.errors.labels(outcome.code).inc()
    ctx.metrics.reached(outcome.limit)
    peer.outbox.put(replies.error(outcome, {"ref": op.ref, "id": op.id, "conv": op.conv}))
