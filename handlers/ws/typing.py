"""``typing``: the user types, or has stopped."""

from __future__ import annotations

from collections.abc import Awaitable
from math import ceil
from time import monotonic

from handlers.context import Context, Peer
from relay.store.audience import Audience, refusal_error
from relay.wire.errors import RelayError
from relay.wire.frames import Typing
from relay.wire.limits import Limit


def typing(ctx: Context, peer: Peer, op: Typing) -> Awaitable[None] | None:
    """Tells the others what has changed. Waits only for members that are not cached. Raises RelayError."""
    wait = ctx.typing_rates.take(peer.key, monotonic())
    if wait:
        raise RelayError(
            "rate_limited",
            f"typing too often; try again in {wait:.1f} s",
            retry_after=ceil(wait * 1000),
            limit=Limit.TYPING_RATE,
        )
    if not op.on:
        ctx.live.typing.end(peer, op.conv)
        return None
    audience = ctx.audiences.get(op.conv)
    if audience is None:
        return _begin_slowly(ctx, peer, op)
    _begin(ctx, peer, audience)
    return None


async def _begin_slowly(ctx: Context, peer: Peer, op: Typing) -> None:
    _begin(ctx, peer, await ctx.audiences.resolve(op.conv))


def _begin(ctx: Context, peer: Peer, audience: Audience) -> None:
    if peer.user not in audience.members:
        raise RelayError("not_member", "no such conversation")
    refusal = audience.refusals.get(peer.user)
    # It is stored nowhere: a full mailbox has room for it.
    if refusal is not None and refusal[0] != "mailbox_full":
        raise refusal_error(refusal)
    if ctx.hub.get(peer.key) is peer:
        ctx.live.typing.begin(peer, audience)
