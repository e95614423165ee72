"""Who may come in: a valid token, a known user and device (or one that may be created)."""

from __future__ import annotations

from time import monotonic
from typing import Final

from handlers.context import Context
from relay.security.tokens import Identity, TokenError, Verifier
from relay.store.accounts import Arrival
from relay.store.arrivals import Arrivals
from relay.store.arriving import Arriving
from relay.store.mongo import PyMongoError
from relay.wire.errors import RelayError
from relay.wire.ids import device_key

_SEEN_SECONDS: Final = 300
_MAX_SEEN: Final = 100_000
# A revocation holds on every node within five seconds; nodes look for it every two, and ask by themselves after this.
_STANDING_SECONDS: Final = 4.0

_REFUSED: Final = "this user or device is not known here, or its session has ended"


class Admission:
    """Verifies tokens, asks whether their devices are still in good standing, and notes arrivals. Over HTTP the standing is
    at most a few seconds old, and an arrival is written at most once in five minutes."""

    def __init__(self, ctx: Context, verifier: Verifier) -> None:
        self._ctx = ctx
        self._verifier = verifier
        self._arrivals = Arrivals(ctx.accounts, ctx.audit, ctx.metrics)
        self._seen: dict[str, float] = {}

    def verify(self, token: str) -> Identity:
        """The token's identity. Raises RelayError ``unauthorized``."""
        try:
            return self._verifier.verify(token)
        except TokenError as error:
            raise RelayError("unauthorized", str(error)) from None

    async def arrive(self, identity: Identity, *, address: str, agent: str, live: bool = False) -> Arrival:
        """Notes that a device connects from ``address`` with ``agent``, ``live`` by a WebSocket. When it is new, or back from inactivity or removal, it counts as a recipient from
        here on: nothing resolved without it is still on its way. Raises RelayError ``unauthorized``, and ``unavailable`` when too
        many come at once or the audit trail, in which a new device is first, cannot be written."""
        ctx = self._ctx
        try:
            arrival = await self._arrivals.arrive(
                Arriving(
                    user=identity.user,
                    device=identity.device,
                    provision=ctx.provision,
                    issued=identity.issued,
                    session=identity.session,
                    live=live,
                    address=address,
                    agent=agent,
                )
            )
        except PyMongoError:
            # It may have arrived all the same: nobody knows.
            ctx.audiences.changed(user=identity.user)
            raise
        if arrival is None:
            raise RelayError("unauthorized", _REFUSED)
        key = device_key(identity.user, identity.device)
        if arrival.returned:
            ctx.accounts.forget(key)
            await ctx.keys.forget(key)
        if arrival.full:
            ctx.quotas.recount([key])
        if arrival.changed:
            await ctx.invalidation.tell(users=[identity.user])
        return arrival

    async def close(self) -> None:
        """Nobody comes in any more."""
        await self._arrivals.close()

    async def admit(self, token: str, *, address: str, agent: str) -> Identity:
        """For HTTP: verifies, and notes the arrival from ``address`` with ``agent``. Raises RelayError ``unauthorized``."""
        identity = self.verify(token)
        key = device_key(identity.user, identity.device)
        now = monotonic()
        if self._seen.get(key, 0) < now or not await self._in_good_standing(identity):
            await self.arrive(identity, address=address, agent=agent)
            if len(self._seen) >= _MAX_SEEN:
                self._seen.clear()
            self._seen[key] = now + _SEEN_SECONDS
        return identity

    async def is_good(self, identity: Identity) -> bool:
        """Whether this token is good at this moment, for a device that has arrived. Asks the store; raises what it
        raises."""
        standing = await self._ctx.accounts.standing(identity.user, identity.device)
        return standing is not None and standing.accepts(identity.issued, identity.session)

    async def _in_good_standing(self, identity: Identity) -> bool:
        accounts = self._ctx.accounts
        for seconds in (_STANDING_SECONDS, 0.0):
            # What is remembered may be older than the token.
            standing = await accounts.standing(identity.user, identity.device, within=seconds)
            if standing is not None and standing.accepts(identity.issued, identity.session):
                return True
        return False


def bearer(header: str | None) -> str | None:
    """The token of an ``Authorization`` header, or None when there is no such header. Raises RelayError
    ``unauthorized`` for another scheme (RFC 6750 2.1)."""
    if header is None:
        return None
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise RelayError("unauthorized", "the Authorization header must be: Bearer <token>")
    return token.strip()
