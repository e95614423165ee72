"""The quota of waiting messages per mailbox: who is full is left out of later messages, until half of it is drained.

Nothing is counted on the way of a message. What is addressed is noted, one step a message; a job counts, bounded, the
mailboxes of devices that are away or behind. How often depends on what the last count found: what is far below its quota
is counted again after a minute, or when enough was sent to it here meanwhile; never more often than once a lease. A count
that fails changes nothing.

A device is counted by the node that it is connected to, while it is behind there; others do not count it as long as Redis says
that it is online. For them it would be away, though all that waits for it may be in flight.

Whoever latches a mailbox is not always who sees it drain: its device may be connected elsewhere, or fetch over HTTP. So every node
looks, once a lease, at what was latched meanwhile, with one query by an index of what is full.

While a shard is down what waits on the others is what counts, both ways. A mailbox is full when that alone is its quota. It has
room when that is no more than half: what waits on the dead shard does not grow, and a shard that is down must not lose messages
of the others' conversations. When it is back such a mailbox is counted as soon as it is next addressed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final

import structlog

from relay.metrics import Metrics
from relay.routing.bus import Bus
from relay.routing.hub import Hub
from relay.store.audience import LEASE_SECONDS, Audiences
from relay.store.endings import Settlement
from relay.store.mailboxes import LeftOut, Mailboxes
from relay.store.mongo import PyMongoError, brief
from relay.wire.clock import utc_now
from relay.wire.envelope import Envelope
from relay.wire.ids import device_key, is_placeholder, user_of
from relay.wire.limits import Limit

_FAR_BELOW_SECONDS: Final = 60.0
_MAX_LISTS: Final = 20_000
_MAX_KEYS: Final = 200_000
# Counts of one round, how many of them are asked for together, and the time (s) after which the next round goes on: a group
# of thousands of nearly full devices must not keep the store busy with counting (10 to 30 ms for 20,000 messages).
_ROUND: Final = 500
# So many of those that are due are asked for in the directory in one round, as most devices that are sent to are online.
_ASKED: Final = 10 * _ROUND
_TOGETHER: Final = 8
_ROUND_SECONDS: Final = 0.25
# Longer than clocks of nodes differ, and than a latch is on its way to the store.
_LOOK_BACK: Final = timedelta(seconds=30)
# Steps without giving way to others.
_STEPS: Final = 1000

log = structlog.get_logger(__name__)


class _Known:
    """The last count of a mailbox: ``at`` is monotonic, ``sent`` what was addressed to it here since; not ``whole`` when a
    shard was down."""

    __slots__ = ("at", "count", "sent", "whole")

    def __init__(self, count: int, at: float, whole: bool) -> None:
        self.count = count
        self.at = at
        self.whole = whole
        self.sent = 0


class Quotas:
    """``quota``: most messages that wait in one mailbox. ``run`` is one round of the job. ``lease`` (s): no mailbox is
    counted more often, nor is what other nodes have latched asked for."""

    def __init__(
        self, hub: Hub, bus: Bus, mailboxes: Mailboxes, audiences: Audiences, metrics: Metrics, *, quota: int
    ) -> None:
        self._hub = hub
        self._bus = bus
        self._mailboxes = mailboxes
        self._audiences = audiences
        self._metrics = metrics
        self._quota = quota
        self._half = quota // 2
        self.lease = LEASE_SECONDS
        self._turn = asyncio.Lock()
        # By identity: the messages of one sender to one conversation share their list of recipients.
        self._addressed: dict[int, tuple[Sequence[str], list[int]]] = {}
        self._trimmed: dict[int, tuple[Sequence[str], list[int]]] = {}
        self._left_out: dict[str, LeftOut] = {}
        self._pending: OrderedDict[str, None] = OrderedDict()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        # Latched, as far as is known. Not for certain when it was addressed since: another node may have unlatched it, or it was
        # resolved a moment before.
        self._full: OrderedDict[str, bool] = OrderedDict()
        self._latched: dict[str, datetime] = {}
        self._looked = utc_now()
        self._look_at = 0.0
        self._behind: set[str] = set()
        self._behind_at = 0.0

    def committed(self, envelopes: Sequence[Envelope]) -> None:
        """Fresh messages are stored. What finds no room in what is noted is counted when it is next addressed."""
        addressed = self._addressed
        for envelope in envelopes:
            noted = addressed.get(id(envelope.awaiting))
            if noted is not None:
                noted[1][0] += 1
            elif len(addressed) < _MAX_LISTS:
                addressed[id(envelope.awaiting)] = (envelope.awaiting, [1])
            if envelope.trimmed:
                self._note_trimmed(envelope.trimmed, envelope.at)

    def settled(self, settlement: Settlement) -> None:
        """Acknowledgements are durable: is who sent them still full?"""
        if self._full:
            keys = {device_key(item.by_user, item.by_device) for item in settlement.acknowledged}
            self._queue_all(keys.intersection(self._full))

    def recount(self, keys: Iterable[str]) -> None:
        """These are full, says the store: are they still?"""
        for key in keys:
            self._mark(key)
            self._queue(key)

    def is_full(self, key: str) -> bool:
        """Whether this node knows a mailbox as full."""
        return key in self._full

    async def drained(self, key: str) -> None:
        """A device has drained its mailbox: when it was full, it need not be any more. Never raises for what MongoDB does."""
        try:
            if (await self._mailboxes.count(key, self._half + 1)).waiting <= self._half:
                await self._unlatch([key])
        except PyMongoError as error:
            log.warning("a drained mailbox could not be counted", error=brief(error))

    async def run(self) -> None:
        """One round, one at a time: tells gaps of what was left out, counts what is due, latches and unlatches."""
        async with self._turn:
            await self._run()

    async def _run(self) -> None:
        await self._take_addressed()
        await self._find_behind()
        due = await self._take_due()
        try:
            await self._tell_left_out(due)
        except PyMongoError:
            self._queue_all(due)
            raise
        full: list[str] = []
        drained: list[str] = []
        until = monotonic() + _ROUND_SECONDS
        for start in range(0, len(due), _TOGETHER):
            if monotonic() > until:
                self._queue_first(due[start:])
                break
            some = due[start : start + _TOGETHER]
            for key, count in zip(some, await asyncio.gather(*map(self._count, some)), strict=True):
                if count is None:
                    self._queue(key)
                elif key in self._full and self._has_room(count):
                    drained.append(key)
                elif count >= self._quota and not self._full.get(key) and not self._is_live(key):
                    full.append(key)
        try:
            await self._latch(full)
            await self._unlatch(drained)
        except PyMongoError:
            self._queue_all([*full, *drained])
            raise
        await self._learn()

    async def _learn(self) -> None:
        """What was latched since the last look, by whatever node. Of those that are connected here nothing more may have to be
        acknowledged: they are counted."""
        if monotonic() < self._look_at:
            return
        now = utc_now()
        # A clock that was set back must not have its future skipped.
        latched = await self._mailboxes.latched_since(min(now, self._looked) - _LOOK_BACK, _MAX_KEYS)
        self._look_at = monotonic() + self.lease
        before, self._latched, self._looked = self._latched, latched, now
        for steps, (key, since) in enumerate(latched.items()):
            if not steps % _STEPS:
                await asyncio.sleep(0)
            if before.get(key) != since:
                self._mark(key)
                if self._hub.get(key) is not None:
                    self._queue(key)

    async def _take_addressed(self) -> None:
        addressed, self._addressed = self._addressed, {}
        trimmed, self._trimmed = self._trimmed, {}
        now = monotonic()
        steps = 0
        for keys, (sent,) in addressed.values():
            for key in keys:
                if key in self._full:
                    self._full[key] = False
                known = self._known.get(key)
                if known is not None:
                    known.sent += sent
                if known is None or self._may_be_due(known, now):
                    self._queue(key)
                steps += 1
                if not steps % _STEPS:
                    await asyncio.sleep(0)
        for keys, (first, last) in trimmed.values():
            since, latest = (datetime.fromtimestamp(at / 1000, UTC) for at in (first, last))
            for key in keys:
                self._note_left_out(key, LeftOut(since, latest))
                steps += 1
                if not steps % _STEPS:
                    await asyncio.sleep(0)

    def _may_be_due(self, known: _Known, now: float) -> bool:
        """Whether it is due now, or as soon as its lease is over."""
        if not known.whole and self._mailboxes.whole:
            return True
        return 2 * (known.count + known.sent) > self._quota or now - known.at >= _FAR_BELOW_SECONDS

    async def _find_behind(self) -> None:
        """Connections that are behind at two looks in a row: nobody else counts them, and what other nodes send is not noted here."""
        if monotonic() < self._behind_at:
            return
        self._behind_at = monotonic() + self.lease
        behind: set[str] = set()
        for steps, connection in enumerate(self._hub, 1):
            if not steps % _STEPS:
                await asyncio.sleep(0)
            if connection.delivery.behind:
                behind.add(connection.key)
        self._queue_all(key for key in behind & self._behind if not self._full.get(key))
        self._behind = behind

    async def _take_due(self) -> list[str]:
        """The first that are due and not online at other nodes; those within their lease stay."""
        asked = await self._next_due(_ASKED if self._bus.tells else _ROUND)
        due: list[str] = []
        for start in range(0, len(asked), _ROUND):
            if len(due) >= _ROUND:
                self._queue_first(asked[start:])
                break
            due += await self._not_elsewhere(asked[start : start + _ROUND])
        return due

    async def _next_due(self, most: int) -> list[str]:
        now = monotonic()
        due: list[str] = []
        for steps, key in enumerate(list(self._pending)):
            if not steps % _STEPS:
                await asyncio.sleep(0)
            if self._is_live(key) and key not in self._left_out and key not in self._full:
                self._pending.pop(key, None)
                continue
            known = self._known.get(key)
            if known is None or now - known.at >= self.lease:
                self._pending.pop(key, None)
                due.append(key)
                if len(due) == most:
                    break
        return due

    async def _not_elsewhere(self, keys: Sequence[str]) -> list[str]:
        """These without those that other nodes count, which are passed over like what is far below its quota. What may be latched is
        counted all the same, to be unlatched."""
        asked = [key for key in keys if key not in self._full and not is_placeholder(key)]
        online = await self._bus.online({user_of(key) for key in asked}) or {}
        there = {device_key(user, device) for user, devices in online.items() for device in devices}
        passed = there.intersection(asked)
        now = monotonic()
        for key in passed:
            self._remember(key, _Known(0, now, whole=True))
        return [key for key in keys if key not in passed]

    def _is_live(self, key: str) -> bool:
        """Connected here and not behind: what waits for it is in flight, and bounded by its window."""
        return any(not connection.delivery.behind for connection in self._hub.serving(key))

    async def _count(self, key: str) -> int | None:
        most = self._half + 1 if self._full.get(key) else self._quota
        at = monotonic()
        try:
            count, whole = await self._mailboxes.count(key, most)
        except PyMongoError as error:
            log.warning("a mailbox could not be counted", error=brief(error))
            before = self._known.get(key)
            if before is not None:
                before.at = at
            return None
        self._remember(key, _Known(count, at, whole))
        return count

    def _remember(self, key: str, known: _Known) -> None:
        self._known.pop(key, None)
        self._known[key] = known
        if len(self._known) > _MAX_KEYS:
            self._known.popitem(last=False)

    async def _latch(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        try:
            await self._mailboxes.latch(keys, utc_now())
            for key in keys:
                self._mark(key)
                self._metrics.reached(Limit.MAILBOX)
            log.info("mailboxes are full", mailboxes=len(keys))
            # One that was drained while this was written would stay latched until it is next addressed.
            still = await asyncio.gather(*map(self._count, keys))
            await self._unlatch(
                [key for key, count in zip(keys, still, strict=True) if self._has_room(count)]
            )
        finally:
            self._forget_audiences(keys)

    def _has_room(self, count: int | None) -> bool:
        return count is not None and count <= self._half

    async def _unlatch(self, keys: Sequence[str]) -> None:
        if not keys:
            return
        await self._mailboxes.unlatch(keys)
        for key in keys:
            self._full.pop(key, None)
        self._forget_audiences(keys)

    def _forget_audiences(self, keys: Iterable[str]) -> None:
        for user in {user_of(key) for key in keys}:
            self._audiences.changed(user=user)

    def _mark(self, key: str) -> None:
        self._full[key] = True
        if len(self._full) > _MAX_KEYS:
            self._full.popitem(last=False)

    def _queue(self, key: str) -> None:
        if len(self._pending) < _MAX_KEYS:
            self._pending[key] = None

    def _queue_first(self, keys: Sequence[str]) -> None:
        for key in reversed(keys):
            self._pending[key] = None
            self._pending.move_to_end(key, last=False)

    def _queue_all(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._queue(key)

    def _note_trimmed(self, keys: Sequence[str], at: int) -> None:
        noted = self._trimmed.get(id(keys))
        if noted is not None:
            first, last = noted[1]
            noted[1][:] = min(first, at), max(last, at)
        elif len(self._trimmed) < _MAX_LISTS:
            self._trimmed[id(keys)] = (keys, [at, at])

    def _note_left_out(self, key: str, moment: LeftOut) -> None:
        known = self._left_out.get(key)
        if known is not None:
            moment = LeftOut(min(known.since, moment.since), max(known.latest, moment.latest))
        if known is not None or len(self._left_out) < _MAX_KEYS:
            self._left_out[key] = moment
        self._mark(key)
        self._queue(key)

    async def _tell_left_out(self, due: Sequence[str]) -> None:
        told = {key: self._left_out.pop(key) for key in due if key in self._left_out}
        if not told:
            return
        try:
            await self._mailboxes.note_left_out(told)
        except PyMongoError:
            for key, moment in told.items():
                self._note_left_out(key, moment)
            raise
