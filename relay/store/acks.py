"""Group commit of what ends a message: acknowledgements, expiry, withdrawal, release.

Everything for one conversation goes through one lane, one group after the other, so two last acknowledgements cannot race
on one node; on several nodes each looks again for emptied messages after its update. Fates are written before the deletion; a
crash between the two is healed by the sweep.

What two nodes settle at the same moment is booked by the one whose write changed it. A group is written only where exactly what it
has read still waits, so the numbers of changed and deleted documents tell, without another call, whether that was so; when it was
not the group looks which of it was its own, and does the rest anew.

When the outcome of a write is unknown the group is planned anew from what a majority has, and what turns out to have happened
is booked then: in the next attempt, when the message is next touched, or by ``settle_doubts``.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

import structlog

from relay.metrics import Metrics
from relay.store.breaker import Breaker
from relay.store.deleting import delete_messages
from relay.store.disputes import settle_dispute
from relay.store.ending_plan import EndingGroup, Expectation, entry_of, parts_of
from relay.store.endings import Acknowledged, Ending, Release, Settlement
from relay.store.fates import Fates
from relay.store.ledger import Ledger
from relay.store.messages import Messages
from relay.store.mongo import Mongo, PyMongoError, brief, time_limit
from relay.wire.ids import PARTS_KEY, any_device_key, head_id, is_part, user_of

_FIRST_DELAY: Final = 0.05
_LAST_DELAY: Final = 1.0
_MAX_DOUBTS: Final = 200_000
_DOUBTS_PAGE: Final = 500
_MAX_HEADLESS: Final = 50_000
_AT_ONCE: Final = 256
# After so many attempts that others forestalled, what is planned counts as done.
_EXACT_ROUNDS: Final = 20

log = structlog.get_logger(__name__)


class Acks:
    """Commits groups of acknowledgements and removals. ``settled`` gets what each group brought about."""

    def __init__(
        self,
        mongo: Mongo,
        messages: Messages,
        fates: Fates,
        ledger: Ledger,
        metrics: Metrics,
        *,
        timeout: float,
        breaker: Breaker,
        now: Callable[[], int],
        settled: Callable[[Settlement], None],
    ) -> None:
        self._mongo = mongo
        self._collection = mongo.messages
        self._messages = messages
        self._fates = fates
        self._ledger = ledger
        self._retries = metrics.retries.labels("ack")
        self._poison = metrics.poison
        self._timeout = timeout
        self._breaker = breaker
        self._now = now
        self._settled = settled
        # Messages of which a part has ended: the last one ends the head.
        self._headless: dict[str, tuple[str, int]] = {}
        # By document id: what may have happened, and since when (monotonic) no attempt is under way.
        self._doubts: dict[str, tuple[dict[str, Expectation], float]] = {}

    async def commit(self, batch: list[Ending]) -> None:
        """Makes the group durable, trying again while the outcome is unknown. Never raises for what MongoDB does."""
        deadline = max(ending.deadline for ending in batch)
        delay = _FIRST_DELAY
        attempt = disputes = 0
        while True:
            group = EndingGroup(batch, _always if attempt or disputes else self._doubts.__contains__)
            group.exact = disputes < _EXACT_ROUNDS
            try:
                is_left = await self._attempt(group, careful=bool(attempt))
            except PyMongoError as error:
                log.warning("outcome of acknowledgements is unknown", attempt=attempt, error=brief(error))
                self._retries.inc()
                attempt += 1
                self._doubt(group)
                self._breaker.failed()
                if monotonic() >= deadline:
                    self.abandon(batch)
                    return
                await asyncio.sleep(delay * random.uniform(0.5, 1))
                delay = min(delay * 2, _LAST_DELAY)
                continue
            self._breaker.succeeded()
            await self._tell(group.settlement)
            if not is_left:
                break
            disputes += 1
        if self._headless:
            await self._end_heads()
        for ending in batch:
            ending.done(True)

    def abandon(self, batch: list[Ending]) -> None:
        """Tells that these did not become durable here; the messages still wait, as far as anybody knows."""
        for ending in batch:
            ending.done(False)

    @property
    def doubtful(self) -> bool:
        """Whether of something nobody knows yet whether it has ended."""
        return bool(self._doubts)

    async def settle_doubts(self) -> None:
        """Books what abandoned groups brought about after all. Call now and then; one page each time."""
        ripe = monotonic() - self._timeout
        wanted = [doc_id for doc_id, (_, since) in self._doubts.items() if since <= ripe][:_DOUBTS_PAGE]
        if not wanted:
            return
        documents = await self._messages.read(wanted, committed=True)
        self._settle(wanted, documents)

    async def _attempt(self, group: EndingGroup, *, careful: bool) -> bool:
        """Whether something is left that others changed meanwhile, to be planned anew. What was done is booked."""
        if group.read:
            await self._read(group, careful=careful)
        # Calls that do not depend on each other go side by side; a fate is on record before its message is deleted.
        _, shrunk = await _together(self._record(group), self._update(group))
        done: list[Coroutine[Any, Any, Any]] = [
            self._delete(list(group.final.items()), group.awaited),
            self._delete(group.sole_places),
        ]
        as_planned = shrunk == len(group.updates)
        if as_planned:
            done.append(self._finish_emptied(group))
        ended, deleted, *_ = await _together(*done)
        is_left = False
        if group.exact and not (as_planned and ended == len(group.final)):
            is_left = await self._settle_dispute(group, shrunk, ended)
        if not as_planned:
            await self._finish_emptied(group)
        self._headless.update(group.ended_parts)
        self._ledger.add("acknowledged", deleted)
        for outcome, count in group.counts.items():
            if count:
                self._ledger.add(outcome, count)
        return is_left

    async def _settle_dispute(self, group: EndingGroup, shrunk: int, ended: int) -> bool:
        """Others settled some of this between its reading and its writing: leaves in the group what it did itself."""
        documents = await self._messages.read([*group.shrunk, *group.final])
        verdict = settle_dispute(group, documents, shrunk, ended)
        if not verdict.is_sure:
            # Any beat of the books from now on notes it.
            self._ledger.mistrusted = True
        log.debug("settled by two at once", messages=len(documents), sure=verdict.is_sure)
        return bool(verdict.left)

    async def _record(self, group: EndingGroup) -> None:
        entries = [*group.sole_entries, *group.final_entries]
        if entries:
            await self._fates.record(entries, self._now())

    async def _update(self, group: EndingGroup) -> int:
        """How many documents were as they had been read."""
        if not group.updates:
            return 0
        with time_limit(self._timeout):
            return int((await self._collection.bulk_write(group.updates, ordered=False)).matched_count)

    async def _read(self, group: EndingGroup, *, careful: bool) -> None:
        doubtful = careful or any(doc_id in self._doubts for doc_id in group.read)
        documents = await self._messages.read(list(group.read), committed=doubtful)
        if doubtful or self._doubts:
            # What is found done may be an earlier attempt's work.
            group.exact = False
        if doubtful:
            self._settle(group.read, documents)
        # What is no message yet, or never became one, has no end that could be booked.
        for name in await self._messages.heads.orphans(documents):
            del documents[name]
        heads = {doc_id: one for doc_id, one in documents.items() if "parts" in one and "part" not in one}
        if heads:
            documents.update(await self._read_parts(group, heads, doubtful))
        planned = 0
        for doc_id, document in documents.items():
            self._plan(group, doc_id, document)
            planned += len(document.get("awaiting", ()))
            if planned > _AT_ONCE:
                # Large groups: a turn of the event loop for everybody else.
                planned = 0
                await asyncio.sleep(0)

    async def _tell(self, settlement: Settlement) -> None:
        """Hands a settlement on, a large one in pieces with a turn of the event loop after each."""
        released, acknowledged = settlement.released, settlement.acknowledged
        if len(released) <= _AT_ONCE and len(acknowledged) <= _AT_ONCE:
            self._settled(settlement)
            return
        for start in range(0, max(len(released), len(acknowledged)), _AT_ONCE):
            stop = start + _AT_ONCE
            self._settled(Settlement(acknowledged[start:stop], released[start:stop]))
            await asyncio.sleep(0)
        self._settled(Settlement([], [], settlement.withdrawn))

    async def _read_parts(
        self, group: EndingGroup, heads: Mapping[str, Mapping[str, Any]], doubtful: bool
    ) -> dict[str, Mapping[str, Any]]:
        """The parts that end with their heads, and those that wait for who acknowledged by the message's id."""
        whole = group.parts_of_whole(heads)
        documents = await self._messages.read_all(whole, committed=doubtful or bool(self._doubts))
        strayed = group.strayed(heads)
        doubted = {part for part in whole if part in self._doubts}
        if strayed and self._doubts:
            names = {doc_id: head for one in strayed for doc_id, head in one.heads.items()}
            more = [part for head in names.values() for part in parts_of(head) if part in self._doubts]
            documents.update(await self._messages.read_all(more, committed=True))
            doubted.update(more)
        self._settle(doubted, documents)
        for part, document in (await self._messages.strayed(strayed, committed=doubtful)).items():
            if part not in doubted:
                documents.setdefault(part, document)
        for part in documents:
            group.found_strayed(part)
        return documents

    async def end_heads(self, heads: Mapping[str, tuple[str, int]]) -> None:
        """Ends the messages, given with their writing and number of documents, of which no part waits any more. Raises what
        the store raises."""
        left = await self._messages.heads.with_parts(heads)
        ended = [doc_id for doc_id in heads if doc_id not in left]
        if ended:
            release = Release(ended, [PARTS_KEY], deadline=0, done=_nothing)
            for disputes in range(_EXACT_ROUNDS + 1):
                group = EndingGroup([release])
                group.exact = disputes < _EXACT_ROUNDS
                if not await self._attempt(group, careful=False):
                    break

    async def _end_heads(self) -> None:
        heads, self._headless = self._headless, {}
        try:
            await self.end_heads(heads)
        except PyMongoError as error:
            # The next group, or the sweep, tries again.
            log.warning("ends of parts are not looked at yet", error=brief(error))
            if len(self._headless) < _MAX_HEADLESS:
                self._headless.update(heads)

    def _plan(self, group: EndingGroup, doc_id: str, document: Mapping[str, Any]) -> None:
        try:
            group.plan(doc_id, document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # Its own time to live ends it; it must not end anything else.
            self._poison.inc()
            log.error("a stored document is no message", problem=type(error).__name__)

    def _doubt(self, group: EndingGroup) -> None:
        since = monotonic()
        for doc_id in self._doubts.keys() & group.read.keys():
            self._doubts[doc_id] = (self._doubts[doc_id][0], since)
        for doc_id, expected in group.doubts().items():
            if len(self._doubts) < _MAX_DOUBTS:
                self._doubts[doc_id] = (expected, since)

    def _settle(self, doc_ids: Iterable[str], documents: Mapping[str, Mapping[str, Any]]) -> None:
        """Books what earlier attempts brought about, and hands it on: whatever becomes of this one, it is so."""
        told: list[Acknowledged] = []
        for doc_id in doc_ids:
            self._settle_doubt(doc_id, documents.get(doc_id), told)
        if told:
            self._settled(Settlement(told, []))

    def _settle_doubt(
        self, doc_id: str, document: Mapping[str, Any] | None, told: list[Acknowledged]
    ) -> None:
        """Books what an earlier attempt brought about: the deliveries that no longer wait."""
        doubt = self._doubts.pop(doc_id, None)
        if doubt is None:
            return
        waiting: Sequence[str] = () if document is None else document.get("awaiting", ())
        for key, expectation in doubt[0].items():
            # What was delivered without being read may wait under the placeholder of its user.
            if key not in waiting and any_device_key(user_of(key)) not in waiting:
                self._ledger.add(expectation.outcome, 1)
                if expectation.told is not None:
                    told.append(expectation.told)

    async def _delete(
        self, wanted: Sequence[tuple[str, int]], awaited: Mapping[str, int] | None = None
    ) -> int:
        """By id, conversation and ``seq``: a later incarnation of an id must survive. Parts before heads: without its head a
        part is nobody's message."""
        if not wanted:
            return 0
        parts = [one for one in wanted if is_part(one[0])]
        if parts and len(parts) < len(wanted):
            return await self._delete(parts, awaited) + await self._delete(
                [one for one in wanted if not is_part(one[0])], awaited
            )
        with time_limit(self._timeout):
            return await delete_messages(self._mongo, wanted, awaited)

    async def _finish_emptied(self, group: EndingGroup) -> None:
        """Another node may have settled the rest of what this group only shrank."""
        if not group.shrunk:
            return
        documents = await self._messages.read(group.shrunk)
        emptied = [document for document in documents.values() if not document["awaiting"]]
        if not emptied:
            return
        entries = [
            entry_of(one, "delivered" if one.get("deliveredTo") else "released", ()) for one in emptied
        ]
        await self._fates.record(entries, self._now())
        await self._delete([(document["_id"], document["seq"]) for document in emptied])
        for document in emptied:
            if "part" in document:
                place = (str(document["writing"]), int(document["parts"]))
                self._headless[head_id(document["_id"])] = place


async def _together(*steps: Coroutine[Any, Any, Any]) -> list[Any]:
    """Takes these steps side by side. Raises the first exception, when all of them are over."""
    found = await asyncio.gather(*steps, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def _always(_: str) -> bool:
    return True


def _nothing(_: bool) -> None:
    return None
