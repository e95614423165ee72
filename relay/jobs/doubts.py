"""What was given up while its outcome was unknown: found out later, booked, and delivered."""

from __future__ import annotations

from relay.store.lanes import EndingLanes, SendLanes


class Doubts:
    """Asks the store what became of messages and acknowledgements that ran over their deadline."""

    def __init__(self, sends: SendLanes, endings: EndingLanes) -> None:
        self._sends = sends
        self._endings = endings

    async def run(self) -> None:
        """One look."""
        try:
            await self._sends.settle_given_up()
        finally:
            await self._endings.settle_doubts()
