"""Commands to a real Valkey cluster, of which masters die, hang and hand over what they keep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from relay.redis_client import TROUBLE, close, connect
from relay.redis_servers import Servers
from tests.support.valkey import Valkey, open_valkey
from tests.support.valkey_cluster import master_of, valkey_cluster
from tests.support.waiting import until

KEYS = [next(f"k{n}" for n in range(1000) if master_of(f"k{n}") == master) for master in range(3)]


class Cluster:
    """Three masters, a client, and what it learns."""

    def __init__(self, masters: list[Valkey]) -> None:
        self.masters = masters
        self.redis: Any = connect(
            masters[0].url.replace("redis://", "redis+cluster://"), connections=4, seconds=3
        )
        self.came_back = 0
        self.servers = Servers(self.redis, seconds=3, back=self._back)

    def _back(self) -> None:
        self.came_back += 1

    async def gets(self) -> list[Any]:
        """The answers to a question for a key of each master."""
        return await self.servers.ask([("GET", key) for key in KEYS])

    async def sets(self) -> list[Any]:
        """The answers to a change of a key of each master."""
        return await self.servers.ask([("SET", key, "1") for key in KEYS])

    async def all_answer(self) -> bool:
        """Whether each of them does."""
        try:
            return not any(isinstance(answer, Exception) for answer in await self.gets())
        except TROUBLE:
            return False

    async def none_answers(self) -> bool:
        """Whether that is raised."""
        try:
            await self.gets()
        except TROUBLE:
            return True
        return False


@pytest.fixture
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    full = getattr(request, "param", "no")
    options = ("--cluster-require-full-coverage", full, "--cluster-node-timeout", "3000")
    async with valkey_cluster(tmp_path, options=options) as masters:
        found = Cluster(masters)
        yield found
        await found.servers.close()
        await close(found.redis)


async def test_what_a_dead_master_keeps_is_not_answered_and_all_else_is(cluster: Cluster) -> None:
    assert all(await cluster.sets())
    await cluster.masters[1].kill()
    for _ in range(10):
        first, dead, last = await cluster.gets()
        assert (first, last) == (b"1", b"1") and isinstance(dead, Exception)
        assert [cluster.servers.answers(key) for key in KEYS] == [True, False, True]
        assert cluster.servers.partial and cluster.came_back == 0
    await cluster.masters[1].start()
    await until(cluster.all_answer, 20, "it answers again")
    assert cluster.came_back == 1 and cluster.servers.answers(KEYS[1])


async def test_a_master_that_hangs_is_waited_for_once(cluster: Cluster) -> None:
    assert all(await cluster.sets())
    cluster.masters[1].pause()
    try:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(20):
            first, hung, last = await cluster.gets()
            assert (first, last) == (b"1", b"1") and isinstance(hung, Exception)
        assert loop.time() - began < 2 * 3
    finally:
        cluster.masters[1].resume()
    await until(cluster.all_answer, 20, "it answers again")


async def test_that_no_master_answers_is_raised_until_one_does(cluster: Cluster) -> None:
    assert all(await cluster.sets())
    for master in cluster.masters:
        await master.kill()
    await until(cluster.none_answers, 20, "none answers")
    assert await cluster.none_answers()
    for master in cluster.masters:
        await master.start()
    await until(cluster.all_answer, 30, "all answer again")


@pytest.mark.parametrize("cluster", ["yes"], indirect=True)
async def test_a_cluster_that_requires_full_coverage_answers_nothing_without_a_master(
    cluster: Cluster,
) -> None:
    assert all(await cluster.sets())
    await cluster.masters[1].kill()
    await until(cluster.none_answers, 30, "none answers")
    await cluster.masters[1].start()
    await until(cluster.all_answer, 30, "all answer again")


async def test_a_client_that_starts_without_the_first_master_uses_the_others(cluster: Cluster) -> None:
    await cluster.masters[0].kill()
    redis = connect(cluster.masters[2].url.replace("redis://", "redis+cluster://"), connections=4, seconds=3)
    servers = Servers(redis, seconds=3)
    try:

        async def others_answer() -> bool:
            try:
                dead, *others = await servers.ask([("GET", key) for key in KEYS])
            except TROUBLE:
                return False
            assert isinstance(dead, Exception)
            return others == [None, None]

        await until(others_answer, 20, "the others are asked")
    finally:
        await servers.close()
        await close(redis)


async def test_a_slot_that_has_another_master_now_is_asked_there(cluster: Cluster) -> None:
    key = KEYS[0]
    assert not any(await cluster.gets())
    clients: list[Any] = [Redis(port=master.port) for master in cluster.masters]
    try:
        new = await clients[2].execute_command("CLUSTER MYID")
        for client in reversed(clients):
            await client.execute_command("CLUSTER SETSLOT", key_slot(key.encode()), "NODE", new)
    finally:
        for client in clients:
            await client.aclose()
    assert await cluster.servers.ask([("SET", key, "1"), ("SET", KEYS[1], "2")]) == [True, True]
    assert await cluster.gets() == [b"1", b"2", None]


async def test_a_replica_that_is_promoted_takes_over(cluster: Cluster, tmp_path: Path) -> None:
    assert all(await cluster.sets())
    (tmp_path / "replica").mkdir()
    options = ("--cluster-require-full-coverage", "no", "--cluster-node-timeout", "3000")
    replica = Valkey(tmp_path / "replica", clustered=True, options=options)
    await replica.start()
    dying = cluster.masters[1]
    clients: list[Any] = [Redis(port=dying.port), Redis(port=replica.port)]
    try:
        name = (await clients[0].execute_command("CLUSTER MYID")).decode()
        await clients[1].execute_command("CLUSTER MEET", "127.0.0.1", dying.port, dying.cluster_port)

        async def replicates() -> bool:
            try:
                await clients[1].execute_command("CLUSTER REPLICATE", name)
            except RedisError:
                return False
            return True

        await until(replicates, 20, "it knows its master")

        async def has_all() -> bool:
            info = await clients[1].info("replication")
            return bool(info["master_link_status"] == "up")

        await until(has_all, 20, "it has what its master has")
        await dying.kill()
        await until(cluster.all_answer, 40, "it answers for its master")
        assert cluster.servers.answers(KEYS[1])
    finally:
        for client in clients:
            await client.aclose()
        await replica.kill()


async def test_of_one_server_nothing_is_answered_or_all(tmp_path: Path) -> None:
    async with open_valkey(tmp_path) as server:
        redis = connect(server.url, connections=4, seconds=3)
        servers = Servers(redis, seconds=3)
        try:
            assert await servers.ask([("SET", "a", "1"), ("MGET", "a", "b")]) == [True, [b"1", None]]
            await server.kill()
            with pytest.raises(TROUBLE):
                await servers.ask([("GET", "a")])
            assert servers.answers("a") and not servers.partial
        finally:
            await servers.close()
            await close(redis)
