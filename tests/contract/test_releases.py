"""Releases: nobody's message waits for a mailbox that is nobody's any more. On a real mongod."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pymongo import AsyncMongoClient

from models.accounts import Device
from models.conversations import Membership
from models.housekeeping import Release
from relay.store import releases as module
from relay.store.batcher import BatcherClosed
from relay.store.embedded import EmbeddedMongo
from relay.store.messages import Awaited
from relay.store.releases import Planned, Releases
from relay.wire.ids import RELAY_USER
from tests.support.store import Store
from tests.support.waiting import until

SETTLE = 20.0


@pytest.fixture
async def store(store: Store) -> Store:
    for document in (Device, Membership, Release):
        await document.get_motor_collection().delete_many({})
    return store


@pytest.fixture
def releases(store: Store) -> Releases:
    return Releases(store.messages, store.endings, settle_seconds=SETTLE)


async def member(conv: str, user: str, *, removed: bool = False, joined: datetime | None = None) -> None:
    now = datetime.now(UTC)
    row: dict[str, Any] = {
        "conversationId": conv,
        "user": user,
        "role": "member",
        "joinedAt": joined or now - timedelta(hours=1),
        "updatedAt": now,
    }
    if removed:
        row["removedAt"] = now
    await Membership.get_motor_collection().replace_one({"_id": f"{conv} {user}"}, row, upsert=True)


async def device(key: str, **fields: Any) -> None:
    now = datetime.now(UTC)
    row = {"user": key.partition("/")[0], "createdAt": now - timedelta(hours=1), "lastSeen": now, **fields}
    await Device.get_motor_collection().replace_one({"_id": key}, row, upsert=True)


async def planned() -> list[dict[str, Any]]:
    """The releases that are still to be done."""
    return [dict(one) async for one in Release.get_motor_collection().find({})]


async def make_due(release: Planned, *, settled: bool = False, age: timedelta | None = None) -> None:
    """The next pass of a release is due; ``settled``: what was resolved before it has been committed by now."""
    name = release.document["_id"]
    found = await Release.get_motor_collection().find_one({"_id": name})
    assert found is not None
    if settled:
        age = timedelta(seconds=SETTLE + 1)
    change = {"dueAt": datetime.now(UTC) - timedelta(seconds=1)}
    if age is not None:
        change["at"] = datetime.now(UTC) - age
    await Release.get_motor_collection().update_one({"_id": name}, {"$set": change})


async def awaiting(store: Store, doc_id: str) -> list[str] | None:
    found = await store.document(doc_id)
    return None if found is None else sorted(found["awaiting"])


async def balance(store: Store) -> None:
    assert store.ledger.waiting == await store.waiting_deliveries()


async def fate(store: Store, doc_id: str) -> tuple[str, list[str]]:
    found = (await store.fates.find([doc_id]))[doc_id]
    return found.fate, list(found.delivered)


async def test_what_waits_for_a_removed_member_is_released_in_that_conversation_only(
    store: Store, releases: Releases
) -> None:
    await device("bob/phone")
    await device("bob/tablet")
    await member("talk", "bob", removed=True)
    shared = await store.put(["bob/phone", "bob/tablet", "cleo/phone"])
    sole = await store.put(["bob/phone"])
    elsewhere = await store.put(["bob/phone"], conv="other")
    await releases.run(await releases.plan("bob", conversation="talk"))
    assert await awaiting(store, shared.doc_id) == ["cleo/phone"]
    assert await awaiting(store, sole.doc_id) is None
    assert await awaiting(store, elsewhere.doc_id) == ["bob/phone"]
    assert store.ledger.count("released") == 3
    assert await fate(store, sole.doc_id) == ("released", [])
    assert [pair for one in store.settlements for pair in one.released if pair[1] == "bob/tablet"] == [
        (shared.doc_id, "bob/tablet")
    ]
    await balance(store)


async def test_placeholders_of_a_person_are_released_too(store: Store, releases: Releases) -> None:
    await member("talk", "bob", removed=True)
    waiting = await store.put(["bob/*", "cleo/*"])
    blocked = await store.put(["bob/!", "cleo/*"])
    await releases.run(await releases.plan("bob", conversation="talk"))
    assert await awaiting(store, waiting.doc_id) == await awaiting(store, blocked.doc_id) == ["cleo/*"]
    await balance(store)


async def test_what_somebody_got_before_is_delivered_and_not_released(
    store: Store, releases: Releases
) -> None:
    await device("bob/phone")
    await member("talk", "bob", removed=True)
    got = await store.put(["bob/phone", "cleo/phone"])
    await store.ack("cleo/phone", got.doc_id)
    nobody = await store.put(["bob/phone"])
    await releases.run(await releases.plan("bob", conversation="talk"))
    assert await fate(store, got.doc_id) == ("delivered", ["cleo"])
    assert await fate(store, nobody.doc_id) == ("released", [])
    assert (store.ledger.count("acknowledged"), store.ledger.count("released")) == (1, 2)
    await balance(store)


async def test_the_message_that_tells_of_the_removal_is_not_released(
    store: Store, releases: Releases
) -> None:
    await device("bob/phone")
    await member("talk", "bob", removed=True)
    system = await store.put(["bob/phone", "cleo/phone"], user=RELAY_USER, device="relay")
    normal = await store.put(["bob/phone", "cleo/phone"])
    name = await releases.plan("bob", conversation="talk")
    await releases.run(name)
    await make_due(name, settled=True)
    await releases.run_due()
    assert await awaiting(store, system.doc_id) == ["bob/phone", "cleo/phone"]
    assert await awaiting(store, normal.doc_id) == ["cleo/phone"]
    await balance(store)


async def test_everything_that_waits_for_a_removed_device_is_released(
    store: Store, releases: Releases
) -> None:
    await device("bob/phone", removedAt=datetime.now(UTC))
    await device("bob/tablet")
    one = await store.put(["bob/phone", "bob/tablet"])
    system = await store.put(["bob/phone"], user=RELAY_USER, device="relay", conv="other")
    await releases.run(await releases.plan("bob/phone"))
    assert await awaiting(store, one.doc_id) == ["bob/tablet"]
    assert await awaiting(store, system.doc_id) is None
    await balance(store)


async def test_many_messages_are_released_page_by_page(
    store: Store, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAGE", 3)
    await member("talk", "bob", removed=True)
    await store.send(
        *(store.envelope(["bob/*"] if number % 2 else ["bob/*", "cleo/*"]) for number in range(20))
    )
    await releases.run(await releases.plan("bob", conversation="talk"))
    assert await store.mongo.messages.count_documents({"awaiting": "bob/*"}) == 0
    assert await store.waiting_deliveries() == 10
    await balance(store)


async def test_a_document_that_is_no_message_does_not_hold_up_the_others(
    store: Store, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAGE", 2)
    await member("talk", "bob", removed=True)
    for number in range(2):
        await store.mongo.messages.insert_one(
            {"_id": f"talk poison{number}", "conversationId": "talk", "awaiting": ["bob/*"]}
        )
    await store.send(*(store.envelope(["bob/*"]) for _ in range(5)))
    await releases.run(await releases.plan("bob", conversation="talk"))
    left = [one["_id"] async for one in store.mongo.messages.find({"awaiting": "bob/*"})]
    assert sorted(left) == ["talk poison0", "talk poison1"]


async def test_a_release_is_done_again_when_nothing_resolved_before_can_be_on_its_way(
    store: Store, releases: Releases
) -> None:
    await member("talk", "bob", removed=True)
    name = await releases.plan("bob", conversation="talk")
    await releases.run(name)
    (plan,) = await planned()
    assert plan["passes"] == 1
    later = (plan["dueAt"] - plan["at"]).total_seconds()
    assert SETTLE <= later < SETTLE + 5
    assert await releases.run_due() == 0
    # Another node had resolved its recipients before.
    straggler = await store.put(["bob/*", "cleo/*"])
    await make_due(name, settled=True)
    assert await releases.run_due() == 1
    assert await awaiting(store, straggler.doc_id) == ["cleo/*"]
    assert await planned() == []
    await balance(store)


async def test_a_release_whose_node_died_is_done_by_the_job(store: Store, releases: Releases) -> None:
    left = await releases.plan("bob", conversation="talk")
    await member("talk", "bob", removed=True)
    waiting = await store.put(["bob/*"])
    assert await releases.run_due() == 0, "its own node still may"
    await make_due(left)
    assert await releases.run_due() == 1
    assert await awaiting(store, waiting.doc_id) is None


@pytest.mark.parametrize("mailbox", ["bob", "bob/phone"])
async def test_nothing_is_released_before_the_removal_takes_effect(
    store: Store, releases: Releases, mailbox: str
) -> None:
    await member("talk", "bob")
    await device("bob/phone")
    waiting = await store.put(["bob/phone"])
    name = await releases.plan(mailbox, conversation="talk" if mailbox == "bob" else None)
    await releases.run(name)
    assert await awaiting(store, waiting.doc_id) == ["bob/phone"]
    assert len(await planned()) == 1
    await make_due(name, age=timedelta(minutes=1))
    await releases.run_due()
    assert len(await planned()) == 1, "it may still come"
    await make_due(name, age=timedelta(minutes=6))
    await releases.run_due()
    assert await planned() == [], "it never came"
    assert await awaiting(store, waiting.doc_id) == ["bob/phone"]


async def test_who_is_back_keeps_what_was_sent_since(store: Store, releases: Releases) -> None:
    name = await releases.plan("bob", conversation="talk")
    back = datetime.now(UTC) + timedelta(seconds=1)
    at = int(back.timestamp() * 1000)
    await member("talk", "bob", joined=back)
    before = await store.put(["bob/*", "cleo/*"], at=at - 1)
    after = await store.put(["bob/*", "cleo/*"], at=at)
    await releases.run(name)
    assert await awaiting(store, before.doc_id) == ["cleo/*"]
    assert await awaiting(store, after.doc_id) == ["bob/*", "cleo/*"]
    await balance(store)


async def test_a_device_that_is_back_keeps_what_was_sent_since(store: Store, releases: Releases) -> None:
    name = await releases.plan("bob/phone")
    back = datetime.now(UTC) + timedelta(seconds=1)
    at = int(back.timestamp() * 1000)
    await device("bob/phone", since=back)
    before = await store.put(["bob/phone"], at=at - 1)
    after = await store.put(["bob/phone"], at=at)
    await releases.run(name)
    assert await awaiting(store, before.doc_id) is None
    assert await awaiting(store, after.doc_id) == ["bob/phone"]


async def test_a_release_that_could_not_be_committed_stays_planned(
    store: Store, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    await member("talk", "bob", removed=True)
    waiting = await store.put(["bob/*"])
    name = await releases.plan("bob", conversation="talk")
    monkeypatch.setattr(module, "_GIVE_UP_SECONDS", 0.0)
    admin = store.mongo.client.admin
    await admin.command(
        "configureFailPoint",
        "failCommand",
        mode="alwaysOn",
        data={
            "failCommands": ["delete"],
            "namespace": f"{store.mongo.database.name}.messages",
            "errorCode": 50,
        },
    )
    try:
        await releases.run(name)
    finally:
        await admin.command("configureFailPoint", "failCommand", mode="off")
    (plan,) = await planned()
    assert plan["passes"] == 0
    monkeypatch.undo()
    await make_due(name)
    assert await releases.run_due() == 1
    assert await awaiting(store, waiting.doc_id) is None
    assert (await planned())[0]["passes"] == 1
    await store.acks.settle_doubts()
    await balance(store)


async def test_a_release_that_meets_the_end_of_its_node_stays_planned_and_fails_nothing(
    store: Store, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    await device("bob/phone", removedAt=datetime.now(UTC))
    waiting = await store.put(["bob/phone"])
    plan = await releases.plan("bob/phone")

    async def closed(*_: Any, **__: Any) -> bool:
        raise BatcherClosed

    with monkeypatch.context() as patch:
        patch.setattr(store.endings, "release", closed)
        await releases.run(plan)
    await make_due(plan)
    assert await releases.run_due() == 1
    assert await awaiting(store, waiting.doc_id) is None


async def test_repeated_and_concurrent_releases_count_once(store: Store, releases: Releases) -> None:
    await member("talk", "bob", removed=True)
    await store.send(*(store.envelope(["bob/*", "cleo/*"]) for _ in range(10)))
    names = [await releases.plan("bob", conversation="talk") for _ in range(3)]
    await asyncio.gather(*(releases.run(name) for name in [*names, *names]))
    assert store.ledger.count("released") == 10
    await balance(store)


async def test_a_release_that_takes_long_is_not_done_by_another_node_meanwhile(
    store: Store, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    await device("bob/phone", removedAt=datetime.now(UTC))
    for _ in range(6):
        await store.put(["bob/phone"])
    monkeypatch.setattr(module, "_PAGE", 2)
    monkeypatch.setattr(module, "_AT_WORK", timedelta(seconds=0.6))
    release, pages = store.endings.release, list[int]()

    async def slowly(doc_ids: list[str], keys: list[str], *, deadline: float) -> bool:
        pages.append(len(doc_ids))
        await asyncio.sleep(0.4)
        return await release(doc_ids, keys, deadline=deadline)

    monkeypatch.setattr(store.endings, "release", slowly)
    other = Releases(store.messages, store.endings, settle_seconds=SETTLE)
    author = asyncio.create_task(releases.run(await releases.plan("bob/phone")))
    looks = 0
    while not author.done():
        await asyncio.sleep(0.05)
        looks += await other.run_due()
    await author
    assert (pages, looks) == ([2, 2, 2], 0)
    assert store.ledger.count("released") == 6


@asynccontextmanager
async def hanging_searches(uri: str, store: Store, times: int) -> AsyncIterator[None]:
    """The next so many times that the store's client looks for messages nothing comes back for eight seconds."""
    client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(uri)
    data = {
        "failCommands": ["find"],
        "appName": "relay",
        "namespace": f"{store.mongo.database.name}.messages",
        "blockConnection": True,
        "blockTimeMS": 8000,
    }
    async with client:
        await client.admin.command("configureFailPoint", "failCommand", mode={"times": times}, data=data)
        try:
            yield
        finally:
            # Waits for those that still hang.
            await client.admin.command("configureFailPoint", "failCommand", mode="off")


async def test_searches_that_hang_hold_up_other_releases_for_their_time_limit_only(
    mongod: EmbeddedMongo, store: Store, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.store.messages._FIND_SECONDS", 1.0)
    names = [f"bob/{number}" for number in range(5)]
    for name in names:
        await device(name, removedAt=datetime.now(UTC))
    waiting = await store.put(names)
    plans = [await releases.plan(name) for name in names]
    async with hanging_searches(mongod.uri, store, 4), asyncio.timeout(6):
        hung = [asyncio.create_task(releases.run(plan)) for plan in plans[:4]]
        await asyncio.sleep(0.5)
        await releases.run(plans[4])
        await asyncio.gather(*hung)
    assert await awaiting(store, waiting.doc_id) == names[:4]
    assert sorted(plan["passes"] for plan in await planned()) == [0, 0, 0, 0, 1]
    for plan in plans[:4]:
        await make_due(plan)
    assert await releases.run_due() == 4
    assert await awaiting(store, waiting.doc_id) is None
    await balance(store)


async def test_a_release_that_hangs_keeps_no_other_that_is_due_from_being_done(
    store: Store, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"bob/{number}" for number in range(5)]
    for name in names:
        await device(name, removedAt=datetime.now(UTC))
        await make_due(await releases.plan(name))
    waiting = await store.put(names)
    search, answers = store.messages.awaited, asyncio.Event()

    # A fail point of MongoDB that is to hold up one search may hold up two that come at the same moment.
    async def awaited(keys: Sequence[str], **which: Any) -> Awaited:
        if names[0] in keys:
            await answers.wait()
        return await search(keys, **which)

    monkeypatch.setattr(store.messages, "awaited", awaited)
    job = asyncio.create_task(releases.run_due())

    async def one_left() -> bool:
        return await awaiting(store, waiting.doc_id) == names[:1]

    await until(one_left, 10, "all others are released")
    assert not job.done()
    answers.set()
    assert await job == 5
    assert await store.waiting_deliveries() == 0
