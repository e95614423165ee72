"""What was given up while its outcome was unknown: found out later, booked, and delivered."""

from __future__ import annotations

from relay.store.acks import Acks
from relay.store.commits import Commits


class Doubts:
    """Asks the store what became of messages and acknowledgements that ran over their deadline."""

    def __init__(self, commits: Commits, acks: Acks) -> None:
        self._commits = commits
        self._acks = acks

    async def run(self) -> None:
        """One look."""
        await self._commits.settle_given_up()
        await self._acks.settle_doubts()
