"""A message that is sent again while its first copy is delivered and deleted: the second copy is taken back, and nobody gets it before."""

from __future__ import annotations

from copy import copy

import pytest

from relay.store.submissions import Stored
from relay.wire.envelope import Envelope
from tests.support.stand_in import StandIn
from tests.support.store import Store


async def waits(store: Store, key: str = "bob/phone") -> list[int]:
    """The ``seq`` of what this device would drain now."""
    page = await store.messages.waiting([key], store.clock.now(), limit=10, max_bytes=1 << 20)
    return [envelope.seq for envelope in page.envelopes]


def sent_again(store: Store, first: Envelope) -> Envelope:
    second = copy(first)
    second.seq = store.clock.next(first.seq + 1)
    return second


async def test_a_second_copy_is_drained_by_nobody_before_it_is_known_to_be_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await store.put(["bob/phone"])
    second = sent_again(store, first)
    collection = store.commits._collection
    seen: list[list[int]] = []

    async def insert(*args: object, **options: object) -> object:
        # The question whether it was delivered has been answered with no.
        assert await store.ack("bob/phone", first.doc_id)
        done = await collection.insert_many(*args, **options)
        document = await store.document(first.doc_id)
        assert document is not None and document["seq"] == second.seq
        seen.append(await waits(store))
        seen.append(await waits(store))
        return done

    monkeypatch.setattr(store.commits, "_collection", StandIn(collection, "insert_many", insert))
    assert await store.send(second, again=True) == [Stored(first.seq, first.at, fresh=False)]
    assert seen == [[], []]


async def test_what_is_sent_again_and_was_never_taken_is_drained(store: Store) -> None:
    one = store.envelope(["bob/phone", "cleo/phone"])
    assert await store.send(one, again=True) == [Stored(one.seq, one.at, fresh=True)]
    # From the document, from memory, and while somebody else has it.
    for _ in range(3):
        assert await waits(store) == [one.seq]
    assert await store.ack("cleo/phone", one.doc_id)
    assert await waits(store) == [one.seq]
    assert await waits(store, "cleo/phone") == []
    assert await store.ack("bob/phone", one.doc_id)
    assert await store.waiting_deliveries() == 0


async def test_what_is_sent_once_asks_nothing_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await store.put(["bob/phone"])

    async def asked(*_: object) -> object:
        raise AssertionError("a question for every page")

    monkeypatch.setattr(store.fates, "find_some", asked)
    assert await waits(store) == [one.seq]
