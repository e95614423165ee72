"""The message path, put together: group commits of messages and of what ends them, and what follows from each."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Final

import structlog

from config.settings import Settings
from relay.metrics import Metrics
from relay.routing.quotas import Quotas
from relay.routing.router import Router
from relay.store.acks import Acks
from relay.store.audience import Audiences
from relay.store.batcher import Batcher, BatcherClosed
from relay.store.breaker import Breaker
from relay.store.chunks import WHOLE
from relay.store.commits import Commits
from relay.store.endings import Ending, Settlement
from relay.store.fates import Fates
from relay.store.lanes import EndingLane, EndingLanes, SendLane, SendLanes
from relay.store.large import LargeCommits
from relay.store.ledger import Ledger
from relay.store.messages import Messages
from relay.store.mongo import Mongo
from relay.store.shards import Shards
from relay.store.submissions import Submission
from relay.wire.envelope import Envelope

# A group of acknowledgements holds so many times as many as one of messages. Two groups may wait; then sockets are not
# read, so that messages do not come faster than they can be ended.
_ACK_GROUP: Final = 4
# Among many devices, where a group that is large enough finds whole parts acknowledged, and deletes what it would have updated.
_CROWD_GROUP: Final = 16
_ACK_SPACING: Final = 0.015
# Parts of messages to many devices that wait to be committed: so many groups, then their senders are not read.
_LARGE_GROUPS: Final = 2
# A lane in which nothing has come through for so many deadlines of a message refuses at once.
_PATIENCE: Final = 1.5

log = structlog.get_logger(__name__)
Commit = Callable[[list[Submission]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class MessagePath:
    """Where messages and their endings are handed in."""

    sends: SendLanes
    endings: EndingLanes


def message_path(
    settings: Settings,
    mongo: Mongo,
    shards: Shards,
    messages: Messages,
    fates: Fates,
    audiences: Audiences,
    ledger: Ledger,
    metrics: Metrics,
    router: Router,
    quotas: Quotas,
    *,
    now: Callable[[], int],
    dead: Callable[[BaseException], None],
) -> MessagePath:
    """Makes it; the lane of a shard starts when it is first needed. ``dead`` is told when a committer died; ``now`` is the wall
    clock (ms)."""
    timeout = settings.commit_timeout_seconds
    # Longer than an election takes.
    patience = _PATIENCE * settings.send_deadline_seconds

    def haste_of(shard: str) -> float:
        # On a replica set there is nobody else who would be spared.
        return inf if shard == WHOLE else timeout

    def settled(settlement: Settlement) -> None:
        for doc_id in settlement.withdrawn:
            messages.hot.forget(doc_id)
        router.settled(settlement)
        quotas.settled(settlement)

    def ending_lane(shard: str) -> EndingLane:
        def relieve() -> None:
            for one in (few, crowd):
                if one.full:
                    _warn("acknowledgements", shard)
                    one.refuse(acks.abandon)

        # Nobody waits for these: as long as there is room they are tried until their deadlines.
        breaker = Breaker(haste=haste_of(shard), relieve=relieve)
        acks = Acks(
            mongo,
            messages,
            fates,
            ledger,
            metrics,
            timeout=timeout,
            breaker=breaker,
            now=now,
            settled=settled,
        )

        def queue(name: str, most: int) -> Batcher[Ending]:
            return Batcher[Ending](
                _named(name, shard),
                acks.commit,
                acks.abandon,
                metrics=metrics,
                max_items=most,
                max_bytes=settings.commit_bytes,
                queue_items=min(settings.queue_messages, 2 * most),
                queue_bytes=settings.queue_bytes,
                workers=1,
                dead=dead,
                spacing=_ACK_SPACING,
                others=lambda: sends.under_way,
            )

        few = queue("ack", _ACK_GROUP * settings.commit_messages)
        crowd = queue("ack-large", _CROWD_GROUP * settings.commit_messages)
        return EndingLane(few, crowd, acks)

    endings = EndingLanes(shards.lane_of, ending_lane)

    def committed(envelopes: Sequence[Envelope]) -> None:
        messages.hot.committed(envelopes)
        router.committed(envelopes)
        for envelope in envelopes:
            if envelope.parts > 1:
                endings.note_crowd(envelope.conversation)
            elif not envelope.awaiting:
                with contextlib.suppress(BatcherClosed):
                    endings.discard(envelope.doc_id, "delivered", deadline=monotonic() + timeout)

    def strayed(stored_id: str, keys: list[str]) -> None:
        with contextlib.suppress(BatcherClosed):
            endings.drop(stored_id, keys, deadline=monotonic() + timeout)

    def send_lane(shard: str) -> SendLane:
        def opened() -> None:
            _warn("messages", shard)
            for one in (small_queue, large_queue):
                one.refuse(small.refuse)

        def relieve() -> None:
            for one in (small_queue, large_queue):
                if one.full:
                    _warn("messages", shard)
                    one.refuse(small.refuse)

        breaker = Breaker(patience=patience, haste=haste_of(shard), opened=opened, relieve=relieve)

        def commits_of(kind: type[Commits]) -> Commits:
            return kind(
                mongo,
                messages,
                fates,
                audiences,
                ledger,
                metrics,
                timeout=timeout,
                breaker=breaker,
                expected=router.expected,
                accepted=quotas.committed,
                committed=committed,
                found=router.found,
                strayed=strayed,
            )

        def queue(name: str, commits: Commits, commit: Commit, queue_items: int) -> Batcher[Submission]:
            return Batcher[Submission](
                _named(name, shard),
                commit,
                commits.abandon,
                metrics=metrics,
                max_items=settings.commit_messages,
                max_bytes=settings.commit_bytes,
                queue_items=queue_items,
                queue_bytes=settings.queue_bytes,
                workers=settings.commits_in_flight,
                dead=dead,
            )

        small, large = commits_of(Commits), commits_of(LargeCommits)

        async def commit_large(batch: list[Submission]) -> None:
            # No more are stored than can be handed out.
            await router.fanout.room()
            await large.commit(batch)

        small_queue = queue("send", small, small.commit, settings.queue_messages)
        large_queue = queue("send-large", large, commit_large, _LARGE_GROUPS * settings.commit_messages)
        return SendLane(small_queue, large_queue, [small, large], breaker)

    sends = SendLanes(shards.lane_of, send_lane)
    router.others = sends.small_under_way
    router.withdrawn = messages.hot.withdrawn_elsewhere
    return MessagePath(sends, endings)


def _named(queue: str, shard: str) -> str:
    """A queue's name in metrics: on a replica set there is one of each."""
    return queue if shard == WHOLE else f"{queue}-{shard}"


def _warn(what: str, shard: str) -> None:
    log.warning("nothing comes through; refused at once until the store answers", what=what, shard=shard)
