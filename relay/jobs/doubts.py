"""What was given up while its outcome was unknown: found out later, booked, and delivered."""

from __future__ import annotations

from relay.store.acks import Acks
from relay.store.lanes import SendLanes


class Doubts:
    """Asks the store what became of messages and acknowledgements that ran over their deadline."""

    def __init__(self, sends: SendLanes, acks: Acks) -> None:
        self._sends = sends
        self._acks = acks

    async def run(self) -> None:
        """One look."""
        await self._sends.settle_given_up()
        await self._acks.settle_doubts()
