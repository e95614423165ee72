"""``presence``: whom the user watches."""

from __future__ import annotations

from collections.abc import Callable

from handlers.context import Context, Peer
from relay.wire import replies
from relay.wire.errors import RelayError
from relay.wire.frames import Presence
from relay.wire.limits import Limit


async def presence(ctx: Context, peer: Peer, op: Presence) -> None:
    """Replaces the watch list of this connection. A frame for each follows, then ``done`` when the operation has a ``ref``.
    Raises RelayError."""
    if len(op.users) > ctx.limits.watches:
        raise RelayError(
            "too_large",
            f"at most {ctx.limits.watches} people are watched, these are {len(op.users)}",
            limit=Limit.WATCHES,
        )
    await ctx.rates.check("presence", peer.user)
    if ctx.hub.get(peer.key) is peer:
        ctx.live.presence.watch(peer, op.users, _answer(peer, op.ref))


def _answer(peer: Peer, ref: str | None) -> Callable[[], None] | None:
    return None if ref is None else lambda: peer.outbox.put(replies.done(ref))
