"""Tells that members or devices have changed, and waits until nothing resolved before can still be committed."""

from __future__ import annotations

from collections.abc import Iterable

from relay.store.audience import Audiences
from relay.store.commits import Commits


class Invalidation:
    """A node without Redis is alone: its own cache is all there is to tell."""

    def __init__(self, audiences: Audiences, commits: Commits) -> None:
        self._audiences = audiences
        self._commits = commits

    async def tell(self, *, conversations: Iterable[str] = (), users: Iterable[str] = ()) -> None:
        """The members of these conversations, or the devices, blocks or preferences of these users, have changed. When
        this returns, every message committed from now on goes to recipients resolved after the change."""
        for conversation in conversations:
            self._audiences.changed(conversation=conversation)
        for user in users:
            self._audiences.changed(user=user)
        await self._commits.barrier()
