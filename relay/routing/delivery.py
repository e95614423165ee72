"""Delivery to one connection: the credit window, and live or behind.

A delivered message is *in flight* until its acknowledgement is durable; a connection has credit for so many messages and
bytes in flight. While there is credit live messages are pushed. When there is none, while a backlog drains, or when the
outbox is full, the connection is *behind*: live messages are not queued in memory, they only mark it dirty, and the drain
reads them from the store. The drain always reads from the start, skipping what is in flight, never by a cursor: another
node may commit a lower ``seq`` later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, Protocol

import structlog

from relay.routing.outbox import Outbox
from relay.store.endings import Sole
from relay.store.messages import Page
from relay.store.mongo import PyMongoError, brief
from relay.tasks import ended
from relay.wire import replies
from relay.wire.envelope import Envelope
from relay.wire.ids import any_device_key, head_id

_FEW_SECONDS: Final = 0.05
_RETRY_SECONDS: Final = 0.5
_NOTHING: Final[AbstractSet[str]] = frozenset()

log = structlog.get_logger(__name__)


class Backlog(Protocol):
    """Where waiting messages are read from."""

    async def waiting(
        self, keys: Sequence[str], now: int, *, limit: int, max_bytes: int, exclude: Collection[str]
    ) -> Page:
        """The first messages that wait for these keys, without the ids in ``exclude``."""

    async def last_waiting(self, keys: Sequence[str]) -> int | None:
        """The highest ``seq`` that waits for these keys."""


def _nothing() -> None:
    return None


class InFlight:
    """One delivered message that is not durably acknowledged. ``sole`` when only this device awaited it; ``stored_id`` is the
    document that it waits in."""

    __slots__ = ("at", "size", "sole", "stored_id")

    def __init__(self, size: int, sole: Sole | None, at: int, stored_id: str) -> None:
        self.size = size
        self.sole = sole
        self.at = at
        self.stored_id = stored_id


class Delivery:
    """The deliveries of one connection. ``start`` begins with the backlog; ``drained`` is told once, ``broken``
    when a fault of ours has ended the drain, ``used_up`` whenever a live message finds no credit. Until it has drained for the
    first time what waits is read from ``first``, when there is one."""

    __slots__ = (
        "_backlog",
        "_broken",
        "_bytes",
        "_closed",
        "_count_behind",
        "_credit",
        "_dirty",
        "_drained",
        "_first",
        "_incomplete",
        "_initial",
        "_initial_count",
        "_key",
        "_keys",
        "_mark",
        "_marked",
        "_needs",
        "_now",
        "_outbox",
        "_read_to_mark",
        "_redelivered",
        "_task",
        "_told",
        "_used_up",
        "_window",
        "_window_bytes",
        "behind",
        "in_flight",
    )

    def __init__(
        self,
        user: str,
        key: str,
        outbox: Outbox,
        backlog: Backlog,
        *,
        window: int,
        window_bytes: int,
        now: Callable[[], int],
        behind: Callable[[int], None],
        drained: Callable[[], None],
        broken: Callable[[], None] = _nothing,
        used_up: Callable[[], None] = _nothing,
        first: Backlog | None = None,
    ) -> None:
        self.in_flight: dict[str, InFlight] = {}
        self.behind = True
        self._key = key
        self._keys = (key, any_device_key(user))
        self._outbox = outbox
        self._backlog = backlog
        self._first = first or backlog
        self._window = window
        self._window_bytes = window_bytes
        self._bytes = 0
        self._now = now
        self._count_behind = behind
        self._drained = drained
        self._broken = broken
        self._used_up = used_up
        self._dirty = True
        self._credit: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        # What waited at connect, for the honest `drained`: everything up to the mark.
        self._mark: int | None = None
        self._marked = False
        self._told = False
        self._redelivered = 0
        self._needs = 1
        self._read_to_mark = False
        self._incomplete = False
        self._initial: AbstractSet[str] = set()
        self._initial_count = 0

    def start(self) -> None:
        """Begins to deliver what waits. Call after the connection is registered: subscribe first, then drain."""
        self._count_behind(1)
        self._task = asyncio.create_task(self._drain(), name="drain")

    def push(self, envelope: Envelope) -> None:
        """Delivers a live message, or notes that there is one to read from the store."""
        if self.behind:
            self._dirty = True
        elif envelope.doc_id not in self.in_flight:
            credit = self._has_credit(envelope.size)
            if credit and not self._outbox.full:
                self._deliver(envelope)
            else:
                if not credit:
                    self._used_up()
                self.fall_behind()

    def fall_behind(self) -> None:
        """Something waits that was not pushed: the drain fetches it."""
        self._dirty = True
        if self.behind or self._closed:
            return
        self.behind = True
        self._count_behind(1)
        self._task = asyncio.create_task(self._drain(), name="drain")

    def complete(self) -> None:
        """A part of the store answers again: what waits there may not have been looked at."""
        if self._incomplete or self.behind:
            self.fall_behind()

    def release(self, doc_id: str) -> None:
        """The message, or the part of it, needs no credit any more: acknowledged durably, by whatever path, or gone."""
        doc_id = head_id(doc_id)
        found = self.in_flight.pop(doc_id, None)
        if found is None:
            return
        self._bytes -= found.size
        if not self._told:
            self._initial -= {doc_id}
            self._tell_drained()
        self.has_room()

    def redeliver(self, doc_ids: Iterable[str]) -> None:
        """The acknowledgement of these did not become durable: they are delivered again on this connection."""
        for doc_id in map(head_id, doc_ids):
            found = self.in_flight.pop(doc_id, None)
            if found is not None:
                self._bytes -= found.size
                if doc_id in self._initial:
                    self._initial -= {doc_id}
                    self._initial_count -= 1
        self._read_to_mark = False
        self._redelivered += 1
        self.fall_behind()
        self.has_room()

    @property
    def starved(self) -> bool:
        """Whether more waits, and only what is in flight keeps it back."""
        return self.behind and self._credit is not None and bool(self.in_flight) and not self._outbox.full

    @property
    def under_way(self) -> bool:
        """Whether anything is in flight, or waits to be read from the store."""
        return self.behind or bool(self.in_flight)

    def holds(self, stored_ids: AbstractSet[str]) -> bool:
        """Whether all of these documents are in flight."""
        return all(head_id(stored_id) in self.in_flight for stored_id in stored_ids)

    def has_room(self) -> None:
        """Wakes a drain that waits for credit or for the outbox."""
        credit, self._credit = self._credit, None
        if credit is not None and not credit.done():
            credit.set_result(None)

    async def close(self) -> None:
        """Ends the drain and forgets what is in flight; it waits in the store."""
        self._closed = True
        task, self._task = self._task, None
        if task is not None:
            await ended([task])
        if self.behind:
            self.behind = False
            self._count_behind(-1)
        self.in_flight.clear()
        self._bytes = 0

    def _has_credit(self, size: int) -> bool:
        if not self.in_flight:
            return True
        return len(self.in_flight) < self._window and self._bytes + size <= self._window_bytes

    def _deliver(self, envelope: Envelope) -> None:
        sole = None
        if not envelope.shared:
            sole = Sole(envelope.seq, envelope.user, envelope.device, envelope.at)
        self.in_flight[envelope.doc_id] = InFlight(envelope.size, sole, envelope.at, envelope.stored_id)
        self._bytes += envelope.size
        self._outbox.put(envelope.frame_for(self._key))

    async def _drain(self) -> None:
        try:
            while True:
                await self._wait_for_room()
                if await self._drain_page():
                    # No await since the query was found clean and exhausted: nothing can slip between.
                    self.behind = False
                    self._count_behind(-1)
                    return
        except asyncio.CancelledError:
            raise
        except Exception:
            # A connection that will never be live again is worse than none: the device comes back and drains anew.
            log.exception("drain failed")
            self._broken()

    async def _set_mark(self, page: Page) -> None:
        """What waited at connect is the first page when that is all there was; else everything up to the highest ``seq``. Not
        known before the whole store answers."""
        if not page.complete:
            return
        if page.exhausted:
            found = page.envelopes[-1].seq if page.envelopes else None
        else:
            found = await self._first.last_waiting(self._keys)
        # What was counted before may have to come once more.
        self._mark = found if self._mark is None else max(self._mark, found or 0)
        self._marked = True
        self._read_to_mark = self._mark is None and not self._initial

    async def _wait_for_room(self) -> None:
        """Waits for a fair part of the window, so that pages are worth a query; a little credit is used soon too."""
        while self._outbox.full or not self._has_credit(self._needs):
            await self._woken()
        soon = asyncio.get_running_loop().time() + _FEW_SECONDS
        while self.in_flight and self._free() < self._window // 4:
            if not await self._woken(until=soon):
                return

    async def _woken(self, until: float | None = None) -> bool:
        """Waits for `has_room`, or until a time of the loop's clock. False when that has passed."""
        loop = asyncio.get_running_loop()
        self._credit = loop.create_future()
        timer = None if until is None else loop.call_at(until, self.has_room)
        try:
            await self._credit
        finally:
            if timer is not None:
                timer.cancel()
        return until is None or loop.time() < until

    def _free(self) -> int:
        return self._window - len(self.in_flight)

    async def _drain_page(self) -> bool:
        """Delivers one page. True when the connection is live now."""
        self._dirty = False
        redelivered = self._redelivered
        limit = max(1, self._free())
        backlog = self._backlog if self._told else self._first
        try:
            page = await backlog.waiting(
                self._keys,
                self._now(),
                limit=limit,
                max_bytes=max(1, self._window_bytes - self._bytes),
                exclude=[one.stored_id for one in self.in_flight.values()],
            )
            if not self._marked:
                await self._set_mark(page)
        except PyMongoError as error:
            log.warning("backlog cannot be read", error=brief(error))
            await asyncio.sleep(_RETRY_SECONDS)
            return False
        for envelope in page.envelopes:
            if envelope.doc_id in self.in_flight:
                continue
            if not self._has_credit(envelope.size):
                self._needs = envelope.size
                return False
            self._needs = 1
            self._deliver(envelope)
            if not self._told and self._waited_at_connect(envelope.seq):
                self._initial |= {envelope.doc_id}
                self._initial_count += 1
        if not self._told:
            past = bool(page.envelopes) and self._mark is not None and page.envelopes[-1].seq > self._mark
            # A query that left out what must come again now has not seen all up to the mark.
            if page.complete and (page.exhausted or past) and redelivered == self._redelivered:
                self._read_to_mark = True
            self._tell_drained()
        self._incomplete = not page.complete
        return page.exhausted and not self._dirty

    def _waited_at_connect(self, seq: int) -> bool:
        if not self._marked:
            # While a part of the store is away nobody knows what waited: all that is read counts.
            self._mark = seq if self._mark is None else max(self._mark, seq)
            return True
        return self._mark is not None and seq <= self._mark

    def _tell_drained(self) -> None:
        if self._told or not self._read_to_mark or self._initial:
            return
        self._told = True
        self._initial = _NOTHING
        self._outbox.put(replies.drained(self._initial_count))
        self._drained()
