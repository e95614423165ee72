"""Keeps this node's books among the other nodes': opened, published, handed over, and those of nodes that are gone carried on.

Summed over the nodes that live, what the books say waits is what waits in the store, but for the moments in which a balance
changes hands.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final

import structlog

from relay.store.balances import Account, Balances, Books
from relay.store.ledger import Ledger
from relay.store.messages import Messages
from relay.store.mongo import PyMongoError, brief
from relay.store.place import runs
from relay.store.shards import Shards
from relay.tasks import ended
from relay.wire.ids import new_id

_POLL_SECONDS: Final = 0.1
# A node of another machine that has not beaten for so many beats is dead, for one that starts.
_BEATS_TO_WATCH: Final = 2.5
_AT_ONCE: Final = 20
# Nobody works on what was claimed so many lives ago.
_STUCK: Final = 6

log = structlog.get_logger(__name__)


class BookKeeper:
    """``open`` before this node takes messages, ``run`` every beat, ``leave`` when nothing more is booked. ``settled`` tells whether
    nothing is under way that will be booked."""

    def __init__(
        self,
        ledger: Ledger,
        messages: Messages,
        shards: Shards,
        balances: Balances,
        settled: Callable[[], bool],
    ) -> None:
        self.id = new_id()
        """Of this node's account: another one when it was taken for dead and has come back."""
        self._ledger = ledger
        self._messages = messages
        self._shards = shards
        self._balances = balances
        self._settled = settled
        self._entered = False
        self._published = 0
        self._took: set[str] = set()
        self._steady_since = self._last = float("-inf")

    # -- a start ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """The first node opens its books with what the store holds, one that joins others with nothing. Nodes that start at once
        do so one after the other. Raises PyMongoError."""
        # A node that was killed a moment ago is no company. Where its process cannot be seen, its beats are waited for.
        dead = await self._watch()
        await self._wait_for_turn()
        keeping = asyncio.create_task(self._keep_turn(), name="books opening")
        try:
            accounts = await self._balances.all()
            if any(self._may_live(account) and account.id not in dead for account in accounts):
                await self._enter()
            else:
                await self._open_alone(accounts)
        finally:
            await ended([keeping])
            kept = await self._balances.end_turn(self.id)
        if not kept:
            # It took so long that another may have opened as the first one too.
            await self._balances.note_recount()

    async def _open_alone(self, remains: Sequence[Account]) -> None:
        complete = not self._shards.down
        due = await self._balances.recount_due()
        self._ledger.open(await self._messages.count_waiting())
        await self._enter()
        await self._balances.forget([account.id for account in remains])
        if not complete or self._shards.down:
            await self._balances.note_recount()
        else:
            await self._balances.end_recount(self.id, due)

    async def _wait_for_turn(self) -> None:
        gone: str | None = None
        while True:
            holder, place = await self._balances.take_turn(self.id, gone)
            if holder == self.id:
                return
            gone = holder if runs(place) is False else None
            if gone is None:
                await asyncio.sleep(_POLL_SECONDS)

    async def _keep_turn(self) -> None:
        while True:
            await asyncio.sleep(self._balances.pace.beat)
            try:
                await self._balances.take_turn(self.id)
            except PyMongoError as error:
                log.debug("the turn to open is not kept up", error=brief(error))

    async def _watch(self) -> set[str]:
        """The accounts of nodes that do not beat, though they were heard of a moment ago, when no other node lives."""
        pace = self._balances.pace
        silent: dict[str, int] = {}
        for account in await self._balances.all():
            if not self._may_live(account):
                continue
            if runs(account.place):
                return set()
            silent[account.id] = account.beats
        until = monotonic() + _BEATS_TO_WATCH * pace.beat
        while silent and monotonic() < until:
            await asyncio.sleep(_POLL_SECONDS)
            for account in await self._balances.all():
                if self._may_live(account) and account.beats != silent.get(account.id):
                    return set()
        return set(silent)

    def _may_live(self, account: Account) -> bool:
        silent = account.silent >= self._balances.pace.alive
        return not account.left and not silent and runs(account.place) is not False

    # -- while it lives --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """One beat. Raises PyMongoError."""
        await self._note_mistrust()
        if await self._publish():
            await self._take_over()

    async def leave(self) -> None:
        """Hands the books over to whoever lives. Raises PyMongoError."""
        await self._note_mistrust()
        if not self._settled():
            # What came of it nobody will book.
            await self._balances.note_recount()
        await self._publish(left=True)

    async def _note_mistrust(self) -> None:
        if self._ledger.mistrusted:
            await self._balances.note_recount()
            self._ledger.mistrusted = False

    async def _publish(self, *, left: bool = False) -> bool:
        """Whether this account is still this node's."""
        books = self._books()
        if self._entered and await self._balances.publish(self.id, books, left=left):
            self._published = books.balance
            now = monotonic()
            if now - self._last >= self._balances.pace.alive:
                self._steady_since = now
            self._last = now
            return True
        await self._come_back()
        if left:
            await self._balances.publish(self.id, self._books(), left=True)
        return False

    async def _come_back(self) -> None:
        """Another node has taken this one for dead, and carries on what it had published: here that no longer counts."""
        if self._entered:
            await self._balances.note_recount()
            self._entered = False
            self._ledger.carry(-self._published)
            self._published = 0
            self._took.clear()
            self.id = new_id()
            log.warning("this node was taken for dead; its books begin anew, and a recount is due")
        await self._enter()

    async def _enter(self) -> None:
        books = self._books()
        await self._balances.enter(self.id, books)
        self._entered = True
        self._published = books.balance

    def _books(self) -> Books:
        ledger = self._ledger
        return Books(ledger.waiting, ledger.turnover, self._settled(), sorted(self._took))

    async def _take_over(self) -> None:
        """Carries on the books of nodes that have left, and of those that have vanished."""
        if not self._took and not await self._balances.any_remains():
            return
        accounts = await self._balances.all()
        ids = {account.id for account in accounts}
        for account in accounts:
            if len(self._took) >= _AT_ONCE:
                break
            if account.id == self.id:
                continue
            if account.taken_by == self.id or self._may_take(account, ids):
                await self._take(account)
        # What this one has claimed counts as taken when others see it in its own balance.
        if self._took and await self._publish():
            await self._balances.forget(self._took)
            self._took.clear()

    def _may_take(self, account: Account, ids: set[str]) -> bool:
        pace = self._balances.pace
        if account.taken_by in ids and account.silent < _STUCK * pace.alive:
            # Its taker goes on, or whoever takes that one's books looks at this one first.
            return False
        if account.left:
            return True
        # After an outage everybody must have had the time to say that they live.
        return account.silent >= pace.alive and self._last - self._steady_since >= pace.alive

    async def _take(self, account: Account) -> None:
        if account.taken_by != self.id:
            if not account.left or account.taken_by is not None:
                # What it counted since it last spoke is lost; or its taker died, after nobody knows what.
                await self._balances.note_recount()
            claimed = await self._balances.claim(account, self.id)
            if claimed is None:
                return
            account = claimed
        await self._balances.forget(account.books.took)
        if account.id in self._took:
            return
        self._took.add(account.id)
        self._ledger.carry(account.books.balance)
        log.info(
            "the books of another node are carried on",
            balance=account.books.balance,
            why="it left" if account.left else "it vanished; a recount is due",
        )
