"""Who may come in: a valid token, a known user and device (or one that may be created)."""

from __future__ import annotations

from time import monotonic
from typing import Final

from handlers.context import Context
from relay.session.tokens import Identity, TokenError, Verifier
from relay.store.accounts import Arrival
from relay.store.mongo import PyMongoError
from relay.wire.errors import RelayError
from relay.wire.ids import device_key

_REMEMBERED_SECONDS: Final = 300
_MAX_REMEMBERED: Final = 100_000


class Admission:
    """Verifies tokens and notes arrivals. Over HTTP an arrival is written at most once in five minutes."""

    def __init__(self, ctx: Context, verifier: Verifier) -> None:
        self._ctx = ctx
        self._verifier = verifier
        self._remembered: dict[str, float] = {}

    def verify(self, token: str) -> Identity:
        """The token's identity. Raises RelayError ``unauthorized``."""
        try:
            return self._verifier.verify(token)
        except TokenError as error:
            raise RelayError("unauthorized", str(error)) from None

    async def arrive(self, identity: Identity) -> Arrival:
        """Notes that a device connects. When it is new, or back from inactivity, it counts as a recipient from here on:
        nothing resolved without it is still on its way. Raises RelayError ``unauthorized``."""
        ctx = self._ctx
        try:
            arrival = await ctx.accounts.arrive(identity.user, identity.device, provision=ctx.provision)
        except PyMongoError:
            # It may have arrived all the same: nobody knows.
            ctx.audiences.changed(user=identity.user)
            raise
        if arrival is None:
            raise RelayError("unauthorized", "this user or device is not known here")
        if arrival.changed:
            ctx.audiences.changed(user=identity.user)
            await ctx.sends.barrier()
        return arrival

    async def admit(self, token: str) -> Identity:
        """For HTTP: verifies and notes the arrival. Raises RelayError ``unauthorized``."""
        identity = self.verify(token)
        key = device_key(identity.user, identity.device)
        now = monotonic()
        if self._remembered.get(key, 0) < now:
            await self.arrive(identity)
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = now + _REMEMBERED_SECONDS
        return identity


def bearer(header: str | None) -> str | None:
    """The token of an ``Authorization`` header, or None when there is no such header. Raises RelayError
    ``unauthorized`` for another scheme (RFC 6750 2.1)."""
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise RelayError("unauthorized", "the Authorization header must be: Bearer <token>")
    return token.strip()
