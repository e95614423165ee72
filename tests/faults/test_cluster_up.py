"""``scripts/cluster up``: everything from one command, whatever dies of it, and all of it gone with it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pymongo import AsyncMongoClient
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.faults.test_all_together import balanced, goes_on
from tests.faults.test_workers import ports_in_a_row
from tests.support.load import Load
from tests.support.node import SECRET, Node
from tests.support.process import ROOT, environment, running
from tests.support.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


class Reached(Node):
    """A node that somebody else has started."""

    def __init__(self, url: str, db: Any, http: aiohttp.ClientSession) -> None:
        self.url, self.db, self.http = url, db, http
        self._devices = []


class Started:
    """What the command says that it has started: addresses, and process ids by name, those of today."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pids: dict[str, int] = {}
        self.urls: list[str] = []
        self.uri = self.valkey = ""

    async def listen(self) -> None:
        """Until it is ready, and has said everything."""
        assert self.process.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            line = await self.process.stdout.readline()
            assert line, said
            said += line.decode()
        self.urls = re.findall(r"^# relay\d  (\S+)", said, re.MULTILINE)
        self.pids = {
            name: int(pid) for name, pid in re.findall(r"^# +(\S+)  .*pid (\d+)", said, re.MULTILINE)
        }
        (self.uri,) = re.findall(r"^export RELAY_MONGO_URI='(\S+)'$", said, re.MULTILINE)
        (self.valkey,) = re.findall(r"^#   valkey  (\S+)", said, re.MULTILINE)

    async def follow(self) -> None:
        """What is started again has another process id."""
        assert self.process.stderr is not None
        while line := (await self.process.stderr.readline()).decode():
            if found := re.search(r"(\S+) runs again, pid (\d+)", line):
                self.pids[found[1]] = int(found[2])

    def signal(self, name: str, number: signal.Signals) -> int:
        """Returns the process id."""
        os.kill(self.pids[name], number)
        return self.pids[name]

    async def again(self, name: str, before: int) -> None:
        """What had this process id and was killed runs again."""

        async def runs() -> bool:
            return self.pids[name] != before

        await until(runs, 60, f"{name} runs again")


@asynccontextmanager
async def started(directory: Path) -> AsyncIterator[Started]:
    settings = {"data_dir": directory / "data", "jwt_secret": SECRET, "sweep_seconds": 4, "drain_seconds": 2}
    line = ("up", "--port", str(ports_in_a_row(2)), "--directory", str(directory / "c"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.tools.cluster", *line),
        cwd=ROOT,
        env={**environment(**settings), "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    found = Started(process)
    following = asyncio.create_task(found.follow())
    try:
        async with asyncio.timeout(80):
            await found.listen()
        yield found
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        async with asyncio.timeout(60):
            await asyncio.gather(process.wait(), following)
    assert process.returncode == 0

    async def ended() -> bool:
        return not any(map(running, found.pids.values()))

    await until(ended, 5, "all of it has ended")


@asynccontextmanager
async def reached(found: Started) -> AsyncIterator[list[Reached]]:
    """Its nodes."""
    async with (
        AsyncMongoClient[dict[str, Any]](found.uri, tz_aware=True) as client,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        assert client.topology_description.topology_type_name in ("Sharded", "Unknown")
        nodes = [Reached(url, client.relay, http) for url in found.urls]
        yield nodes
        for node in nodes:
            for device in node._devices:
                await device.close()


async def test_one_command_starts_two_nodes_that_talk_and_restarts_what_dies(tmp_path: Path) -> None:
    async with started(tmp_path) as found, reached(found) as (one, two):
        assert found.pids.keys() == {"relay1", "relay2", "s1", "s2", "config", "valkey"}
        assert (await one.db.client.admin.command("ping"))["ok"] == 1
        assert one.db.client.topology_description.topology_type_name == "Sharded"
        assert "users" in await one.db.list_collection_names(), "the database of its nodes"
        ann, bob = await one.connect("ann"), await two.connect("bob")
        conv = await one.direct("ann", "bob")
        sent = await ann.sent(conv)
        await bob.expect("msg", 10, id=sent["id"])
        await bob.ack(conv, sent["id"])
        await found.again("relay2", found.signal("relay2", signal.SIGKILL))
        again = await two.connect("bob")
        sent = await ann.sent(conv)
        await again.expect("msg", 10, id=sent["id"])


async def test_a_mixed_load_loses_nothing_whatever_is_done_to_what_one_command_started(
    tmp_path: Path,
) -> None:
    async with started(tmp_path) as found, reached(found) as nodes:
        load = Load(nodes[0], pairs=30, rate=8, nodes=nodes, groups=(5, 5, 5, 70))
        try:
            await load.start()
            await goes_on(load)
            await _shard_fails(found, load)
            await _valkey_fails(found, load)
            # A rolling restart, then a node that stands still, then one that is killed.
            for name in ("relay1", "relay2"):
                await found.again(name, found.signal(name, signal.SIGTERM))
                await goes_on(load)
            await _stands_still(found, "relay2", 20)
            await goes_on(load)
            await found.again("relay2", found.signal("relay2", signal.SIGKILL))
            await goes_on(load)
            await load.settle(60)
        finally:
            await load.close()
        print(await load.verify())
        await balanced(nodes)


async def _stands_still(found: Started, name: str, seconds: float) -> None:
    found.signal(name, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        found.signal(name, signal.SIGCONT)


async def _shard_fails(found: Started, load: Load) -> None:
    stands = asyncio.create_task(_stands_still(found, "s2", 12))
    await asyncio.sleep(2)
    await goes_on(load, 40, shard="s1")
    await stands
    await goes_on(load, 30, shard="s2")
    before = found.signal("s2", signal.SIGKILL)
    await goes_on(load, 40, shard="s1")
    await found.again("s2", before)
    await goes_on(load, 60, shard="s2")


async def _valkey_fails(found: Started, load: Load) -> None:
    found.signal("valkey", signal.SIGKILL)
    await goes_on(load)

    async def back() -> bool:
        try:
            async with Redis.from_url(found.valkey) as redis:
                found.pids["valkey"] = int((await redis.info("server"))["process_id"])
        except (RedisError, OSError):
            return False
        return True

    await until(back, 30, "Valkey runs again")
    await goes_on(load)
    async with Redis.from_url(found.valkey) as redis:
        await redis.flushall()
    await goes_on(load)
    stands = asyncio.create_task(_stands_still(found, "valkey", 30))
    await goes_on(load)
    await stands
    await goes_on(load)
