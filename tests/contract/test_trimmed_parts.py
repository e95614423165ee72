"""Messages to many devices, some of which are full, on a real mongod: what is left out is booked once, with the head."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import pytest

from relay.store.audience import Audience, Roster
from relay.store.mongo import PyMongoError
from relay.store.submissions import Stored, Submission
from relay.wire.envelope import Envelope
from relay.wire.errors import RelayError
from relay.wire.ids import PARTS_KEY
from tests.support.store import Store

INLINE = 3
PEOPLE = [f"p{number}" for number in range(7)]
KEYS = [f"{user}/phone" for user in PEOPLE]
FULL = ["full/phone", "full/tablet"]
MEMBERS = {user: [f"{user}/phone"] for user in ["ann", *PEOPLE]} | {"full": FULL}


def large(
    store: Store, *, again: bool = False, **fields: Any
) -> tuple[Submission, asyncio.Future[Stored | RelayError]]:
    return store.submission(store.envelope(KEYS, trimmed=FULL, **fields), again=again, inline=INLINE)


async def sent(store: Store) -> Envelope:
    one, outcome = large(store)
    await store.large.commit([one])
    assert isinstance(await outcome, Stored)
    return one.envelope


async def documents(store: Store) -> list[dict[str, Any]]:
    return [document async for document in store.mongo.messages.find().sort("_id", 1)]


async def ack_all(store: Store, keys: list[str], doc_id: str) -> None:
    assert all(await asyncio.gather(*(store.ack(key, doc_id) for key in keys)))


def books(store: Store) -> tuple[int, int, int]:
    """Accepted, trimmed, waiting."""
    return store.ledger.count("accepted"), store.ledger.count("trimmed"), store.ledger.waiting


def later(store: Store, monkeypatch: pytest.MonkeyPatch, full: list[str]) -> None:
    """From now on these are full."""

    async def resolve_all(names: Any) -> dict[str, Audience]:
        return {name: Audience(name, Roster(MEMBERS, full=frozenset(full))) for name in names}

    monkeypatch.setattr(store.audiences, "resolve_all", resolve_all)


async def _never(*_: Any) -> None:
    return None


async def test_only_the_head_says_who_was_left_out_and_it_is_booked_once(store: Store) -> None:
    envelope = await sent(store)
    found = await documents(store)
    assert [one.get("trimmed") for one in found] == [2, None, None]
    assert books(store) == (len(KEYS) + 2, 2, len(KEYS))
    assert store.accepted == [envelope], "told of once, not part by part"
    assert (store.accepted[0].awaiting, store.accepted[0].trimmed) == (KEYS, FULL)
    assert [piece.trimmed for piece in store.committed] == [FULL, [], []]
    await ack_all(store, KEYS, envelope.doc_id)
    assert await documents(store) == []
    assert books(store) == (len(KEYS) + 2, 2, 0)
    assert (await store.fates.find([envelope.doc_id]))[envelope.doc_id].fate == "delivered"


@pytest.mark.parametrize("gone", [False, True])
async def test_a_message_that_was_given_up_and_is_stored_after_all_books_who_was_left_out(
    store: Store, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    one, outcome = large(store)
    one.deadline = monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(store.large, "_succeed", _never)
        await store.large.commit([one])
    assert isinstance(await outcome, RelayError)
    doc_id = one.envelope.doc_id
    if gone:
        await ack_all(store, KEYS, doc_id)
        assert await documents(store) == []
    given_up = store.large._given_up[doc_id]
    store.large._given_up[doc_id] = given_up._replace(since=given_up.since - 60)
    await store.large.settle_given_up()
    if not gone:
        await ack_all(store, KEYS, doc_id)
    assert books(store) == (len(KEYS) + 2, 2, 0)


async def test_an_earlier_attempt_that_had_come_through_is_booked_as_it_was_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, outcome = large(store)
    with monkeypatch.context() as patch:
        patch.setattr(store.large, "_succeed", _never)
        await store.large._attempt([one], 0)
    one.audience.stale = True
    later(store, monkeypatch, ["p0/phone"])
    await store.large._attempt([one], 1)
    assert isinstance(await outcome, Stored)
    assert books(store) == (len(KEYS) + 2, 2, len(KEYS))
    assert [(told.awaiting, told.trimmed) for told in store.accepted] == [(KEYS, FULL)]
    await ack_all(store, KEYS, one.envelope.doc_id)
    assert await documents(store) == []
    assert books(store) == (len(KEYS) + 2, 2, 0)


async def test_an_earlier_attempt_that_is_gone_already_is_booked_as_it_was_written(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, outcome = large(store)
    with monkeypatch.context() as patch:
        patch.setattr(store.large, "_succeed", _never)
        await store.large._attempt([one], 0)
    await ack_all(store, KEYS, one.envelope.doc_id)
    one.audience.stale = True
    later(store, monkeypatch, ["p0/phone"])
    await store.large._attempt([one], 1)
    assert isinstance(await outcome, Stored)
    assert books(store) == (len(KEYS) + 2, 2, 0)
    assert await documents(store) == []


async def test_a_retry_leaves_out_whoever_is_full_by_then(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, outcome = large(store)
    one.audience.stale = True

    async def fails(*_: Any) -> None:
        raise PyMongoError

    with monkeypatch.context() as patch:
        patch.setattr(store.large, "_make_heads", fails)
        later(store, monkeypatch, FULL)
        with pytest.raises(PyMongoError):
            await store.large._attempt([one], 0)
    one.audience.stale = True
    later(store, monkeypatch, [*KEYS[:5], *FULL])
    await store.large._attempt([one], 1)
    assert isinstance(await outcome, Stored)
    (left,) = await documents(store)
    assert (left["awaiting"], left["trimmed"]) == (KEYS[5:], 7)
    assert books(store) == (9, 7, 2)
    assert one.envelope.shared
    assert [piece.shared for piece in store.committed] == [True]
    await ack_all(store, KEYS[5:], one.envelope.doc_id)
    assert await documents(store) == []


async def test_when_everybody_became_full_meanwhile_there_is_one_document_that_waits_for_nobody(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, outcome = large(store)
    one.audience.stale = True
    later(store, monkeypatch, [*KEYS, *FULL])
    await store.large.commit([one])
    assert isinstance(await outcome, Stored)
    (left,) = await documents(store)
    assert (left["awaiting"], left["trimmed"]) == ([], 9)
    assert PARTS_KEY not in left["awaiting"]
    assert books(store) == (9, 9, 0)
    assert await store.endings.remove([left["_id"]], "delivered", deadline=monotonic() + 5)
    assert await documents(store) == []
    assert (await store.fates.find([left["_id"]]))[left["_id"]].fate == "trimmed"
    assert books(store) == (9, 9, 0)
