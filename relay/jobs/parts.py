"""What a crash leaves of messages that are stored in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from relay.store.lanes import EndingLanes
from relay.store.messages import Messages

_PAGE: Final = 1000
_LATE: Final = 5


class Parts:
    """Removes claims, with their parts, that never became messages in ``claim_seconds``, and parts that came when their claim
    was gone; ends messages whose last part ended unseen. Every round is bounded; the next one goes on."""

    def __init__(
        self, messages: Messages, endings: EndingLanes, now: Callable[[], int], *, claim_seconds: float = 60
    ) -> None:
        self._messages = messages
        self._endings = endings
        self._now = now
        self._claim_ms = int(claim_seconds * 1000)
        self._after = 0

    async def run(self) -> None:
        """One round."""
        await self._messages.heads.clear_claims(self._now() - self._claim_ms)
        # Long after: a writer may be as late as it takes to give up.
        await self._messages.heads.remove_orphans(self._now() - _LATE * self._claim_ms)
        heads, self._after = await self._messages.heads.waiting_for_parts(_PAGE, self._after)
        if heads:
            await self._endings.end_heads(heads)
