"""Hot messages of running nodes, alone and with a Redis that they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.support.node import Node, NodeFactory
from tests.support.valkey import Valkey, open_valkey
from tests.support.waiting import until

PEOPLE = [f"u{number}" for number in range(12)]


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
    return await nodes.start(redis_url=valkey.url, sweep_seconds=3600, inline_recipients=4, **settings)


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
