"""First pages of many devices at once: what the store would answer each of them, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from relay.store import backlogs as module
from relay.store.backlogs import Asked, Backlogs
from relay.store.messages import Messages, Page
from relay.store.shards import Shards
from relay.wire.clock import utc_now
from relay.wire.envelope import Envelope
from tests.support.store import Store, open_another

BYTES = 1 << 20


@pytest.fixture
def backlogs(store: Store) -> Backlogs:
    return Backlogs(store.mongo, store.shards, store.messages, timeout=2)


def asked(store: Store, user: str, *, limit: int = 100, max_bytes: int = BYTES) -> Asked:
    return Asked((f"{user}/phone", f"{user}/*"), store.clock.now(), limit, max_bytes)


async def junk(store: Store, number: int, awaiting: Any, **fields: Any) -> None:
    """A document that is no message, though it waits."""
    document = {"_id": f"talk {number}", "conversationId": "talk", "awaiting": awaiting}
    await store.mongo.messages.insert_one({**document, "createdAt": utc_now(), **fields})


async def alone(messages: Messages, one: Asked) -> Page:
    return await messages.waiting(one.keys, one.now, limit=one.limit, max_bytes=one.max_bytes)


def shown(page: Page | None) -> Any:
    if page is None:
        return None
    return [(one.stored_id, one.seq, one.body) for one in page.envelopes], page.exhausted, page.complete


async def test_each_gets_the_page_that_the_store_would_answer_it(store: Store, backlogs: Backlogs) -> None:
    everybody = [f"u{number}/phone" for number in range(6)]
    for number in range(7):
        await store.put(everybody[: number + 1], conv=f"c{number % 3}", body=str(number))
    await store.put(["u0/phone", "u9/*"], conv="c1", body="for a placeholder, too")
    await store.put(["u1/phone"], conv="c2", body="for one alone")
    await store.put(["u2/phone"], body="past its time", expires=store.clock.now() - 1)
    group = [asked(store, f"u{number}") for number in range(10)]
    group += [asked(store, "u0", limit=3), asked(store, "u0", limit=8), asked(store, "u0", max_bytes=1)]
    expected = [await alone(store.messages, one) for one in group]
    assert [len(page.envelopes) for page in expected] == [8, 7, 5, 4, 3, 2, 0, 0, 0, 1, 3, 8, 1]
    for _ in range(3):
        # Cold, then from what is hot.
        found = await backlogs.pages(group)
        assert [shown(page)[0] for page in found] == [shown(page)[0] for page in expected]
        assert [page is not None and page.exhausted for page in found] == [True] * 10 + [False, True, False]
        assert all(page is not None and page.complete for page in found)


async def test_the_contents_of_a_whole_group_are_read_together(
    store: Store, backlogs: Backlogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        await store.put([f"u{number}/phone"], body=str(number))
    await store.put([f"u{number}/phone" for number in range(8)])
    read, reads = store.messages._read_missing, []

    async def read_missing(stored_ids: Sequence[str]) -> dict[str, Envelope]:
        reads.append(len(stored_ids))
        return await read(stored_ids)

    monkeypatch.setattr(store.messages, "_read_missing", read_missing)
    pages = await backlogs.pages([asked(store, f"u{number}") for number in range(8)])
    assert [page and len(page.envelopes) for page in pages] == [2] * 8
    assert reads == [9]


async def test_large_messages_come_by_the_part_that_waits_for_each(store: Store, backlogs: Backlogs) -> None:
    crowd = [f"u{number}/phone" for number in range(150)]
    await store.put(crowd, body="to all")
    group = [asked(store, f"u{number}") for number in (0, 70, 149)]
    pages = await backlogs.pages(group)
    assert [shown(page) for page in pages] == [shown(await alone(store.messages, one)) for one in group]
    assert len({page.envelopes[0].stored_id for page in pages if page is not None}) == 3


async def test_of_parts_without_a_head_the_device_is_told_by_the_store(
    store: Store, backlogs: Backlogs
) -> None:
    message = await store.put([f"u{number}/phone" for number in range(150)])
    await store.put(["ann/phone"])
    await store.mongo.messages.delete_one({"_id": message.doc_id})
    async with open_another(store) as other:
        pages = await Backlogs(other.mongo, other.shards, other.messages, timeout=2).pages(
            [asked(store, "u70"), asked(store, "ann")]
        )
    assert pages[0] is None
    assert pages[1] is not None
    assert len(pages[1].envelopes) == 1


async def test_of_whom_much_waits_nothing_is_said(
    store: Store, backlogs: Backlogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEW", 3)
    monkeypatch.setattr(module, "_MOST", 6)
    for _ in range(4):
        await store.put(["ann/phone"])
    await store.put(["bob/phone"])
    group = [asked(store, "ann"), asked(store, "bob"), asked(store, "cleo")]
    pages = await backlogs.pages(group)
    assert [page and len(page.envelopes) for page in pages] == [None, 1, 0]
    await store.put(["ann/phone"])
    # Not all was looked at: who knows what is behind it.
    assert await backlogs.pages(group) == [None, None, None]


async def test_no_more_is_read_at_once_than_memory_is_meant_for(
    store: Store, backlogs: Backlogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 2)
    monkeypatch.setattr(module, "_MOST_BYTES", 3000)
    for number in range(6):
        await store.put([f"u{number}/phone"], body="x" * 1000)
    pages = await backlogs.pages([asked(store, f"u{number}") for number in range(7)])
    assert [page and len(page.envelopes) for page in pages] == [1, 1, 1, 1, None, None, 0]


async def test_what_is_no_message_at_all_harms_nobody(store: Store, backlogs: Backlogs) -> None:
    await junk(store, 1, "ann/phone")
    await junk(store, 2, ["bob/phone", {"odd": 1}, 7, None], seq=5)
    await junk(store, 3, ["dan/phone"], seq="five")
    await junk(store, 4, ["eve/phone"], seq=1, _id=7)
    for user in ("bob", "cleo", "dan", "eve"):
        await store.put([f"{user}/phone", "zoe/phone"])
    for _ in range(2):
        pages = await backlogs.pages([asked(store, user) for user in ("ann", "bob", "cleo", "dan", "eve")])
        assert [page and len(page.envelopes) for page in pages] == [None, 1, 1, None, None]
    for user, count in (("ann", 0), ("dan", 1), ("eve", 1)):
        assert len((await alone(store.messages, asked(store, user))).envelopes) == count


async def test_while_a_shard_is_down_nobody_is_answered(
    store: Store, backlogs: Backlogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = asked(store, "ann")
    assert shown((await backlogs.pages([one]))[0]) == ([], True, True)
    with monkeypatch.context() as down:
        down.setattr(Shards, "reachable", {"conversationId": {"$lt": "m"}})
        down.setattr(backlogs, "_collection", None)
        assert await backlogs.pages([one, one]) == [None, None]
    assert shown((await backlogs.pages([one]))[0]) == ([], True, True)
