"""Tells that members or devices have changed, and waits until nothing resolved before can still be committed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Final

from relay.metrics import Metrics
from relay.routing.bus import Bus
from relay.routing.hints import Changed
from relay.store.audience import LEASE_SECONDS, Audiences
from relay.store.gatherer import Gatherer, GathererClosed, GathererFull
from relay.store.lanes import SendLanes
from relay.store.mongo import PyMongoError
from relay.store.peers import Peers
from relay.tasks import ended

_MOST: Final = 250
_QUEUE: Final = 50_000
# A group may take as long as its lease; so many of them are under way then at most.
_PATIENCE: Final = 0.1
_BESIDE: Final = 100

_Change = tuple[list[str], list[str]]


class Invalidation:
    """This node forgets at once. Other nodes are told over the bus and confirm; while any does not, its leases run out first.
    Changes that come together are told together. ``commit_seconds`` is the time limit of one commit; ``lease`` (s) how long
    others are waited for."""

    def __init__(
        self,
        audiences: Audiences,
        sends: SendLanes,
        peers: Peers,
        bus: Bus,
        metrics: Metrics,
        *,
        commit_seconds: float,
    ) -> None:
        self._bus = bus
        self._audiences = audiences
        self._sends = sends
        self._peers = peers
        self.lease = LEASE_SECONDS + commit_seconds
        self._unconfirmed: list[Changed] = []
        self._confirming: asyncio.Task[None] | None = None
        self._closed = False
        self._changes: Gatherer[_Change, bool] = Gatherer(
            "changes",
            self._tell,
            metrics=metrics,
            most=_MOST,
            queue=_QUEUE,
            patience=_PATIENCE,
            beside=_BESIDE,
        )

    async def tell(self, *, conversations: Iterable[str] = (), users: Iterable[str] = ()) -> None:
        """The members of these conversations, or the devices, blocks or preferences of these users, have changed. When
        this returns, every message committed from now on goes to recipients resolved after the change."""
        changed, of = list(conversations), list(users)
        self.forget(changed, of)
        over = monotonic() + self.lease
        # Of these alone: what hangs because its shard does not answer holds up the changes that concern it.
        settled, _ = await asyncio.gather(self._asked(changed, of), self._sends.barrier(changed, of))
        if not settled:
            await asyncio.sleep(max(0.0, over - monotonic()))

    async def _asked(self, conversations: list[str], users: list[str]) -> bool:
        try:
            # What is asked from here on is asked after the change, and after this node has forgotten.
            return await self._changes.answer((conversations, users))
        except (GathererFull, GathererClosed):
            return False

    async def _tell(self, changes: Sequence[_Change]) -> list[bool]:
        """Whether nobody else can still believe what was before these changes."""
        conversations = list(dict.fromkeys(one for its, _ in changes for one in its))
        users = list(dict.fromkeys(one for _, its in changes for one in its))
        return [await self._settled(conversations, users)] * len(changes)

    def forget(self, conversations: Iterable[str], users: Iterable[str]) -> None:
        """Believes no more what was resolved of these."""
        for conversation in conversations:
            self._audiences.changed(conversation=conversation)
        for user in users:
            self._audiences.changed(user=user)

    def take(self, changed: Changed) -> None:
        """Another node tells of a change: it is confirmed when nothing resolved before is being committed any more."""
        self.forget(changed.conversations, changed.users)
        self._unconfirmed.append(changed)
        if self._confirming is None:
            self._confirming = asyncio.create_task(self._confirm(), name="confirm changes")

    async def _confirm(self) -> None:
        try:
            while self._unconfirmed:
                # One look for all that has gathered.
                changes, self._unconfirmed = self._unconfirmed, []
                late = await self._sends.late()
                numbers: dict[str, list[int]] = {}
                for changed in changes:
                    attempts = late and self._sends.concerned(late, changed.conversations, changed.users)
                    if attempts:
                        self._hold(changed, attempts)
                    else:
                        numbers.setdefault(changed.node, []).append(changed.number)
                for node, its in numbers.items():
                    self._bus.confirm(node, its)
        finally:
            self._confirming = None

    def _hold(self, changed: Changed, attempts: Sequence[asyncio.Future[None]]) -> None:
        """Confirms it when these are over: within the time limit of a commit."""
        left = len(attempts)

        def over(_: asyncio.Future[None]) -> None:
            nonlocal left
            left -= 1
            if not left and not self._closed:
                self._bus.confirm(changed.node, [changed.number])

        for attempt in attempts:
            attempt.add_done_callback(over)

    async def close(self) -> None:
        """Tells and confirms nothing more."""
        self._closed = True
        await self._changes.close()
        if self._confirming is not None:
            await ended([self._confirming])

    async def _settled(self, conversations: list[str], users: list[str]) -> bool:
        """Whether no other node can believe what was before, or all have confirmed."""
        try:
            others = await self._peers.leasing()
            return not others or await self._bus.invalidate(others, conversations, users, self.lease)
        except PyMongoError:
            # Nobody knows; what may be true is taken for true.
            return False
