"""Hot messages shared through a real Valkey, which is a help and never the truth."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.routing.directory import KEPT_SECONDS
from relay.store.embedded import EmbeddedMongo
from relay.store.embedded_valkey import EmbeddedValkey
from relay.store.hot import HotMessages
from relay.store.hot_redis import HotRedis
from relay.wire.envelope import Envelope
from tests.support.store import Store, open_store
from tests.support.valkey import Valkey, open_valkey
from tests.support.valkey_cluster import valkey_cluster

KEYS = [f"p{number}/phone" for number in range(8)]


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[Valkey]:
    async with open_valkey(tmp_path) as server:
        yield server


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Any]:
    found = Redis.from_url(valkey.url)
    yield found
    await found.aclose()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis has time to answer, on a machine that is busy, too."""
    monkeypatch.setattr("relay.store.hot_redis._ANSWER_SECONDS", 5)


@pytest.fixture(scope="module")
async def opened(mongod: EmbeddedMongo) -> AsyncIterator[Store]:
    async with open_store(mongod.uri) as store:
        yield store


@pytest.fixture
async def store(opened: Store, valkey: Valkey) -> AsyncIterator[Store]:
    """A store that has just started: nothing is in its memory."""
    await opened.clear()
    elsewhere = HotRedis(valkey.url, 1 << 20)
    elsewhere.start()
    opened.messages.hot = HotMessages(1 << 20, elsewhere)
    yield opened
    await elsewhere.close()


async def committed(store: Store, redis: Any, **fields: Any) -> Envelope:
    """A message to many devices that another node has just stored."""
    envelope = store.envelope(KEYS, **fields)
    one, outcome = store.submission(envelope, inline=3)
    await store.large.commit([one])
    await outcome
    store.messages.hot.committed(one.pieces)
    await kept_in_time(store.messages.hot._elsewhere, redis, envelope)
    forget_here(store)
    return envelope


async def kept_in_time(elsewhere: HotRedis | None, redis: Any, envelope: Envelope) -> None:
    """Waits until it lies in Redis, which on a busy machine may not have taken it in time."""
    assert elsewhere is not None
    async with asyncio.timeout(20):
        while not await redis.exists(key_of(envelope)):
            if not elsewhere._waiting and monotonic() >= elsewhere._ask_at:
                elsewhere.put(envelope)
            await asyncio.sleep(0.05)


def key_of(envelope: Envelope) -> str:
    return f"relay:hot:{{{envelope.conversation}}}:{envelope.id}"


def forget_here(store: Store) -> None:
    for doc_id in list(store.messages.hot._messages):
        store.messages.hot._drop(doc_id)


async def bodies(store: Store, key: str) -> list[str | None]:
    found = await store.messages.waiting((key,), store.clock.now(), limit=100, max_bytes=1 << 20)
    return [one.frame_for(key) for one in found.envelopes]


@pytest.mark.usefixtures("patient")
async def test_what_another_node_committed_is_not_read_from_mongodb(store: Store, redis: Any) -> None:
    envelope = await committed(
        store, redis, body="from Redis", reply_to="00000000-0000-4000-8000-000000000001"
    )
    await store.mongo.messages.update_many({}, {"$set": {"body": "from MongoDB"}})
    assert await bodies(store, KEYS[0]) == [envelope.frame_for(KEYS[0])]
    (found,) = (
        await store.messages.waiting((KEYS[7],), store.clock.now(), limit=1, max_bytes=1000)
    ).envelopes
    assert (found.seq, found.at, found.user, found.number) == (envelope.seq, envelope.at, "ann", 2)
    for key in KEYS:
        await store.ack(key, envelope.doc_id)
    assert await store.waiting_deliveries() == 0


async def test_what_is_kept_leaves_by_itself_and_a_withdrawn_one_at_once(store: Store, redis: Any) -> None:
    envelope = await committed(store, redis)
    assert 0 < await redis.ttl(key_of(envelope)) <= 45
    store.messages.hot.forget(envelope.doc_id)
    await left(redis, envelope)


async def left(redis: Any, envelope: Envelope) -> None:
    async with asyncio.timeout(10):
        while await redis.exists(key_of(envelope)):
            await asyncio.sleep(0.01)


async def test_a_withdrawn_one_leaves_though_too_much_waits_or_redis_was_away(
    valkey: Valkey, store: Store, redis: Any
) -> None:
    envelope = await committed(store, redis)
    elsewhere = HotRedis(valkey.url, 1 << 20)
    for _ in range(2000):
        elsewhere.put(store.envelope(KEYS))
    elsewhere.forget(envelope.doc_id)
    valkey.pause()
    try:
        elsewhere.start()
        async with asyncio.timeout(5):
            while not elsewhere._ask_at:
                await asyncio.sleep(0.01)
        assert elsewhere._leaving
    finally:
        valkey.resume()
    await left(redis, envelope)
    async with asyncio.timeout(5):
        while elsewhere._leaving:
            await asyncio.sleep(0.01)
    await elsewhere.close()


@pytest.mark.usefixtures("patient")
async def test_what_another_node_withdraws_leaves_when_this_one_keeps_it_or_is_about_to(
    valkey: Valkey, store: Store, redis: Any
) -> None:
    elsewhere = HotRedis(valkey.url, 1 << 20)
    kept, waiting, others, last = (store.envelope(KEYS) for _ in range(4))
    elsewhere.put(waiting)
    for envelope in (waiting, others):
        elsewhere.forget_own(envelope.doc_id)
    elsewhere.put(waiting)
    assert list(elsewhere._leaving) == [waiting.doc_id]
    elsewhere.start()
    elsewhere.put(kept)
    await written(redis, kept)
    elsewhere.forget_own(kept.doc_id)
    await left(redis, kept)
    elsewhere.put(last)
    await written(redis, last)
    assert await names(redis) == [key_of(last).encode()]
    await elsewhere.close()


@pytest.mark.usefixtures("patient")
async def test_what_is_to_leave_is_bounded_and_not_asked_for_when_it_has_left_by_itself(
    valkey: Valkey, store: Store, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    envelope = await committed(store, redis)
    elsewhere = HotRedis(valkey.url, 1 << 20)
    for number in range(10_500):
        elsewhere.forget(f"talk {number}")
    assert len(elsewhere._leaving) == 10_000
    elsewhere._leaving.clear()
    monkeypatch.setattr("relay.store.hot_redis._SECONDS", -1)
    elsewhere.forget(envelope.doc_id)
    elsewhere.start()
    async with asyncio.timeout(5):
        while elsewhere._leaving:
            await asyncio.sleep(0.01)
    assert await redis.exists(key_of(envelope))
    await elsewhere.close()


@pytest.mark.usefixtures("patient")
async def test_an_older_incarnation_and_nonsense_are_not_taken(store: Store, redis: Any) -> None:
    envelope = await committed(store, redis, body="true")
    await redis.set(key_of(envelope), b"nonsense")
    assert [one and '"true"' in one for one in await bodies(store, KEYS[0])] == [True]
    forget_here(store)
    store.messages.hot._elsewhere._ask_at = 0  # type: ignore[union-attr]
    other = store.envelope(KEYS, id=envelope.id, body="false")
    store.messages.hot._elsewhere.put(other)  # type: ignore[union-attr]
    async with asyncio.timeout(3):
        while b"false" not in (await redis.get(key_of(envelope)) or b""):
            await asyncio.sleep(0.01)
    assert [one and '"true"' in one for one in await bodies(store, KEYS[1])] == [True]


@pytest.mark.parametrize("fault", ["pause", "kill"])
async def test_without_redis_everything_comes_from_mongodb_in_time(
    store: Store, redis: Any, valkey: Valkey, fault: str
) -> None:
    envelope = await committed(store, redis)
    if fault == "pause":
        valkey.pause()
    else:
        await valkey.kill()
    began = monotonic()
    for key in KEYS:
        assert await bodies(store, key) == [envelope.frame_for(key)]
        forget_here(store)
    assert monotonic() - began < 2, "it is asked about once a second, for 200 ms"
    store.messages.hot.committed([envelope])
    if fault == "pause":
        valkey.resume()


async def test_what_waits_for_redis_is_bounded(valkey: Valkey, store: Store) -> None:
    elsewhere = HotRedis(valkey.url, 1 << 20)  # not started: nothing is written
    for _ in range(3000):
        elsewhere.put(store.envelope(KEYS))
    assert len(elsewhere._waiting) == 1000
    await elsewhere.close()


async def names(redis: Any) -> list[bytes]:
    return [name async for name in redis.scan_iter("relay:hot:*")]


async def written(redis: Any, envelope: Envelope) -> None:
    async with asyncio.timeout(10):
        while not await redis.exists(key_of(envelope)):
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("patient")
async def test_the_oldest_copies_of_a_node_make_room_within_its_bytes(
    valkey: Valkey, store: Store, redis: Any
) -> None:
    elsewhere = HotRedis(valkey.url, 100_000)
    elsewhere.start()
    kept = []
    for _ in range(40):
        kept.append(store.envelope(KEYS, body="x" * 10_000))
        elsewhere.put(kept[-1])
        await written(redis, kept[-1])
    assert sorted(await names(redis)) == sorted(key_of(one).encode() for one in kept[-9:])
    # Blocks of memory are larger than what they hold, by a quarter at most.
    assert sum([await redis.memory_usage(name) for name in await names(redis)]) < 125_000
    huge, small = store.envelope(KEYS, body="x" * 100_000), store.envelope(KEYS)
    elsewhere.put(huge)
    elsewhere.put(small)
    await written(redis, small)
    assert not await redis.exists(key_of(huge)), "larger than everything together"
    assert await redis.exists(key_of(kept[-1]))
    await elsewhere.close()


@pytest.mark.usefixtures("patient")
async def test_many_small_copies_are_bounded_in_number(
    valkey: Valkey, store: Store, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.store.hot_redis._MOST_COPIES", 50)
    monkeypatch.setattr("relay.store.hot_redis._AT_ONCE", 20)
    elsewhere = HotRedis(valkey.url, 1 << 20)
    elsewhere.start()
    sent = [store.envelope(KEYS) for _ in range(90)]
    for envelope in sent:
        elsewhere.put(envelope)
    await written(redis, sent[-1])
    assert sorted(await names(redis)) == sorted(key_of(one).encode() for one in sent[-50:])
    await elsewhere.close()


async def test_what_redis_may_hold_though_it_did_not_answer_counts(
    valkey: Valkey, store: Store, redis: Any
) -> None:
    elsewhere = HotRedis(valkey.url, 100_000)
    elsewhere.start()
    first = store.envelope(KEYS, body="x" * 10_000)
    await kept_in_time(elsewhere, redis, first)
    valkey.pause()
    try:
        for _ in range(8):
            elsewhere.put(store.envelope(KEYS, body="x" * 10_000))
        async with asyncio.timeout(5):
            while elsewhere._waiting or monotonic() >= elsewhere._ask_at:
                await asyncio.sleep(0.01)
    finally:
        valkey.resume()
    elsewhere._ask_at = 0
    sent = []
    for _ in range(5):
        sent.append(store.envelope(KEYS, body="x" * 10_000))
        await kept_in_time(elsewhere, redis, sent[-1])
    left = await names(redis)
    assert len(left) <= 9
    assert {key_of(one).encode() for one in sent} <= set(left)
    assert key_of(first).encode() not in left
    await elsewhere.close()


@pytest.mark.usefixtures("patient")
async def test_of_the_relays_own_valkey_hot_messages_are_evicted_before_anything_else(
    store: Store, tmp_path: Path
) -> None:
    own = EmbeddedValkey(tmp_path / "own")
    await own.start()
    redis = Redis.from_url(own.url)
    try:
        await redis.config_set("maxmemory", str(12 << 20))
        lines = [f"relay:relay:at:user{number}" for number in range(3000)]
        async with redis.pipeline(transaction=False) as pipe:
            for name in lines:
                # As old as it gets before it is renewed.
                pipe.set(name, "phone node 1 1 -", ex=KEPT_SECONDS * 2 // 3)
            await pipe.execute()
        elsewhere = HotRedis(own.url, 1 << 30)
        elsewhere.start()
        hot = [store.envelope(KEYS, body="x" * 40_000) for _ in range(600)]
        for start in range(0, len(hot), 20):
            for envelope in hot[start : start + 20]:
                elsewhere.put(envelope)
            await written(redis, hot[start + 19])
        await elsewhere.close()
        assert (await redis.info("stats"))["evicted_keys"] > 300
        assert await redis.exists(*lines) == len(lines)
    finally:
        await redis.aclose()
        await own.stop()


@pytest.mark.usefixtures("patient")
async def test_in_a_cluster_copies_make_room_and_withdrawn_ones_leave_as_well(
    store: Store, tmp_path: Path
) -> None:
    async with valkey_cluster(tmp_path) as running:
        elsewhere = HotRedis(running[1].url.replace("redis://", "redis+cluster://"), 100_000)
        elsewhere.start()
        redis = elsewhere._redis
        sent = [store.envelope(KEYS, conv=f"talk{number}", body="x" * 10_000) for number in range(20)]
        for envelope in sent:
            elsewhere.put(envelope)
            await written(redis, envelope)
        assert [bool(await redis.exists(key_of(one))) for one in sent] == [False] * 11 + [True] * 9
        elsewhere.forget(sent[-1].doc_id)
        await left(redis, sent[-1])
        assert await redis.exists(key_of(sent[-2]))
        await elsewhere.close()
