"""The message store as the composition root puts it together, on a real mongod, without sockets."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from time import monotonic
from typing import Any, TypeVar

from relay.metrics import Metrics
from relay.security.pseudonyms import Pseudonyms
from relay.store.accounts import Accounts
from relay.store.acks import Acks
from relay.store.audience import EMPTY, Audience, Audiences
from relay.store.batcher import Batcher
from relay.store.breaker import Breaker
from relay.store.commits import Commits
from relay.store.conversations import Conversations
from relay.store.endings import Ending, Settlement, Sole
from relay.store.fates import Fates
from relay.store.hot import HotMessages
from relay.store.lanes import EndingLane, EndingLanes
from relay.store.large import LargeCommits
from relay.store.ledger import OUTCOMES, Ledger
from relay.store.messages import Messages
from relay.store.mongo import Mongo
from relay.store.rosters import Rosters
from relay.store.shards import Shards
from relay.store.submissions import Stored, Submission
from relay.wire.clock import Clock, wall_ms
from relay.wire.envelope import Envelope
from relay.wire.errors import RelayError
from relay.wire.ids import device_key, new_id
from tests.support.databases import make_database

AnyCommits = TypeVar("AnyCommits", bound=Commits)
TTL_SECONDS = 30 * 86_400
INLINE = 64


class Store:
    """Every part of the message store. ``committed`` and ``settlements`` collect what the router would get."""

    def __init__(self, uri: str, database: str, *, behind_ms: int = 0) -> None:
        self.uri = uri
        self.metrics = Metrics()
        self.mongo = Mongo(uri, database)
        self.ledger = Ledger()
        self.clock = Clock(lambda: wall_ms() - behind_ms)
        self.shards = Shards(self.mongo, fate_seconds=72 * 3600)
        self.fates = Fates(self.mongo, self.shards, timeout=2)
        self.messages = Messages(
            self.mongo,
            self.shards,
            self.fates,
            self.metrics,
            ttl_seconds=TTL_SECONDS,
            timeout=2,
            hot=HotMessages(1 << 20),
        )
        self.accounts = Accounts(
            inactive=timedelta(days=30), pseudonyms=Pseudonyms(b"a key for tests only, of 32 bytes.")
        )
        self.conversations = Conversations()
        self.audiences = Audiences(Rosters(inactive=timedelta(days=30)).load)
        self.expected: list[Envelope] = []
        self.accepted: list[Envelope] = []
        self.committed: list[Envelope] = []
        self.settlements: list[Settlement] = []
        self.faults: list[BaseException] = []
        self.acks = Acks(
            self.mongo,
            self.messages,
            self.fates,
            self.ledger,
            self.metrics,
            timeout=2,
            breaker=Breaker(),
            now=self.clock.now,
            settled=self.settlements.append,
        )
        self.commits = self._commits_of(Commits)
        self.large = self._commits_of(LargeCommits)
        self.endings = EndingLanes(
            self.shards.lane_of,
            lambda shard: EndingLane(
                self._queue(f"ack {shard}"), self._queue(f"ack-large {shard}"), self.acks
            ),
        )

    def _commits_of(self, kind: type[AnyCommits]) -> AnyCommits:
        return kind(
            self.mongo,
            self.messages,
            self.fates,
            self.audiences,
            self.ledger,
            self.metrics,
            timeout=2,
            breaker=Breaker(),
            found=lambda _: None,
            strayed=lambda doc_id, keys: self.endings.drop(doc_id, keys, deadline=monotonic() + 10),
            expected=self.expected.extend,
            accepted=self.accepted.extend,
            committed=self.committed.extend,
        )

    def _queue(self, name: str) -> Batcher[Ending]:
        return Batcher[Ending](
            name,
            self.acks.commit,
            self.acks.abandon,
            metrics=self.metrics,
            max_items=500,
            max_bytes=4_194_304,
            queue_items=20_000,
            queue_bytes=67_108_864,
            workers=1,
            dead=self.faults.append,
        )

    async def clear(self) -> None:
        """Empties the message collections and the books."""
        await self.mongo.messages.delete_many({})
        await self.mongo.fates.delete_many({})
        for outcome in OUTCOMES:
            self.ledger.add(outcome, -self.ledger.count(outcome))
        self.expected.clear()
        self.accepted.clear()
        self.committed.clear()
        self.settlements.clear()

    def envelope(
        self,
        awaiting: Sequence[str],
        *,
        conv: str = "talk",
        id: str | None = None,
        user: str = "ann",
        device: str = "phone",
        body: str | None = "hello",
        at: int | None = None,
        expires: int | None = None,
        **fields: Any,
    ) -> Envelope:
        """A new message of ann's phone."""
        return Envelope(
            conv,
            id or new_id(),
            user=user,
            device=device,
            seq=self.clock.next(),
            at=self.clock.now() if at is None else at,
            kind="text",
            body=body,
            awaiting=list(awaiting),
            expires=expires,
            **fields,
        )

    def submission(
        self, envelope: Envelope, *, again: bool = False, seconds: float = 10, inline: int | None = INLINE
    ) -> tuple[Submission, asyncio.Future[Stored | RelayError]]:
        """One message on its way, and its outcome."""
        outcome: asyncio.Future[Stored | RelayError] = asyncio.get_running_loop().create_future()
        found = Submission(
            envelope,
            Audience(envelope.conversation, EMPTY),
            device_key(envelope.user, envelope.device),
            again=again,
            deadline=monotonic() + seconds,
            done=outcome.set_result,
            inline=inline,
        )
        return found, outcome

    async def send(
        self, *envelopes: Envelope, again: bool = False, seconds: float = 10
    ) -> list[Stored | RelayError]:
        """Commits these as one group and waits for every outcome."""
        pairs = [self.submission(envelope, again=again, seconds=seconds) for envelope in envelopes]
        submissions = [submission for submission, _ in pairs]
        await self.commits.commit([one for one in submissions if not one.large])
        await self.large.commit([one for one in submissions if one.large])
        return list(await asyncio.gather(*(outcome for _, outcome in pairs)))

    async def put(self, awaiting: Sequence[str], **fields: Any) -> Envelope:
        """A stored message."""
        envelope = self.envelope(awaiting, **fields)
        outcome = (await self.send(envelope))[0]
        assert isinstance(outcome, Stored), outcome
        return envelope

    async def ack(self, key: str, *doc_ids: str, known: Mapping[str, Sole] | None = None) -> bool:
        """One device acknowledges messages of one conversation; whether that became durable."""
        user, _, device = key.partition("/")
        outcome: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.endings.acknowledge(
            doc_ids[0].partition(" ")[0],
            user,
            device,
            {doc_id: (known or {}).get(doc_id) for doc_id in doc_ids},
            at=self.clock.now(),
            deadline=monotonic() + 10,
            done=outcome.set_result,
        )
        return await outcome

    async def document(self, doc_id: str) -> dict[str, Any] | None:
        """A stored message as it is in the database."""
        found: dict[str, Any] | None = await self.mongo.messages.find_one({"_id": doc_id})
        return found

    async def waiting_deliveries(self) -> int:
        """Deliveries (message and device) in the database."""
        return await self.messages.count_waiting()


@asynccontextmanager
async def open_store(uri: str) -> AsyncIterator[Store]:
    """A store in a database of its own, which is dropped afterwards."""
    store = Store(uri, await make_database(uri, f"s{uuid.uuid4().hex[:20]}"))
    try:
        await store.mongo.prepare(TTL_SECONDS, 72 * 3600)
        await store.shards.load()
        yield store
        await _close(store)
    finally:
        await store.mongo.client.drop_database(store.mongo.database.name)
        store.mongo.close()


@asynccontextmanager
async def open_another(store: Store, *, behind_ms: int = 0) -> AsyncIterator[Store]:
    """As another node has it: the same database, with connections, caches and books of its own, and a clock that lies so far
    behind."""
    other = Store(store.uri, store.mongo.database.name, behind_ms=behind_ms)
    try:
        await other.shards.load()
        yield other
        await _close(other)
    finally:
        other.mongo.close()


async def _close(store: Store) -> None:
    await store.commits.close()
    await store.large.close()
    await store.endings.close(2)
    assert store.faults == []
