"""Lanes of group commit, one a shard: a group never goes to two shards, and a shard that does not answer holds up its own
conversations only. On a replica set there is one lane.

In a lane messages to many devices, and what ends them, have a queue of their own, so that they hold up nobody else's. All endings of
one conversation's messages go through one queue, in order. Which shard a conversation lies on is a hint: the router knows.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from time import monotonic
from typing import Final, Generic, TypeVar

import structlog

from relay.store.acks import Acks
from relay.store.batcher import Batcher, BatcherClosed
from relay.store.breaker import Breaker
from relay.store.commits import Commits
from relay.store.endings import Ack, Ending, Release, Removal, Sole
from relay.store.ledger import Fate
from relay.store.mongo import PyMongoError, brief
from relay.store.submissions import Submission, unreachable
from relay.wire.ids import conversation_of

_BYTES_EACH: Final = 200
_MOMENT: Final = 0.05
# An attempt takes a few milliseconds.
_SOON: Final = 0.1
_MAX_CROWDS: Final = 10_000

log = structlog.get_logger(__name__)
LaneOf = Callable[[str], str]
"""The lane of a conversation."""


@dataclass(frozen=True, slots=True)
class SendLane:
    """Where messages of one shard are committed."""

    small: Batcher[Submission]
    large: Batcher[Submission]
    commits: Sequence[Commits]
    breaker: Breaker


@dataclass(frozen=True, slots=True)
class EndingLane:
    """Where messages of one shard end: ``crowd`` is for conversations of many devices."""

    few: Batcher[Ending]
    crowd: Batcher[Ending]
    acks: Acks


Lane = TypeVar("Lane")


class Lanes(Generic[Lane]):
    """A lane for each shard. ``make`` makes and starts one when it is first needed."""

    def __init__(self, lane_of: LaneOf, make: Callable[[str], Lane]) -> None:
        self._lane_of = lane_of
        self._make = make
        self._lanes: dict[str, Lane] = {}
        self._closed = False

    def _lane(self, conversation: str) -> Lane:
        return self._named(self._lane_of(conversation))

    def _named(self, name: str) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            if self._closed:
                raise BatcherClosed
            lane = self._lanes[name] = self._make(name)
        return lane

    def _lanes_of(self, conversations: Iterable[str]) -> list[Lane]:
        """Those of them that were needed before."""
        names = {self._lane_of(conversation) for conversation in conversations}
        return [self._lanes[name] for name in names if name in self._lanes]


class SendLanes(Lanes[SendLane]):
    """Where messages are handed in."""

    def __init__(self, lane_of: LaneOf, make: Callable[[str], SendLane]) -> None:
        super().__init__(lane_of, make)
        self._small_at = 0.0

    def submit(self, submission: Submission) -> None:
        """Queues one message; refuses it at once when its shard is known not to answer. Raises BatcherClosed."""
        lane = self._lane(submission.envelope.conversation)
        if not lane.breaker.admits():
            submission.settle(unreachable())
        elif submission.large:
            lane.large.submit(submission, submission.size, len(submission.pieces))
        else:
            lane.small.submit(submission, submission.size)
            self._small_at = monotonic()

    def small_under_way(self) -> bool:
        """Whether messages between few devices came within the last moment."""
        return monotonic() - self._small_at < _MOMENT

    @property
    def under_way(self) -> bool:
        """Whether any message is being committed, or waits for it."""
        return any(not queue.idle for queue in self.queues())

    @property
    def full(self) -> bool:
        """Whether any source should be held back now."""
        return any(lane.small.full for lane in self._lanes.values())

    def is_full(self, conversations: Iterable[str]) -> bool:
        """Whether who sends to these conversations should be held back now."""
        return any(lane.small.full for lane in self._lanes_of(conversations))

    def is_large_full(self, conversation: str) -> bool:
        """Whether who sends to many devices there should be held back now."""
        return any(lane.large.full for lane in self._lanes_of([conversation]))

    async def room(self, conversations: Iterable[str]) -> None:
        """Waits until there is room where these conversations' messages are committed."""
        for lane in self._lanes_of(conversations):
            await lane.small.room()

    async def large_room(self, conversation: str) -> None:
        """Waits until there is room for messages to many devices where this conversation's are committed."""
        for lane in self._lanes_of([conversation]):
            await lane.large.room()

    def retry(self) -> None:
        """The store, or a shard of it, answers again: whatever comes is tried."""
        for lane in self._lanes.values():
            lane.breaker.succeeded()

    async def late(self) -> AbstractSet[asyncio.Future[None]]:
        """The attempts that are under way now and that are not over within a moment."""
        attempts = [over for commits in self._all() for over in commits.under_way]
        if not attempts:
            return frozenset()
        _, late = await asyncio.wait(attempts, timeout=_SOON)
        return late

    def concerned(
        self, late: AbstractSet[asyncio.Future[None]], conversations: Iterable[str], users: Iterable[str]
    ) -> list[asyncio.Future[None]]:
        """Which of these ``Commits.concerned`` names, in any lane: a conversation's chunk may have moved since an attempt began."""
        its, of = frozenset(conversations), frozenset(users)
        return [over for commits in self._all() for over in commits.concerned(its, of) if over in late]

    async def barrier(self, conversations: Collection[str], users: Collection[str]) -> None:
        """Waits until no attempt that is under way now can commit any more to recipients resolved before a change of these
        conversations or users. What is quick is not looked at: only what hangs is worth it."""
        late = await self.late()
        if late and (attempts := self.concerned(late, conversations, users)):
            await asyncio.wait(attempts)

    def _all(self) -> list[Commits]:
        return [commits for lane in self._lanes.values() for commits in lane.commits]

    @property
    def settled(self) -> bool:
        """Whether nothing is under way, and nothing is unknown that will be booked."""
        return all(queue.idle for queue in self.queues()) and not any(
            commits.doubtful for commits in self._all()
        )

    async def settle_given_up(self) -> None:
        """Books and delivers what was stored after all, though its sender was told `unavailable`. Call now and then. Raises
        PyMongoError, when every lane has been asked."""
        await _each([commits.settle_given_up for commits in self._all()])

    async def close(self, timeout: float) -> None:
        """Commits what is queued for at most ``timeout`` seconds, and ends the retries that are under way."""
        self._closed = True
        await asyncio.gather(*(queue.close(timeout) for queue in self.queues()))
        for commits in self._all():
            await commits.close()

    def queues(self) -> list[Batcher[Submission]]:
        """The queues of every lane."""
        return [queue for lane in self._lanes.values() for queue in (lane.small, lane.large)]


class EndingLanes(Lanes[EndingLane]):
    """Where acknowledgements and removals are handed in. ``deadline`` is a reading of the monotonic clock.

    What ends in conversations of many devices has a queue of its own: thousands of acknowledgements of one message hold up nobody
    else's, and nobody's socket but their own.
    """

    def __init__(self, lane_of: LaneOf, make: Callable[[str], EndingLane]) -> None:
        super().__init__(lane_of, make)
        self._crowds: OrderedDict[str, None] = OrderedDict()

    def note_crowd(self, conversation: str) -> None:
        """Messages of this conversation go to many devices."""
        self._crowds[conversation] = None
        if len(self._crowds) > _MAX_CROWDS:
            self._crowds.popitem(last=False)

    def acknowledge(
        self,
        conversation: str,
        user: str,
        device: str,
        messages: Mapping[str, Sole | None],
        *,
        at: int,
        deadline: float,
        done: Callable[[bool], None],
        quiet: bool = False,
    ) -> None:
        """Queues one device's acknowledgement of messages of one conversation. Raises BatcherClosed."""
        ack = Ack(user, device, messages, at=at, deadline=deadline, done=done, quiet=quiet)
        self._submit(conversation, ack, len(messages))

    def discard(self, doc_id: str, fate: Fate, *, deadline: float, sender: str | None = None) -> None:
        """Ends one message for everybody who still awaits it, without waiting for it; with ``sender`` only when this user has sent
        it. Raises BatcherClosed."""
        self._submit(
            conversation_of(doc_id), Removal([doc_id], fate, deadline=deadline, whole=True, sender=sender)
        )

    def drop(self, doc_id: str, keys: Sequence[str], *, deadline: float) -> None:
        """Takes mailboxes off one message, without waiting for it. Raises BatcherClosed."""
        self._submit(conversation_of(doc_id), Release([doc_id], keys, deadline=deadline, done=_nothing))

    async def remove(self, doc_ids: Sequence[str], fate: Fate, *, deadline: float) -> bool:
        """Ends messages for everybody who still awaits them. True once that is durable. Raises BatcherClosed."""
        return await self._end(
            doc_ids, lambda wanted, done: Removal(wanted, fate, deadline=deadline, done=done)
        )

    async def release(self, doc_ids: Sequence[str], keys: Sequence[str], *, deadline: float) -> bool:
        """Takes mailboxes off the messages that await them. True once that is durable. Raises BatcherClosed."""
        return await self._end(
            doc_ids, lambda wanted, done: Release(wanted, keys, deadline=deadline, done=done)
        )

    async def end_heads(self, heads: Mapping[str, tuple[str, int]]) -> None:
        """Ends the messages, given with their writing and number of documents, of which no part waits any more. Raises
        PyMongoError, when every lane has been asked."""
        by_lane: dict[str, dict[str, tuple[str, int]]] = {}
        for doc_id, head in heads.items():
            by_lane.setdefault(self._lane_of(conversation_of(doc_id)), {})[doc_id] = head
        await _each([_ends(self._named(name).acks, some) for name, some in by_lane.items()])

    @property
    def settled(self) -> bool:
        """Whether nothing is under way, and nothing is unknown that will be booked."""
        return all(queue.idle for queue in self.queues()) and not any(
            lane.acks.doubtful for lane in self._lanes.values()
        )

    async def settle_doubts(self) -> None:
        """Books what abandoned groups brought about after all. Call now and then. Raises PyMongoError, when every lane has been
        asked."""
        await _each([lane.acks.settle_doubts for lane in self._lanes.values()])

    @property
    def full(self) -> bool:
        """Whether any source should be held back now."""
        return any(lane.few.full for lane in self._lanes.values())

    def is_full(self, conversations: Iterable[str]) -> bool:
        """Whether who ends messages of these conversations should be held back now."""
        return any(lane.few.full for lane in self._lanes_of(conversations))

    async def room(self, conversations: Iterable[str]) -> None:
        """Waits until there is room for what ends between few devices in these conversations."""
        for lane in self._lanes_of(conversations):
            await lane.few.room()

    def crowd_room(self, conversation: str) -> Awaitable[None] | None:
        """What a device of this conversation waits for before it ends more there; None when there is room."""
        if conversation not in self._crowds:
            return None
        full = [lane.crowd for lane in self._lanes_of([conversation]) if lane.crowd.full]
        return full[0].room() if full else None

    async def close(self, timeout: float) -> None:
        """Commits what is queued for at most ``timeout`` seconds."""
        self._closed = True
        await asyncio.gather(*(queue.close(timeout) for queue in self.queues()))

    def queues(self) -> list[Batcher[Ending]]:
        """The queues of every lane."""
        return [queue for lane in self._lanes.values() for queue in (lane.few, lane.crowd)]

    async def _end(
        self, doc_ids: Sequence[str], make: Callable[[list[str], Callable[[bool], None]], Ending]
    ) -> bool:
        loop = asyncio.get_running_loop()
        by_queue: dict[tuple[str, bool], list[str]] = {}
        for doc_id in doc_ids:
            conversation = conversation_of(doc_id)
            place = (self._lane_of(conversation), conversation in self._crowds)
            by_queue.setdefault(place, []).append(doc_id)
        waiters: list[asyncio.Future[bool]] = []
        for wanted in by_queue.values():
            waiter = loop.create_future()
            waiters.append(waiter)
            self._submit(conversation_of(wanted[0]), make(wanted, _setter(waiter)), len(wanted))
        return all(await asyncio.gather(*waiters))

    def _submit(self, conversation: str, ending: Ending, weight: int = 1) -> None:
        lane = self._lane(conversation)
        queue = lane.crowd if conversation in self._crowds else lane.few
        queue.submit(ending, _BYTES_EACH * weight, weight)


async def _each(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """One after the other; what fails keeps no other from its turn."""
    failed: PyMongoError | None = None
    for call in calls:
        try:
            await call()
        except PyMongoError as error:
            log.debug("a lane could not be asked", error=brief(error))
            failed = error
    if failed is not None:
        raise failed


def _ends(acks: Acks, heads: Mapping[str, tuple[str, int]]) -> Callable[[], Awaitable[None]]:
    return lambda: acks.end_heads(heads)


def _setter(waiter: asyncio.Future[bool]) -> Callable[[bool], None]:
    def done(durable: bool) -> None:
        if not waiter.done():
            waiter.set_result(durable)

    return done


def _nothing(_: bool) -> None:
    return None
