"""The jobs that heal and expire, on a real mongod."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from handlers.context import Health
from models.accounts import Device
from relay.jobs.expiry import Expiry
from relay.jobs.health import HealthCheck
from relay.jobs.sweep import LastSeen, Sweep, TimeToLive
from relay.metrics import Metrics
from relay.routing.bus import Alone
from relay.routing.hub import Hub
from relay.security.rates import Rates
from relay.store.embedded import EmbeddedMongo
from relay.store.mongo import Mongo, PyMongoError
from relay.store.shards import Shards
from relay.store.timekeeping import Timekeeper
from tests.support.arriving import arrive
from tests.support.backlog import LocalConnection, MemoryBacklog, message, turns
from tests.support.store import TTL_SECONDS, Store, open_store

Connect = Callable[..., LocalConnection]


@pytest.fixture(scope="module")
async def opened(mongod: EmbeddedMongo) -> AsyncIterator[Store]:
    async with open_store(mongod.uri) as store:
        yield store


@pytest.fixture
async def store(opened: Store) -> Store:
    await opened.clear()
    return opened


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        def make(backlog: MemoryBacklog, **options: Any) -> LocalConnection:
            found = LocalConnection(backlog, **options)
            stack.push_async_callback(found.close)
            found.delivery.start()
            return found

        yield make


def sweep(store: Store, hub: Hub, *, ahead: int = 10_000) -> Sweep:
    """A sweep whose clock runs ``ahead`` ms, so that what was just stored is old enough to be missed."""
    return Sweep(
        hub,
        store.messages,
        store.endings,
        store.metrics,
        lambda: store.clock.now() + ahead,
    )


async def test_what_is_due_ends_as_expired_and_is_counted(store: Store) -> None:
    now = store.clock.now()
    due = await store.put(["bob/phone", "cleo/*"], expires=now - 1)
    # Due for the job, whose time to live is 5 s shorter than the index's, and not yet for MongoDB's own deletion.
    old = await store.put(["bob/phone"], at=now - TTL_SECONDS * 1000 + 4_000)
    fresh = await store.put(["bob/phone"], expires=now + 60_000)
    await Expiry(store.messages, store.endings, store.clock.now).run()
    assert set(await store.messages.read([due.doc_id, old.doc_id, fresh.doc_id])) == {fresh.doc_id}
    assert store.ledger.count("expired") == 3
    assert store.ledger.waiting == await store.waiting_deliveries() == 1
    gone = await store.fates.find([due.doc_id, old.doc_id])
    assert {one.fate for one in gone.values()} == {"expired"}
    assert len(gone) == 2


async def test_expiry_goes_on_until_nothing_is_due(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.jobs.expiry._PAGE", 3)
    now = store.clock.now()
    await store.send(*(store.envelope(["bob/phone"], expires=now - 1) for _ in range(10)))
    await Expiry(store.messages, store.endings, store.clock.now).run()
    assert await store.waiting_deliveries() == 0
    assert store.ledger.count("expired") == 10


async def test_the_sweep_deletes_what_nobody_awaits_any_more(store: Store) -> None:
    left, waits = await store.put(["bob/phone"]), await store.put(["bob/phone"])
    # A node died between its update and its deletion.
    await store.mongo.messages.update_one({"_id": left.doc_id}, {"$set": {"awaiting": []}})
    before = store.metrics.registry.get_sample_value("relay_leftovers_removed_total") or 0
    await sweep(store, Hub()).run()
    assert await store.document(left.doc_id) is None
    assert await store.document(waits.doc_id) is not None
    assert (await store.fates.find([left.doc_id]))[left.doc_id].fate == "delivered"
    assert store.metrics.registry.get_sample_value("relay_leftovers_removed_total") == before + 1


async def test_the_sweep_finds_what_was_not_pushed(store: Store, connect: Connect) -> None:
    hub, backlog = Hub(), MemoryBacklog()
    bob, cleo, dan = (connect(backlog, user=user) for user in ("bob", "cleo", "dan"))
    for one in (bob, cleo, dan):
        hub.add(one)
    await turns()
    # Stored by another node whose hint was lost.
    for envelope in (await store.put(["bob/phone"]), await store.put(["dan/*"])):
        backlog.add(envelope)
    await sweep(store, hub).find_missed()
    await turns()
    assert [len(one.got("msg")) for one in (bob, cleo, dan)] == [1, 0, 1]
    assert store.metrics.registry.get_sample_value("relay_missed_deliveries_total") == 2


async def test_the_sweep_finds_everybody_though_much_waits_for_a_few(
    store: Store, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.jobs.sweep._PAGE", 3)
    hub, backlog = Hub(), MemoryBacklog()
    everybody = [connect(backlog, user=user) for user in ("ann", "bob", "cleo", "dan")]
    for one in everybody:
        hub.add(one)
    await turns()
    for one in everybody:
        for _ in range(5):
            backlog.add(await store.put([one.key]))
    await sweep(store, hub).find_missed()
    await turns()
    assert [len(one.got("msg")) for one in everybody] == [5, 5, 5, 5]


async def test_what_the_sweep_cannot_remove_keeps_nobody_waiting(
    store: Store, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(limit: int) -> list[str]:
        raise PyMongoError("no answer")

    monkeypatch.setattr(store.messages, "leftovers", fail)
    hub, backlog = Hub(), MemoryBacklog()
    bob = connect(backlog)
    hub.add(bob)
    await turns()
    backlog.add(await store.put(["bob/phone"]))
    with pytest.raises(PyMongoError):
        await sweep(store, hub).run()
    await turns()
    assert len(bob.got("msg")) == 1


async def test_the_sweep_leaves_alone_what_is_in_time(store: Store, connect: Connect) -> None:
    hub, backlog = Hub(), MemoryBacklog()
    bob = connect(backlog)
    hub.add(bob)
    await turns()
    backlog.add(await store.put(["bob/phone"]))
    queries = backlog.queries
    await sweep(store, hub, ahead=0).find_missed()
    await turns()
    assert backlog.queries == queries
    assert bob.got("msg") == []


async def test_a_busy_connection_looks_for_itself(store: Store, connect: Connect) -> None:
    hub, backlog = Hub(), MemoryBacklog(message(1))
    bob = connect(backlog)
    hub.add(bob)
    await turns()
    assert bob.delivery.in_flight
    backlog.add(message(2))
    await sweep(store, hub).find_missed()
    async with asyncio.timeout(2):
        while bob.bodies() != [1, 2]:
            await asyncio.sleep(0.005)


async def test_last_seen_is_kept_for_those_who_left_and_now_and_then_for_those_who_stay(
    store: Store, connect: Connect
) -> None:
    hub = Hub()
    left, stays = connect(MemoryBacklog(), user="lea"), connect(MemoryBacklog(), user="sam")
    long_ago = datetime.now(UTC) - timedelta(days=3)
    devices = Device.get_motor_collection()
    for one in (left, stays):
        hub.add(one)
        await arrive(store.accounts, one.user, one.device, provision=True)
    hub.remove(left)

    async def seen_by(job: LastSeen) -> set[str]:
        await devices.update_many({}, {"$set": {"lastSeen": long_ago}})
        await job.run()
        return {
            found["_id"] async for found in devices.find({"lastSeen": {"$gt": long_ago + timedelta(days=1)}})
        }

    job = LastSeen(hub, store.accounts, seconds=3600)
    assert await seen_by(job) == {"lea/phone"}
    assert await seen_by(job) == set()
    assert await seen_by(LastSeen(hub, store.accounts, seconds=0)) == {"sam/phone"}


async def test_a_time_to_live_changed_by_an_operator_is_followed(store: Store) -> None:
    envelope = await store.put(["bob/phone"], at=store.clock.now() - 7200_000)
    job = TimeToLive(store.mongo, store.messages)
    await job.run()
    assert store.messages.ttl_ms == TTL_SECONDS * 1000
    assert await store.messages.due(store.clock.now(), 10) == []
    try:
        # Longer than MongoDB's own deletion may take to notice, shorter than the message's age.
        await store.mongo.set_ttl("messages", 9000)
        await job.run()
        assert store.messages.ttl_ms == 9_000_000
        assert await store.messages.due(store.clock.now() + 2_000_000, 10) == [envelope.doc_id]
    finally:
        await store.mongo.set_ttl("messages", TTL_SECONDS)
        store.messages.ttl_ms = TTL_SECONDS * 1000


async def test_a_start_gives_each_index_its_own_time_to_live(store: Store) -> None:
    wanted = {name: row.get("expireAfterSeconds") for name, row in (await _indexes(store)).items()}
    change = {"name": "expiresAt_ttl", "expireAfterSeconds": 0}
    await store.mongo.database.command("collMod", "messages", index=change)
    await store.mongo.prepare(TTL_SECONDS, 72 * 3600)
    found = {name: row.get("expireAfterSeconds") for name, row in (await _indexes(store)).items()}
    assert found == wanted


async def _indexes(store: Store) -> dict[str, Any]:
    found: dict[str, Any] = await store.mongo.messages.index_information()
    return found


async def test_health_tells_when_mongodb_stops_answering_and_when_it_answers_again(
    mongod: EmbeddedMongo,
) -> None:
    health, metrics, rates = Health(), Metrics(), Rates({}, redis_url=None)
    timekeeper = Timekeeper()
    dead = Mongo("mongodb://127.0.0.1:1/?directConnection=true", "relay", select_seconds=0.1)
    alive = Mongo(mongod.uri, "relay")
    try:
        with capture_logs() as logs:
            await HealthCheck(
                dead, Shards(dead, fate_seconds=1), rates, Alone(), timekeeper, health, metrics
            ).run()
            assert health.problems == {"mongodb": "no primary answers"}
            assert b'relay_problem{part="mongodb"} 1.0' in metrics.render()
            await HealthCheck(
                alive, Shards(alive, fate_seconds=1), rates, Alone(), timekeeper, health, metrics
            ).run()
            await HealthCheck(
                alive, Shards(alive, fate_seconds=1), rates, Alone(), timekeeper, health, metrics
            ).run()
        assert health.problems == {}
        assert b'relay_problem{part="mongodb"} 0.0' in metrics.render()
        assert b'relay_problem{part="redis"} 0.0' in metrics.render(), "there is none to miss"
        assert len(logs) == 2
    finally:
        dead.close()
        alive.close()
