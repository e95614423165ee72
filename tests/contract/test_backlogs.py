"""Which of many mailboxes are empty: never said of one that is not."""

from __future__ import annotations

from typing import Any

import pytest

from relay.store import backlogs as module
from relay.store.backlogs import Backlogs
from relay.store.shards import Shards
from tests.support.store import Store


async def waits(store: Store, number: int, awaiting: Any) -> None:
    document = {"_id": f"talk {number}", "conversationId": "talk", "seq": number, "awaiting": awaiting}
    await store.mongo.messages.insert_one(document)


async def test_the_empty_ones_of_many_are_told(store: Store) -> None:
    await waits(store, 1, ["ann/phone", "bob/phone"])
    await waits(store, 2, ["cleo/*"])
    keys = ["ann/phone", "ann/*", "bob/phone", "cleo/phone", "cleo/*", "dan/phone"]
    found = await Backlogs(store.mongo, store.shards, timeout=2).empty(keys)
    assert found == {"ann/*", "cleo/phone", "dan/phone"}


async def test_where_too_much_waits_to_look_at_nothing_is_called_empty(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST", 3)
    backlogs = Backlogs(store.mongo, store.shards, timeout=2)
    for number in range(2):
        await waits(store, number, ["ann/phone"])
    assert await backlogs.empty(["ann/phone", "bob/phone"]) == {"bob/phone"}
    await waits(store, 7, ["ann/phone"])
    await waits(store, 8, ["bob/phone"])
    assert await backlogs.empty(["ann/phone", "bob/phone"]) == set()


async def test_what_is_no_message_at_all_harms_nobody(store: Store) -> None:
    await waits(store, 1, "ann/phone")
    await waits(store, 2, ["bob/phone", {"odd": 1}, 7, None])
    found = await Backlogs(store.mongo, store.shards, timeout=2).empty(
        ["ann/phone", "bob/phone", "cleo/phone"]
    )
    assert found == {"cleo/phone"}


async def test_while_a_shard_is_down_nobody_is_asked_and_nothing_called_empty(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    backlogs = Backlogs(store.mongo, store.shards, timeout=2)
    assert await backlogs.empty(["ann/phone"]) == {"ann/phone"}
    with monkeypatch.context() as down:
        down.setattr(Shards, "reachable", {"conversationId": {"$lt": "m"}})
        down.setattr(backlogs, "_collection", None)
        assert await backlogs.empty(["ann/phone"]) == set()
    assert await backlogs.empty(["ann/phone"]) == {"ann/phone"}
