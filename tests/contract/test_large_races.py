"""Messages in parts when writers, clearers and endings meet half-way, on a real mongod."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import pytest

from relay.store.heads import Heads
from relay.store.mongo import PyMongoError
from relay.store.submissions import Stored, Submission
from relay.wire.envelope import Envelope
from relay.wire.ids import PARTS_KEY, new_id
from tests.support.stand_in import StandIn
from tests.support.store import Store

INLINE = 3
KEYS = [f"p{number}/phone" for number in range(10)]


class Crash(PyMongoError):
    """A call fails here."""


def large(store: Store, **fields: Any) -> tuple[Submission, asyncio.Future[Any]]:
    again = fields.pop("again", False)
    return store.submission(store.envelope(KEYS, **fields), again=again, inline=INLINE)


async def documents(store: Store) -> list[dict[str, Any]]:
    return [document async for document in store.mongo.messages.find().sort("_id", 1)]


async def drained(store: Store, key: str) -> list[Envelope]:
    page = await store.messages.waiting((key,), store.clock.now(), limit=100, max_bytes=1 << 20)
    return page.envelopes


async def claim_of(store: Store, one: Submission) -> dict[str, Any]:
    found = await store.document(one.envelope.doc_id)
    assert found is not None
    assert "claimedAt" in found
    return found


@pytest.mark.parametrize("finished_by_another", [False, True])
async def test_who_clears_a_claim_and_is_held_up_removes_nothing_of_what_is_stored_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch, finished_by_another: bool
) -> None:
    one, outcome = large(store)
    held, go_on = asyncio.Event(), asyncio.Event()
    remove = Heads.remove_parts

    async def held_up(self: Heads, stored_ids: Any) -> None:
        if not held.is_set():
            held.set()
            await go_on.wait()
        await remove(self, stored_ids)

    monkeypatch.setattr(Heads, "remove_parts", held_up)
    assert await store.large._claim([one])
    await store.large._write_parts([one])
    clearing = asyncio.create_task(store.messages.heads.clear(await claim_of(store, one)))
    await held.wait()
    if finished_by_another:
        await store.messages.heads.clear(await claim_of(store, one))
    await store.large._make_heads([one])
    assert not outcome.done()
    await store.large._attempt([one], 1)
    assert isinstance(await outcome, Stored)
    go_on.set()
    await clearing
    assert [len(await drained(store, key)) for key in KEYS] == [1] * len(KEYS)


async def test_a_writer_whose_claim_was_cleared_leaves_no_parts(store: Store) -> None:
    one, outcome = large(store)
    await store.large._claim([one])
    await store.messages.heads.clear(await claim_of(store, one))
    await store.large._write_parts([one])
    await store.large._make_heads([one])
    assert not outcome.done()
    assert await documents(store) == []
    assert await store.waiting_deliveries() == 0


async def test_what_was_taken_over_is_removed_though_the_first_try_to_failed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, _ = large(store)
    await store.large._claim([dead])
    await store.large._write_parts([dead])
    one, outcome = large(store, id=dead.envelope.id)
    with monkeypatch.context() as patch:

        async def fails(self: Heads, stored_ids: Any) -> None:
            raise Crash

        patch.setattr(Heads, "remove_parts", fails)
        with pytest.raises(Crash):
            await store.large._attempt([one], 0)
    await store.large._attempt([one], 1)
    assert isinstance(await outcome, Stored)
    assert {document["writing"] for document in await documents(store)} == {one.writing}
    assert await store.waiting_deliveries() == len(KEYS)


@pytest.mark.parametrize("ending", ["acknowledgement", "withdrawal"])
@pytest.mark.parametrize("happened", [False, True])
async def test_parts_whose_end_was_in_doubt_are_booked_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, ending: str, happened: bool
) -> None:
    one, outcome = large(store)
    await store.large.commit([one])
    await outcome
    failed = False
    name = "_finish_emptied" if ending == "acknowledgement" and happened else "_delete"
    if ending == "acknowledgement" and not happened:
        name = "bulk_write"
    target: Any = store.acks._collection if name == "bulk_write" else store.acks
    before = getattr(target, name)

    async def fails_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            if happened:
                await before(*args, **kwargs)
            raise Crash
        return await before(*args, **kwargs)

    if name == "bulk_write":
        monkeypatch.setattr(store.acks, "_collection", StandIn(target, name, fails_once))
    else:
        monkeypatch.setattr(store.acks, name, fails_once)
    if ending == "acknowledgement":
        assert await store.ack(KEYS[-2], one.envelope.doc_id)
        expected, count = "acknowledged", 1
    else:
        store.endings.discard(one.envelope.doc_id, "withdrawn", deadline=monotonic() + 5)
        # The same lane: it comes after.
        await store.endings.remove([f"talk {new_id()}"], "expired", deadline=monotonic() + 5)
        expected, count = "withdrawn", len(KEYS)
    assert failed
    store.acks._doubts = {k: (e, s - 60) for k, (e, s) in store.acks._doubts.items()}
    await store.acks.settle_doubts()
    assert store.ledger.count(expected) == count  # type: ignore[arg-type]
    assert store.ledger.waiting == await store.waiting_deliveries()


async def test_acknowledging_many_large_messages_by_id_asks_no_more_than_what_waits(store: Store) -> None:
    await store.mongo.messages.insert_many(
        [
            {
                "_id": f"talk {new_id()}",
                "conversationId": "talk",
                "id": "x",
                "sender": {"user": "ann", "device": "phone"},
                "seq": store.clock.next(),
                "createdAt": store.clock.now(),
                "kind": "text",
                "body": "x",
                "awaiting": ["q/phone", PARTS_KEY],
                "parts": 157,
                "writing": "aaaaaaaaaaaa",
            }
            for _ in range(1000)
        ]
    )
    ids = [document["_id"] for document in await documents(store)]
    began = monotonic()
    assert await store.ack("p/phone", *ids)
    assert monotonic() - began < 0.5


async def test_a_retry_that_finds_an_earlier_fate_takes_back_what_it_had_stored(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, outcome = large(store)
    await store.large.commit([first])
    await outcome
    assert all(await asyncio.gather(*(store.ack(key, first.envelope.doc_id) for key in KEYS)))
    second, outcome = large(store, id=first.envelope.id)
    with monkeypatch.context() as patch:

        async def unknown(*_: Any) -> None:
            raise Crash

        patch.setattr(store.large, "_succeed", unknown)
        with pytest.raises(Crash):
            await store.large._attempt([second], 0)
    await store.large._attempt([second], 1)
    assert isinstance(await outcome, Stored)
    assert store.ledger.waiting == await store.waiting_deliveries()


@pytest.mark.parametrize("again", [False, True])
async def test_a_second_message_with_the_seq_of_the_first_is_accepted_once(store: Store, again: bool) -> None:
    first = store.envelope(["bob/phone"])
    second = store.envelope(["bob/phone"], id=first.id, body="another")
    second.seq = first.seq
    await store.send(first)
    if again:
        await store.ack("bob/phone", first.doc_id)
    assert await store.send(second, again=again) == [Stored(first.seq, first.at, fresh=False)]
    assert store.ledger.count("accepted") == 1
    assert len(store.committed) == 1


async def test_parts_that_came_when_their_claim_was_gone_are_removed_once_a_drain_met_them(
    store: Store,
) -> None:
    one, _ = large(store)
    await store.large._claim([one])
    await store.messages.heads.clear(await claim_of(store, one))
    await store.large._write_parts([one])
    stored, outcome = large(store)
    await store.large.commit([stored])
    await outcome
    at_work, _ = large(store)
    await store.large._claim([at_work])
    await store.large._write_parts([at_work])
    heads = store.messages.heads
    heads._known.clear()
    for key in KEYS:
        assert [found.doc_id for found in await drained(store, key)] == [stored.envelope.doc_id]
    assert await heads.remove_orphans(one.envelope.at - 1) == 0
    for key in KEYS:
        await drained(store, key)
    assert await heads.remove_orphans(store.clock.now() + 1) == 3
    left = {document["writing"] for document in await documents(store)}
    assert left == {stored.writing, at_work.writing}
    await store.large._make_heads([at_work])
    assert [len(await drained(store, key)) for key in KEYS] == [2] * len(KEYS)


@pytest.mark.parametrize("ending", ["release", "expiry"])
@pytest.mark.parametrize("stored", [False, True])
async def test_what_is_no_message_yet_is_neither_released_nor_expired(
    store: Store, ending: str, stored: bool
) -> None:
    one, outcome = large(store, expires=store.clock.now() - 1 if ending == "expiry" else None)
    await store.large._claim([one])
    await store.large._write_parts([one])

    async def end() -> None:
        if ending == "release":
            waiting, _ = await store.messages.awaited(KEYS[7:], limit=100)
            assert await store.endings.release(waiting, KEYS[7:], deadline=monotonic() + 5)
        else:
            due = await store.messages.due(store.clock.now(), 100)
            assert await store.endings.remove(due, "expired", deadline=monotonic() + 5)

    await end()
    assert store.ledger.waiting == 0
    if stored:
        await store.large._make_heads([one])
        assert isinstance(await outcome, Stored)
        await end()
        ended = store.ledger.count("released") + store.ledger.count("expired")
        assert ended == (3 if ending == "release" else len(KEYS))
    else:
        await store.messages.heads.clear_claims(store.clock.now() + 1)
    assert store.ledger.waiting == await store.waiting_deliveries()


async def test_a_retry_to_many_finds_what_was_stored_for_few(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, outcome = large(store)
    one.envelope.awaiting = KEYS[:2]
    one.encode()

    async def unknown(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(store.large, "_succeed", unknown)
        with pytest.raises(Crash):
            await store.large._attempt([one], 0)
    one.envelope.awaiting = KEYS
    one.encode()
    store.committed.clear()
    await store.large._attempt([one], 1)
    assert isinstance(await outcome, Stored)
    assert {key for piece in store.committed for key in piece.awaiting} <= set(KEYS[:2])
    assert store.ledger.waiting == await store.waiting_deliveries() == 2


async def test_a_retry_that_begins_anew_leaves_nothing_of_what_it_wrote_too_late(store: Store) -> None:
    one, outcome = large(store)
    await store.large._claim([one])
    await store.messages.heads.clear(await claim_of(store, one))
    await store.large._write_parts([one])
    await store.large._attempt([one], 1)
    assert isinstance(await outcome, Stored)
    assert {document["writing"] for document in await documents(store)} == {one.writing}
