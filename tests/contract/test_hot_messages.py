"""Messages that many devices drain, on a real mongod: read and encoded once, and never delivered when they are gone."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from time import monotonic

import pytest

from relay.store.hot import HotMessages
from relay.wire.envelope import Envelope
from tests.support.backlog import message
from tests.support.store import Store

KEYS = [f"p{number}/phone" for number in range(8)]


@pytest.fixture
async def store(store: Store) -> Store:
    store.messages.hot = HotMessages(1 << 20)
    return store


async def page(store: Store, key: str, *, limit: int = 100, max_bytes: int = 1 << 20) -> list[Envelope]:
    found = await store.messages.waiting((key,), store.clock.now(), limit=limit, max_bytes=max_bytes)
    return found.envelopes


async def warmed(store: Store, key: str = KEYS[0]) -> None:
    """The messages that wait for this device are hot."""
    await page(store, key)
    for _ in range(10):
        store.messages.hot.asked(1, 1)
    assert store.messages.hot.warm


async def test_many_devices_get_one_encoded_frame(store: Store) -> None:
    sent = [await store.put(KEYS) for _ in range(3)]
    frames = [[one.frame_for(key) for one in await page(store, key)] for key in KEYS]
    assert [json.loads(frame)["id"] for frame in frames[0]] == [one.id for one in sent]
    for others in frames[1:]:
        assert all(one is other for one, other in zip(frames[0], others, strict=True))


async def test_what_is_hot_is_not_read_again(store: Store) -> None:
    envelope = await store.put(KEYS, body="as it was")
    await warmed(store)
    await store.mongo.messages.update_one({"_id": envelope.doc_id}, {"$set": {"body": "read again"}})
    (found,) = await page(store, KEYS[1])
    assert found.body == "as it was"
    assert found.shared


async def test_warm_or_cold_the_same_pages_come(store: Store) -> None:
    sent = [await store.put(KEYS, body="x" * 100 * number) for number in range(12)]
    await store.put(["cleo/phone"])
    cold = [one.doc_id for one in await page(store, KEYS[2])]
    await warmed(store)
    # Half of them have left the memory.
    for envelope in sent[::2]:
        store.messages.hot.forget(envelope.doc_id)
    assert [one.doc_id for one in await page(store, KEYS[2])] == cold == [one.doc_id for one in sent]
    some = await store.messages.waiting((KEYS[3],), store.clock.now(), limit=5, max_bytes=1 << 20)
    assert [one.doc_id for one in some.envelopes] == cold[:5]
    assert not some.exhausted
    few = await store.messages.waiting((KEYS[3],), store.clock.now(), limit=100, max_bytes=3000)
    assert 0 < len(few.envelopes) < 12
    assert not few.exhausted
    assert sum(one.size for one in few.envelopes) <= 3000


async def test_what_ended_is_not_delivered_though_it_is_hot(store: Store) -> None:
    gone, stays = await store.put(KEYS), await store.put(KEYS)
    await warmed(store)
    assert await store.endings.remove([gone.doc_id], "withdrawn", deadline=monotonic() + 5)
    assert [one.doc_id for one in await page(store, KEYS[4])] == [stays.doc_id]
    assert await store.ack(KEYS[4], stays.doc_id)
    assert await page(store, KEYS[4]) == []


async def test_another_incarnation_of_an_id_is_another_message(store: Store) -> None:
    first = await store.put(KEYS, body="first")
    await warmed(store)
    await store.mongo.messages.delete_many({})
    await store.put(KEYS, id=first.id, body="second")
    assert [one.body for one in await page(store, KEYS[5])] == ["second"]


async def test_each_device_knows_the_part_that_it_awaits(store: Store) -> None:
    envelope = store.envelope(KEYS)
    one, outcome = store.submission(envelope, inline=3)
    await store.large.commit([one])
    await outcome
    await warmed(store)
    for number, key in enumerate(KEYS):
        (found,) = await page(store, key)
        assert found.stored_id == one.pieces[number // 3].stored_id
        assert (found.number, found.writing) == (number // 3, one.writing)
        await store.ack(key, found.stored_id)
    assert await store.waiting_deliveries() == 0


async def test_a_part_without_its_head_is_not_delivered_though_it_is_hot(store: Store) -> None:
    envelope = store.envelope(KEYS)
    one, outcome = store.submission(envelope, inline=3)
    await store.large.commit([one])
    await outcome
    await warmed(store)
    await store.mongo.messages.delete_one({"_id": envelope.doc_id})
    store.messages.heads._known.clear()
    assert await page(store, KEYS[7]) == []


def test_the_memory_is_bounded_and_what_is_used_least_leaves() -> None:
    hot = HotMessages(10_000)
    for number in range(20):
        hot.put(message(number, *KEYS))
        hot.find(message(0).doc_id, 0)
    assert hot.size <= 10_000
    assert len(hot) < 20
    assert hot.find(message(0).doc_id, 0) is not None
    assert hot.find(message(1).doc_id, 1) is None
    assert hot.find(message(19).doc_id, 18) is None, "another seq is another message"


def test_what_only_one_device_gets_or_is_sealed_is_not_kept() -> None:
    hot = HotMessages(10_000)
    hot.put(message(1, KEYS[0]))
    sealed = message(2, *KEYS)
    sealed.sealed = {KEYS[0]: "abc"}
    hot.put(sealed)
    assert len(hot) == 0
    nothing = HotMessages(0)
    nothing.put(message(3, *KEYS))
    assert len(nothing) == 0


def test_a_message_leaves_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    hot = HotMessages(10_000)
    hot.put(message(1, *KEYS))
    monkeypatch.setattr("relay.store.hot._SECONDS", 0)
    hot.put(message(2, *KEYS))
    assert hot.find(message(2).doc_id, 2) is None
    assert hot.find(message(1).doc_id, 1) is not None
    assert hot.size > 0


async def test_what_is_old_leaves_though_nobody_asks_and_the_rest_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hot = HotMessages(1 << 30)
    monkeypatch.setattr("relay.store.hot._SECONDS", -1)
    for number in range(1700):
        hot.put(message(number, *KEYS))
    hot.forget("talk x")
    monkeypatch.setattr("relay.store.hot._SECONDS", 300)
    stays = message(1700, *KEYS)
    hot.put(stays)
    turns = 0
    done = asyncio.get_running_loop().create_task(hot.tidy())
    while not done.done():
        turns += 1
        await asyncio.sleep(0)
    assert len(hot) == 1
    assert hot.find(stays.doc_id, 1700) is not None
    assert hot._withdrawn == {}
    assert turns > 3, "others have their turn in between"
    hot.forget(stays.doc_id)
    assert hot.size == 0


def test_a_withdrawn_message_is_not_taken_back_for_a_while() -> None:
    hot = HotMessages(1 << 20)
    hot.put(message(1, *KEYS))
    hot.withdrawn_elsewhere(message(1).doc_id)
    hot.put(message(1, *KEYS))
    hot.committed(message(1, *KEYS).split(3, "aaaaaaaaaaaa"))
    assert len(hot) == 0
    for number in range(2, 10_100):
        hot.forget(message(number).doc_id)
    assert len(hot._withdrawn) == 10_000
    hot.put(message(1, *KEYS))
    assert len(hot) == 1


async def test_every_piece_of_a_message_counts_toward_the_limit(store: Store) -> None:
    hot = HotMessages(1 << 30)
    pieces = store.envelope([f"p{number}/phone" for number in range(10_000)]).split(64, "aaaaaaaaaaaa")
    tracemalloc.start()
    try:
        hot.committed(pieces)
        for number in range(200, 300):
            hot.find(f"{pieces[0].doc_id} aaaaaaaaaaaa.{number}", pieces[0].seq)
        del pieces
        assert tracemalloc.get_traced_memory()[0] < hot.size
        assert hot.size > 250 * 400
    finally:
        tracemalloc.stop()


async def test_a_message_of_more_pieces_than_fit_leaves(store: Store) -> None:
    hot = HotMessages(20_000)
    hot.committed(store.envelope(KEYS).split(1, "aaaaaaaaaaaa"))
    assert len(hot) == 1
    hot.committed(store.envelope(KEYS * 10).split(1, "aaaaaaaaaaaa"))
    assert hot.size <= 20_000
