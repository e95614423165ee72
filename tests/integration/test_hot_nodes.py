"""Hot messages of running nodes, alone and with a Redis that they share; and what is withdrawn while a node may still have it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.routing.redis_bus import RedisBus
from relay.wire.ids import document_id
from tests.support.device import WireDevice
from tests.support.failpoints import failing
from tests.support.node import Node, NodeFactory
from tests.support.valkey import Valkey, open_valkey
from tests.support.waiting import until

PEOPLE = [f"u{number}" for number in range(12)]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis has time to answer, on a machine that is busy, too."""
    monkeypatch.setattr("relay.store.hot_redis._ANSWER_SECONDS", 5)
    monkeypatch.setattr("relay.routing.redis_bus.ANSWER_SECONDS", 5)


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[Valkey]:
    async with open_valkey(tmp_path) as server:
        yield server


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Any]:
    found = Redis.from_url(valkey.url)
    yield found
    await found.aclose()


async def start(nodes: NodeFactory, valkey: Valkey, **settings: Any) -> Node:
    defaults = {"sweep_seconds": 3600, "inline_recipients": 4}
    return await nodes.start(redis_url=valkey.url, **{**defaults, **settings})


async def copies(redis: Any) -> dict[bytes, int]:
    """The hot messages that lie in Redis, by name, with their bytes."""
    return {name: await redis.strlen(name) async for name in redis.scan_iter("relay:hot:*")}


def copy_of(conv: str, message: str) -> bytes:
    return f"relay:hot:{{{conv}}}:{message}".encode()


async def changed_in_the_store(node: Node) -> None:
    await node.db.messages.update_many({"body": {"$exists": True}}, {"$set": {"body": "read again"}})


@pytest.mark.parametrize("inline", [4, 64])
async def test_what_many_devices_drain_is_read_once(nodes: NodeFactory, inline: int) -> None:
    node = await nodes.start(inline_recipients=inline)
    ann = await node.connect("ann")
    conv = await node.group("ann", PEOPLE)
    sent = await ann.sent(conv, "read once")
    first = await node.connect("u0")
    assert (await first.expect("msg", id=sent["id"]))["body"] == "read once"
    await changed_in_the_store(node)
    for user in PEOPLE[1:]:
        device = await node.connect(user)
        assert (await device.expect("msg", id=sent["id"]))["body"] == "read once"
    assert len(node.relay.context.messages.hot) == 1


async def test_what_nobody_asks_for_any_more_leaves_the_memory(
    nodes: NodeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.duties._HOT_SECONDS", 0.1)
    node = await nodes.start(inline_recipients=4)
    hot = node.relay.context.messages.hot
    ann = await node.connect("ann")
    conv = await node.group("ann", PEOPLE)
    await ann.sent(conv)
    assert len(hot) == 1
    monkeypatch.setattr("relay.store.hot._SECONDS", 0.3)
    await ann.sent(conv)

    async def older_one_is_left() -> bool:
        return len(hot) == 1

    await until(older_one_is_left, 5, "the one that may stay for five minutes is left")
    monkeypatch.setattr("relay.store.hot._SECONDS", 300)


async def test_what_one_node_committed_to_many_devices_another_takes_from_redis(
    nodes: NodeFactory, valkey: Valkey, redis: Any
) -> None:
    one, other = [await start(nodes, valkey) for _ in range(2)]
    ann = await one.connect("ann")
    conv = await one.group("ann", PEOPLE)
    sent = await ann.sent(conv, "read nowhere")

    async def kept() -> bool:
        return copy_of(conv, sent["id"]) in await copies(redis)

    await until(kept, 5, "a copy lies in Redis")
    await changed_in_the_store(one)
    device = await other.connect("u0")
    assert (await device.expect("msg", id=sent["id"]))["body"] == "read nowhere"


async def test_large_bodies_to_a_group_push_nobody_out_of_redis(
    nodes: NodeFactory, valkey: Valkey, redis: Any
) -> None:
    await redis.config_set("maxmemory", str(6 << 20))
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    node = await start(nodes, valkey, hot_redis_bytes=1 << 20)
    idle, ann = await node.connect("idle"), await node.connect("ann")
    line = f"relay:{node.db.name}:at:idle"

    async def entered() -> bool:
        return bool(await redis.exists(line))

    await until(entered, 5, "the directory knows the idle device")
    conv = await node.group("ann", PEOPLE)
    for _ in range(20):
        some = [await ann.send(conv, "x" * 60_000) for _ in range(10)]
        for message in some:
            await ann.expect("stored", 10, id=message)

    async def over() -> bool:
        """The newest message is kept, or was pushed out."""
        newest = copy_of(conv, some[-1]) in await copies(redis)
        return newest or bool((await redis.info())["evicted_keys"])

    await until(over, 5, "the newest message is kept")
    assert await entered(), "its messages would come late"
    assert (await redis.info())["evicted_keys"] == 0
    assert sum((await copies(redis)).values()) <= 1 << 20
    await idle.close()


def is_hot(node: Node, conv: str, stored: dict[str, Any]) -> bool:
    return node.relay.context.messages.hot.find(document_id(conv, stored["id"]), stored["seq"]) is not None


async def withdraw(device: WireDevice, conv: str, message: str) -> dict[str, Any]:
    return await device.sent(conv, None, kind="withdrawn", replyTo=message)


async def withdrawn_and_acknowledged(*nodes: Node) -> tuple[int, int]:
    ledgers = [node.relay.context.ledger for node in nodes]
    withdrawn, acknowledged = (
        sum(ledger.count(outcome) for ledger in ledgers) for outcome in ("withdrawn", "acknowledged")
    )
    return withdrawn, acknowledged


async def test_a_withdrawn_message_leaves_all_memories_once_it_is_deleted_and_does_not_come_back(
    nodes: NodeFactory, valkey: Valkey, redis: Any
) -> None:
    both = one, other = [await start(nodes, valkey) for _ in range(2)]
    ann, first = await one.connect("ann"), await other.connect("u0")
    conv = await one.group("ann", PEOPLE)
    sent = await ann.sent(conv)
    await first.expect("msg", id=sent["id"])
    drained = await other.connect("u1")
    await drained.expect("msg", id=sent["id"])

    async def everywhere() -> bool:
        return is_hot(one, conv, sent) and is_hot(other, conv, sent) and bool(await copies(redis))

    await until(everywhere, 5, "it is hot at both nodes, and in Redis")
    async with failing(one, "delete", errorCode=8):
        withdrawal = await withdraw(ann, conv, sent["id"])
        await first.expect("msg", id=withdrawal["id"])
        # It waits, for nobody could delete it yet: whoever comes has it read again.
        for node, user in ((one, "u2"), (other, "u3")):
            device = await node.connect(user)
            await device.expect("msg", id=sent["id"])
        assert is_hot(one, conv, sent), "the memory has it as long as the store"

    async def nowhere() -> bool:
        left = is_hot(one, conv, sent) or is_hot(other, conv, sent)
        return not left and copy_of(conv, sent["id"]) not in await copies(redis)

    await until(nowhere, 10, "it is in no memory any more")
    for node, user in zip(both, ("u4", "u5"), strict=True):
        device = await node.connect(user)
        assert (await device.expect("msg"))["id"] == withdrawal["id"]
        await device.nothing("msg")


@pytest.mark.parametrize("inline", [64, 4])
async def test_a_message_whose_insert_comes_through_after_its_withdrawal_costs_nothing_and_is_not_kept(
    nodes: NodeFactory, valkey: Valkey, redis: Any, inline: int
) -> None:
    patient = {"inline_recipients": inline, "commit_timeout_seconds": 4, "send_deadline_seconds": 20}
    one, other = [await start(nodes, valkey, **patient) for _ in range(2)]
    ann, tablet = await one.connect("ann"), await other.connect("ann", "tablet")
    others = [await (one, other)[number % 2].connect(user) for number, user in enumerate(PEOPLE[:6])]
    conv = await one.group("ann", PEOPLE[:6])

    async def hits() -> int:
        """How often the fail point was met, ever."""
        found = await one.db.client.admin.command({"getParameter": 1, "failpoint.failCommand": 1})
        return int(found["failpoint.failCommand"]["timesEntered"])

    before = await hits()

    async def held_up() -> bool:
        return await hits() > before

    async with failing(one, "insert", times=1, blockConnection=True, blockTimeMS=4500):
        late = await ann.send(conv, "too late")
        await until(held_up, 3, "its insert is under way")
        withdrawal = await withdraw(tablet, conv, late)
        for device in others:
            assert (await device.expect("msg", 15))["id"] == withdrawal["id"]
        stored = await ann.expect("stored", 15, id=late)
    assert stored["seq"] < withdrawal["seq"]
    for device in others:
        # It knows the withdrawal, and shows nobody what came late.
        assert (await device.expect("msg", 10))["id"] == late
        await device.ack(conv, late, withdrawal["id"])
        await device.nothing("msg", 0.05)
    await ann.ack(conv, withdrawal["id"])
    await tablet.ack(conv, late)

    async def balanced() -> bool:
        over = await withdrawn_and_acknowledged(one, other) == (0, 14)
        return over and not await one.db.messages.count_documents({})

    await until(balanced, 10, "both have ended, each delivery once")
    assert not is_hot(one, conv, stored)
    assert not is_hot(other, conv, stored)
    assert copy_of(conv, late) not in await copies(redis)


async def test_a_message_that_another_node_hears_of_after_it_was_withdrawn_blocks_nothing(
    nodes: NodeFactory, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.routing.redis_bus._STALE_MS", 3_600_000)
    one, other = [await start(nodes, valkey, window=2) for _ in range(2)]
    ann, bob = await one.connect("ann"), await other.connect("bob")
    conv = await one.direct("ann", "bob")
    await ann.sent(conv, "the bus carries")
    told = await bob.expect("msg")
    await bob.ack(conv, told["id"])
    bus = other.relay.context.bus
    assert isinstance(bus, RedisBus)
    channel = bus._channels[0]
    take, held = channel._take, list[bytes]()
    channel._take = held.append
    sent = await ann.sent(conv, "withdrawn before anybody had it")
    withdrawal = await withdraw(ann, conv, sent["id"])

    async def gone() -> bool:
        ids = [document["id"] async for document in one.db.messages.find()]
        on_their_way = all(
            any(name.encode() in data for data in held) for name in (sent["id"], withdrawal["id"])
        )
        return ids == [withdrawal["id"]] and on_their_way

    await until(gone, 10, "it is deleted, and its hint still under way")
    # The last that was told comes first.
    for data in reversed(held):
        take(data)
    channel._take = take
    found = [await bob.expect("msg"), await bob.expect("msg")]
    assert [message["id"] for message in found] == [withdrawal["id"], sent["id"]]
    await bob.ack(conv, *(message["id"] for message in found))

    async def balanced() -> bool:
        over = await withdrawn_and_acknowledged(one, other) == (1, 2)
        return over and not await one.db.messages.count_documents({})

    await until(balanced, 10, "each delivery has ended once")
    # Its window holds two: neither of them is held up in it.
    more = [await ann.sent(conv, str(number)) for number in range(2)]
    assert [(await bob.expect("msg"))["id"] for _ in more] == [message["id"] for message in more]
    again = await other.connect("bob")
    assert [(await again.expect("msg"))["id"] for _ in more] == [message["id"] for message in more]
