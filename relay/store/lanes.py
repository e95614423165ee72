"""Lanes of group commit. All endings of one conversation's messages go through one lane, in order; messages to many
devices have a lane of their own, so that they hold up nobody else's.

On a replica set the lanes only share out the work; on a sharded cluster a lane would be a shard's.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import monotonic
from zlib import crc32

from relay.store.batcher import Batcher
from relay.store.commits import Commits
from relay.store.endings import Ack, Ending, Release, Removal, Sole
from relay.store.ledger import Fate
from relay.store.submissions import Submission
from relay.wire.ids import split_document_id

_BYTES_EACH = 200
_MOMENT = 0.05
_MAX_CROWDS = 10_000


class SendLanes:
    """Where messages are handed in."""

    def __init__(
        self,
        small: Batcher[Submission],
        large: Batcher[Submission],
        commits: Sequence[Commits],
    ) -> None:
        self._small = small
        self._large = large
        self._commits = commits
        self._small_at = 0.0

    def submit(self, submission: Submission) -> None:
        """Queues one message. Raises BatcherClosed."""
        if submission.large:
            self._large.submit(submission, submission.size, len(submission.pieces))
        else:
            self._small.submit(submission, submission.size)
            self._small_at = monotonic()

    def small_under_way(self) -> bool:
        """Whether messages between few devices came within the last moment."""
        return monotonic() - self._small_at < _MOMENT

    @property
    def full(self) -> bool:
        """Whether sources should be held back now."""
        return self._small.full

    @property
    def large_full(self) -> bool:
        """Whether sources of messages to many devices should be held back now."""
        return self._large.full

    async def room(self) -> None:
        """Waits until there is room."""
        await self._small.room()

    async def large_room(self) -> None:
        """Waits until there is room for messages to many devices."""
        await self._large.room()

    async def barrier(self) -> None:
        """Waits until every attempt that is under way now is over. The next one of a retry resolves what has changed since."""
        await asyncio.gather(*(commits.barrier() for commits in self._commits))

    async def settle_given_up(self) -> None:
        """Books and delivers what was stored after all, though its sender was told `unavailable`. Call now and then."""
        for commits in self._commits:
            await commits.settle_given_up()

    async def close(self, timeout: float) -> None:
        """Commits what is queued for at most ``timeout`` seconds, and ends the retries that are under way."""
        await asyncio.gather(self._small.close(timeout), self._large.close(timeout))
        for commits in self._commits:
            await commits.close()


class EndingLanes:
    """Where acknowledgements and removals are handed in. ``deadline`` is a reading of the monotonic clock.

    What ends in conversations of many devices goes through ``crowd``, when there is one: thousands of acknowledgements of one
    message hold up nobody else's, and nobody's socket but their own.
    """

    def __init__(self, lanes: Sequence[Batcher[Ending]], crowd: Batcher[Ending] | None = None) -> None:
        self._few = lanes
        self._crowd = crowd
        self._lanes = list(lanes) if crowd is None else [*lanes, crowd]
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
        self._lane(conversation).submit(ack, _BYTES_EACH * len(messages), len(messages))

    def discard(self, doc_id: str, fate: Fate, *, deadline: float) -> None:
        """Ends one message for everybody who still awaits it, without waiting for it. Raises BatcherClosed."""
        self._lane(split_document_id(doc_id)[0]).submit(
            Removal([doc_id], fate, deadline=deadline, whole=True), _BYTES_EACH
        )

    def drop(self, doc_id: str, keys: Sequence[str], *, deadline: float) -> None:
        """Takes mailboxes off one message, without waiting for it. Raises BatcherClosed."""
        self._lane(split_document_id(doc_id)[0]).submit(
            Release([doc_id], keys, deadline=deadline, done=_nothing), _BYTES_EACH
        )

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

    async def _end(
        self, doc_ids: Sequence[str], make: Callable[[list[str], Callable[[bool], None]], Ending]
    ) -> bool:
        loop = asyncio.get_running_loop()
        by_lane: dict[int, list[str]] = {}
        for doc_id in doc_ids:
            by_lane.setdefault(self._number(split_document_id(doc_id)[0]), []).append(doc_id)
        waiters: list[asyncio.Future[bool]] = []
        for number, wanted in by_lane.items():
            waiter = loop.create_future()
            waiters.append(waiter)
            self._lanes[number].submit(make(wanted, _setter(waiter)), _BYTES_EACH * len(wanted), len(wanted))
        return all(await asyncio.gather(*waiters))

    @property
    def full(self) -> bool:
        """Whether sources should be held back now."""
        return any(lane.full for lane in self._few)

    async def room(self) -> None:
        """Waits until there is room for what ends between few devices."""
        for lane in self._few:
            await lane.room()

    def crowd_room(self, conversation: str) -> Awaitable[None] | None:
        """What a device of this conversation waits for before it ends more there; None when there is room."""
        if self._crowd is None or not self._crowd.full or conversation not in self._crowds:
            return None
        return self._crowd.room()

    async def close(self, timeout: float) -> None:
        """Commits what is queued for at most ``timeout`` seconds."""
        await asyncio.gather(*(lane.close(timeout) for lane in self._lanes))

    def _lane(self, conversation: str) -> Batcher[Ending]:
        return self._lanes[self._number(conversation)]

    def _number(self, conversation: str) -> int:
        if self._crowd is not None and conversation in self._crowds:
            return len(self._few)
        return crc32(conversation.encode()) % len(self._few)


def _setter(waiter: asyncio.Future[bool]) -> Callable[[bool], None]:
    def done(durable: bool) -> None:
        if not waiter.done():
            waiter.set_result(durable)

    return done


def _nothing(_: bool) -> None:
    return None
