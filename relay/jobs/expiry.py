"""Ends messages that are past their time: fate on record, counted, deleted. The TTL indexes are the safety net."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final

from relay.store.lanes import EndingLanes
from relay.store.messages import Messages

_PAGE: Final = 1000
_GIVE_UP_SECONDS: Final = 30.0


class Expiry:
    """Expires whatever is due, page by page."""

    def __init__(self, messages: Messages, endings: EndingLanes, now: Callable[[], int]) -> None:
        self._messages = messages
        self._endings = endings
        self._now = now

    async def run(self) -> None:
        """One round: until nothing is due."""
        before: list[str] = []
        while due := await self._messages.due(self._now(), _PAGE):
            # A page that comes twice holds nothing but documents that are no messages; MongoDB's own time to live ends them.
            if due == before:
                return
            before = due
            if not await self._endings.remove(due, "expired", deadline=monotonic() + _GIVE_UP_SECONDS):
                return
