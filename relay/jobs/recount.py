"""Compares the books of all nodes with what waits in the store, when a recount is due and nothing moves, and corrects them.

What was counted is only comparable when nothing was booked meanwhile, at any node. Whether all is still is looked at first, which
costs two small reads; the messages are read only then, and what moved all the same makes it wait for longer each time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Final

import structlog

from relay.store.balances import RECOUNT_LEASE_SECONDS, Account, Balances
from relay.store.ledger import Ledger
from relay.store.messages import Messages
from relay.store.mongo import PyMongoError, brief
from relay.store.shards import Shards

_POLLS_A_BEAT: Final = 4
_MISSED_BEATS: Final = 2.5
_PATIENCE_BEATS: Final = 6
_COUNT_SECONDS: Final = 30.0
_LATEST_SECONDS: Final = RECOUNT_LEASE_SECONDS - 10
_FIRST_PAUSE_BEATS: Final = 2
_LAST_PAUSE_SECONDS: Final = 300.0

log = structlog.get_logger(__name__)

Still = Mapping[str, Account]


class Recount:
    """``own`` tells the account of this node."""

    def __init__(
        self,
        ledger: Ledger,
        messages: Messages,
        shards: Shards,
        balances: Balances,
        own: Callable[[], str],
    ) -> None:
        self._ledger = ledger
        self._messages = messages
        self._shards = shards
        self._balances = balances
        self._own = own
        self._first_pause = _FIRST_PAUSE_BEATS * balances.pace.beat
        self._pause = self._first_pause
        self._not_before = 0.0
        self._before: Still | None = None

    async def run(self) -> None:
        """One look, and the recount when it is due and all is still. Raises PyMongoError."""
        if monotonic() < self._not_before:
            return
        token = await self._balances.recount_due()
        before, self._before = self._before, None
        if token is None:
            self._pause = self._first_pause
            return
        still = await self._look()
        if still is None:
            return
        if before is None or not _same(before, still) or not _beaten(before, still, 1):
            kept = before is not None and _same(before, still)
            self._before = before if kept else still
            return
        own = self._own()
        began = monotonic()
        if not await self._balances.claim_recount(own, token):
            return
        corrected = False
        try:
            corrected = await self._correct(still, began)
        finally:
            if not corrected:
                self._not_before = monotonic() + self._pause
                self._pause = min(2 * self._pause, _LAST_PAUSE_SECONDS)
            await self._balances.end_recount(own, token if corrected else None)

    async def _correct(self, before: Still, began: float) -> bool:
        """Whether the books are right now."""
        if self._shards.down:
            return False
        try:
            waiting = await self._messages.count_waiting(seconds=_COUNT_SECONDS)
        except PyMongoError as error:
            log.warning("the books are compared with the store later", error=brief(error))
            return False
        if self._shards.down or not await self._was_still(before):
            return False
        wrong = waiting - sum(account.books.balance for account in before.values())
        if monotonic() - began > _LATEST_SECONDS:
            return False
        self._ledger.carry(wrong)
        if wrong:
            log.info("the books were corrected", deliveries=wrong, waiting=waiting, nodes=len(before))
        return True

    async def _was_still(self, before: Still) -> bool:
        """Whether nothing had been booked until now. The second word of a node from now on is one that it began to say after now."""
        beat = self._balances.pace.beat
        first = await self._look()
        if first is None or not _same(before, first):
            return False
        patience = monotonic() + _PATIENCE_BEATS * beat
        while monotonic() < patience:
            await asyncio.sleep(beat / _POLLS_A_BEAT)
            now = await self._look()
            if now is None or not _same(before, now):
                return False
            if _beaten(first, now, 2):
                return True
        return False

    async def _look(self) -> Still | None:
        """All accounts, when each is of a node that lives and has nothing under way; None otherwise."""
        most = _MISSED_BEATS * self._balances.pace.beat
        accounts = await self._balances.all()
        for one in accounts:
            if one.left or one.taken_by or one.books.took or not one.books.quiet or one.silent > most:
                return None
        if await self._balances.is_opening():
            return None
        return {one.id: one for one in accounts}


def _same(before: Still, after: Still) -> bool:
    """The same nodes, and none has booked anything in between."""
    return before.keys() == after.keys() and all(
        before[name].books.turnover == after[name].books.turnover for name in before
    )


def _beaten(before: Still, after: Still, beats: int) -> bool:
    return all(after[name].beats - before[name].beats >= beats for name in before)
