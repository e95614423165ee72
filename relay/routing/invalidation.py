"""Tells that members or devices have changed, and waits until nothing resolved before can still be committed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from relay.store.audience import LEASE_SECONDS, Audiences
from relay.store.lanes import SendLanes
from relay.store.mongo import PyMongoError
from relay.store.peers import Peers


class Invalidation:
    """This node forgets at once. Other nodes are not told: while any lives, their leases run out first. ``commit_seconds``
    is the time limit of one commit; ``lease`` (s) how long others are waited for."""

    def __init__(
        self, audiences: Audiences, sends: SendLanes, peers: Peers, *, commit_seconds: float
    ) -> None:
        self._audiences = audiences
        self._sends = sends
        self._peers = peers
        self.lease = LEASE_SECONDS + commit_seconds

    async def tell(self, *, conversations: Iterable[str] = (), users: Iterable[str] = ()) -> None:
        """The members of these conversations, or the devices, blocks or preferences of these users, have changed. When
        this returns, every message committed from now on goes to recipients resolved after the change."""
        for conversation in conversations:
            self._audiences.changed(conversation=conversation)
        for user in users:
            self._audiences.changed(user=user)
        alone, _ = await asyncio.gather(self._alone(), self._sends.barrier())
        if not alone:
            await asyncio.sleep(self.lease)

    async def _alone(self) -> bool:
        try:
            return await self._peers.alone()
        except PyMongoError:
            # Nobody knows; what may be true is taken for true.
            return False
