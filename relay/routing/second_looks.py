"""Watched people who may be online at other nodes, looked up again now and then.

A node tells the others who comes and goes. That may be lost: with Redis, or with the node that should have told it. So every
node asks the directory itself, about the people whom somebody watches here, at a pace that does not depend on how many
they are.
"""

from __future__ import annotations

import asyncio
import random
from itertools import islice
from time import monotonic
from typing import Final

from relay.routing.bus import Bus
from relay.routing.presence import Presence

ROUND_SECONDS: Final = 30.0
"""From the end of one round to the next; as long as a node takes at most to renew all its lines in the directory."""
_AT_ONCE: Final = 250
_PAUSE_SECONDS: Final = 0.1
# Nodes whose Redis is back have entered their connections again by then.
_ENTERED_SECONDS: Final = 5.0
_SPREAD_SECONDS: Final = 3.0


class SecondLooks:
    """Corrects what watchers of this node were told. Who was online and is missing from the directory is gone when they are
    missing in two rounds, as what an emptied Redis has forgotten is entered again in between; after ``hurry`` and ``died``
    the first counts."""

    def __init__(self, presence: Presence, bus: Bus) -> None:
        self._presence = presence
        self._bus = bus
        self._due = monotonic() + ROUND_SECONDS
        self._sure = False
        self._missing: set[str] = set()

    def hurry(self) -> None:
        """Redis is back: a round as soon as all nodes should be in the directory again."""
        if not self._sure:
            self._due = monotonic() + _ENTERED_SECONDS + random.uniform(0, _SPREAD_SECONDS)
            self._sure = True

    def died(self) -> None:
        """Another node is known to be dead, or lives after all: a round now."""
        if not self._sure:
            self._due = monotonic()
            self._sure = True

    async def run(self) -> None:
        """A round, when one is due. Ends early while other nodes cannot be asked."""
        if monotonic() < self._due:
            return
        self._due = monotonic() + ROUND_SECONDS
        sure, self._sure = self._sure, False
        missing: set[str] = set()
        for online in (True, False):
            rest = iter(self._presence.watched_users(online=online))
            while users := list(islice(rest, _AT_ONCE)):
                if not await self._look(users, missing, sure):
                    return
                await asyncio.sleep(_PAUSE_SECONDS)
        self._missing = missing
        if not self._sure:
            self._due = monotonic() + ROUND_SECONDS * random.uniform(1.0, 1.1)

    async def _look(self, users: list[str], missing: set[str], sure: bool) -> bool:
        presence = self._presence
        away = [user for user in users if not presence.online(user)]
        if not away:
            return True
        found = await self._bus.online(away)
        if found is None or not self._bus.tells:
            return False
        wrong: list[str] = []
        for user in away:
            if user in found:
                if not presence.thought_online(user):
                    wrong.append(user)
            elif presence.thought_online(user):
                missing.add(user)
                if sure or user in self._missing:
                    wrong.append(user)
        presence.changed_elsewhere((user, 0) for user in wrong)
        return True
