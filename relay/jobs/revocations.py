"""Closes the connections of devices whose tokens were revoked, and of users who were suspended or are being erased: on
another node, or while they were connecting."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from relay.routing.hub import Hub
from relay.store.accounts import Accounts
from relay.wire import errors
from relay.wire.clock import utc_now

# Longer than a connection takes to come up, and than clocks of nodes differ.
_WINDOW: Final = timedelta(seconds=60)


class Revocations:
    """Three indexed queries a round: what ended within the last minute, and since a minute before the last round that the
    store answered, however long it was silent."""

    def __init__(self, hub: Hub, accounts: Accounts) -> None:
        self._hub = hub
        self._accounts = accounts
        self._known: dict[str, int | None] = {}
        self._looked = utc_now()

    async def run(self) -> None:
        """One look."""
        now = utc_now()
        # A clock that was set back must not have its future skipped.
        since = min(now, self._looked) - _WINDOW
        known: dict[str, int | None] = {}
        async for key, standing in self._accounts.ended_since(since):
            known[key] = standing.ended
            if self._known.get(key, 0) != standing.ended:
                self._accounts.forget(key)
            connection = self._hub.get(key)
            if connection is not None and not standing.accepts(connection.issued, connection.session):
                connection.shut(errors.UNAUTHORIZED)
        self._known = known
        # A token can be newer than the end of its device: then it is its user who may not be here.
        async for user in self._accounts.barred_since(since):
            for connection in self._hub.of_user(user):
                self._accounts.forget(connection.key)
                connection.shut(errors.UNAUTHORIZED)
        self._looked = now
