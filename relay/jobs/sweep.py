"""Heals what was left over: acknowledged messages that were not deleted, deliveries that were not pushed,
time-to-live settings that another process changed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from time import monotonic
from typing import Final

import structlog

from relay.metrics import Metrics
from relay.routing.hub import Hub, moments_of
from relay.store.accounts import Accounts
from relay.store.lanes import EndingLanes
from relay.store.messages import Messages
from relay.store.mongo import Mongo, PyMongoError, brief
from relay.tasks import ended
from relay.wire.ids import any_device_key

_PAGE: Final = 1000
_KEYS: Final = 500
_MOST_PAGES: Final = 20
# Who waits for a sweep gets a message within its interval and 5 s: the rest is for the query and the push.
_GRACE_MS: Final = 3000
# Each holds a window of messages at most.
_STARVED: Final = 64
_GIVE_UP_SECONDS: Final = 30.0
# From the first, for clocks that are not quite the same, to the last.
_SPREAD_SECONDS: Final = (0.5, 3.0)
_REST_SECONDS: Final = 10.0

log = structlog.get_logger(__name__)


class Sweep:
    """Leftovers of crashes and of lost hints. Every round is bounded; the next one goes on."""

    def __init__(
        self,
        hub: Hub,
        messages: Messages,
        endings: EndingLanes,
        metrics: Metrics,
        now: Callable[[], int],
    ) -> None:
        self._hub = hub
        self._messages = messages
        self._endings = endings
        self._metrics = metrics
        self._now = now
        self._stuck: set[str] = set()
        self._soon: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        self._rests_until = 0.0

    async def run(self) -> None:
        """One round. What one part cannot do keeps no other from its work. Raises PyMongoError."""
        failed: PyMongoError | None = None
        for part in (self.find_missed, self.feed_starved, self.remove_leftovers):
            try:
                await part()
            except PyMongoError as error:
                failed = error
        if failed is not None:
            raise failed

    def hurry(self) -> None:
        """Hints of other nodes may have been lost: looks for what they were about soon, once it is old enough to be found. However
        often it is called there is one look in ten seconds at most."""
        self._asked_at = monotonic()
        if self._soon is None:
            self._soon = asyncio.create_task(self._find_soon(), name="sweep soon")

    async def close(self) -> None:
        """Ends what is still to be looked for."""
        if self._soon is not None:
            await ended([self._soon])

    async def _find_soon(self) -> None:
        grace = _GRACE_MS / 1000
        began = 0.0
        try:
            # What was lost shortly before a look began was too young for it.
            while self._asked_at + grace > began:
                soon = grace + random.uniform(*_SPREAD_SECONDS)
                await asyncio.sleep(max(soon, self._rests_until - monotonic()))
                began = monotonic()
                self._rests_until = began + _REST_SECONDS
                try:
                    await self.find_missed()
                except PyMongoError as error:
                    log.warning("what other nodes told is looked for by the next sweep", error=brief(error))
        finally:
            self._soon = None

    async def remove_leftovers(self) -> None:
        """Deletes messages that nobody awaits: a node died between its update and its deletion."""
        left = await self._leftovers()
        while left:
            if not await self._endings.remove(left, "delivered", deadline=monotonic() + _GIVE_UP_SECONDS):
                return
            rest = await self._leftovers()
            # What stays is no message and cannot be ended; it is passed over until a restart.
            stuck = set(left).intersection(rest)
            self._stuck.update(stuck)
            removed = len(left) - len(stuck)
            if removed:
                self._metrics.healed.inc(removed)
                log.info("leftovers removed", messages=removed)
            left = [doc_id for doc_id in rest if doc_id not in stuck]

    async def _leftovers(self) -> list[str]:
        return [doc_id for doc_id in await self._messages.leftovers(_PAGE) if doc_id not in self._stuck]

    async def feed_starved(self) -> None:
        """Gives credit back for what ended elsewhere: a device may acknowledge over HTTP through another node, and a message may
        be withdrawn or expire there. Asks for some of the connections whose window is used up."""
        starved = [connection for connection in self._hub if connection.delivery.starved]
        if len(starved) > _STARVED:
            starved = random.sample(starved, _STARVED)
        held = {one: [flying.stored_id for flying in one.delivery.in_flight.values()] for one in starved}
        asked = {name for names in held.values() for name in names if not self._messages.is_away(name)}
        documents = await self._messages.read(list(asked))
        for connection, stored_ids in held.items():
            mailboxes = {connection.key, any_device_key(connection.user)}
            for stored_id in stored_ids:
                if stored_id not in asked:
                    continue
                document = documents.get(stored_id)
                if document is None or mailboxes.isdisjoint(document.get("awaiting", ())):
                    connection.delivery.release(stored_id)

    async def find_missed(self) -> None:
        """Marks connections behind when something waits for them that is not in flight. Few bounded queries for many
        devices: those with nothing in flight. A busy connection looks for itself when it next falls behind."""
        keys: list[str] = []
        for connection in self._hub:
            if connection.delivery.behind:
                continue
            if connection.delivery.in_flight:
                # Its own query skips what is in flight; a shared one would return mostly that.
                connection.delivery.fall_behind()
            else:
                keys += [connection.key, any_device_key(connection.user)]
        before = self._now() - _GRACE_MS
        for start in range(0, len(keys), _KEYS):
            wanted = keys[start : start + _KEYS]
            for _ in range(_MOST_PAGES):
                found = await self._messages.keys_with_waiting(wanted, before, _PAGE)
                for key, doc_ids in found.items():
                    for missed in self._hub.serving(key):
                        if not missed.delivery.holds(doc_ids):
                            self._metrics.missed.inc(len(doc_ids))
                            missed.delivery.fall_behind()
                if len(set[str]().union(*found.values())) < _PAGE:
                    break
                # A full page may be of a few devices only: after an outage much waits, and not for them alone.
                wanted = [key for key in wanted if key not in found]


class LastSeen:
    """Keeps when devices were last heard, ``lastSeen``: of those that left at every round, of those still here once in ``seconds``."""

    def __init__(self, hub: Hub, accounts: Accounts, *, seconds: float) -> None:
        self._hub = hub
        self._accounts = accounts
        self._seconds = seconds
        self._next = monotonic() + self._seconds

    async def run(self) -> None:
        """One round."""
        heard, self._hub.left = self._hub.left, {}
        if monotonic() >= self._next:
            self._next = monotonic() + self._seconds
            heard.update((connection.key, connection.heard) for connection in self._hub)
        if heard:
            try:
                await self._accounts.seen(moments_of(heard))
            except PyMongoError:
                self._hub.left = heard | self._hub.left
                raise


class TimeToLive:
    """Follows the time to live that the index says, which an operator may change at run time."""

    def __init__(self, mongo: Mongo, messages: Messages) -> None:
        self._mongo = mongo
        self._messages = messages

    async def run(self) -> None:
        """One look."""
        seconds = await self._mongo.message_ttl()
        if seconds is not None:
            self._messages.ttl_ms = seconds * 1000
