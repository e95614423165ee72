"""Follows what people have changed at other nodes, when nobody could tell this one."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from relay.routing.hub import Hub
from relay.store.people import People
from relay.wire.clock import utc_now

# Longer than a connection takes to come up, and than clocks of nodes differ.
_WINDOW: Final = timedelta(seconds=60)


class Preferences:
    """Whether others are told what somebody's devices have received: one indexed query a round, for what changed within the
    last minute, and since a minute before the last round that the store answered."""

    def __init__(self, hub: Hub, people: People) -> None:
        self._hub = hub
        self._people = people
        self._looked = utc_now()

    async def run(self) -> None:
        """One look."""
        now = utc_now()
        # A clock that was set back must not have its future skipped.
        since = min(now, self._looked) - _WINDOW
        async for user, quiet, moment in self._people.receipts_changed_since(since):
            self._hub.set_quiet(user, quiet, moment)
        self._looked = now
