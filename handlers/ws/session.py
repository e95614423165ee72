"""``ping`` and ``auth``: the connection itself."""

from __future__ import annotations

from handlers.context import Context, Peer
from relay.wire import replies
from relay.wire.frames import Auth, Ping


def ping(ctx: Context, peer: Peer, op: Ping) -> None:
    """Answers with the relay's time."""
    peer.outbox.put(replies.pong(ctx.clock.now(), op.ref))


async def auth(_: Context, peer: Peer, op: Auth) -> None:
    """Renews the token of this connection; it is closed when its device may not be here any more. Raises RelayError
    ``unauthorized``."""
    expires = await peer.renew(op.token)
    if expires is not None:
        peer.outbox.put(replies.authed(expires, op.ref))
