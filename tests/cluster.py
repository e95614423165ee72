"""A real sharded MongoDB without a router's binary: config server, shards, and a forwarder for each shard that stands for a router.

The shards contain the router's own code (tests/support/forwarder.py). ``messages`` is spread by ranges of ``conversationId`` and ``fates``
by ``lane``, each over all shards, before the first insert; every other collection lives on the first shard, the primary one.

By hand: ``scripts/cluster up``.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from bson import MaxKey, MinKey
from pymongo import ASCENDING, AsyncMongoClient, IndexModel

from models.messages import FATES, MESSAGES, fate_indexes, message_indexes
from relay.store.embedded_files import Layout, find_mongod
from tests.support.frozen import send_signal
from tests.support.mongo_server import MongoServer, ServerError, end, spawn
from tests.support.process import ROOT

MAJORITY: Final = {"w": "majority", "wtimeout": 60_000}
TTL_SECONDS: Final = 30 * 86_400
FATE_SECONDS: Final = 72 * 3600
# Chunks move when a test says so. What a moved chunk leaves behind goes at once: nobody reads from secondaries here.
PARAMETERS: Final = {
    "orphanCleanupDelaySecs": "0",
    # A chunk that comes back waits for that; a busy machine takes its time.
    "receiveChunkWaitForRangeDeleterTimeoutMS": "60000",
}
MAX_SHARDS: Final = 9

_HEX_PLACES: Final = 16**4

Progress = Callable[[str], None]


class Forwarder:
    """One stand-in for a router, a process of its own. Its port stays the same over restarts."""

    def __init__(
        self, directory: Path, shard: MongoServer, primary: MongoServer, config: MongoServer
    ) -> None:
        self.port = 0
        self._directory = directory
        self._servers = (shard, primary, config)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """The cluster through this router alone."""
        return f"mongodb://127.0.0.1:{self.port}/?retryWrites=false"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "the forwarder does not run"
        return self._process.pid

    async def start(self) -> None:
        """Starts it, again after ``kill``; it listens when this returns. Raises ServerError."""
        shard, primary, config = self._servers
        command = [sys.executable, "-m", "tests.support.forwarder", "--port", str(self.port)]
        command += ["--shard", shard.address, "--primary", primary.address, "--primary-name", primary.name]
        command += ["--config", config.address]
        log = self._directory / f"forwarder-{shard.name}.log"
        self._process = spawn(command, log, cwd=ROOT, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        self._process.stdout.close()
        if not line.strip().isdigit():
            raise ServerError(f"a forwarder did not start; see {log}")
        self.port = int(line)

    def stop(self) -> None:
        """SIGSTOP: it keeps its connections and passes nothing on."""
        send_signal(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """The end of ``stop``."""
        send_signal(self.pid, signal.SIGCONT)

    async def kill(self) -> None:
        """kill -9; ``start`` brings it back."""
        if self._process is not None:
            await end(self._process)


class Cluster:
    """A config server, shards ``s1``, ``s2``… and forwarders. ``async with`` starts and ends all of it. The balancer is off.

    A forwarder dies and hangs with the shard that it asks, which a router would not. Tests of a shard that fails have ``routers``:
    shards of which nobody stores anything, one for each forwarder; or they use ``forwarders[n].uri`` of a shard that lives on.
    """

    def __init__(
        self,
        directory: Path,
        shards: int = 2,
        *,
        routers: int = 0,
        server_parameters: Mapping[str, str] = {},
        cache_gb: float = 0.25,
        progress: Progress = lambda _: None,
    ) -> None:
        """Files lie under ``directory``; ``cache_gb`` is for each server. Without ``routers`` each shard has a forwarder."""
        if not (1 <= shards <= MAX_SHARDS and 0 <= routers <= MAX_SHARDS):
            raise ValueError(f"a cluster has 1 to {MAX_SHARDS} shards, and so many routers at most")
        directory.mkdir(parents=True, exist_ok=True)
        self._progress = progress
        binary = find_mongod(Layout(directory))

        def server(name: str, role: str) -> MongoServer:
            return MongoServer(
                name,
                directory / name,
                binary,
                role=role,
                parameters={**(PARAMETERS if role == "shardsvr" else {}), **server_parameters},
                cache_gb=cache_gb,
            )

        self.config = server("config", "configsvr")
        self.shards = [server(f"s{number + 1}", "shardsvr") for number in range(shards)]
        self.routers = [server(f"router{number + 1}", "shardsvr") for number in range(routers)]
        self.forwarders = [
            Forwarder(directory, asked, self.shards[0], self.config) for asked in self.routers or self.shards
        ]

    @property
    def uri(self) -> str:
        """The cluster through all its routers."""
        hosts = ",".join(f"127.0.0.1:{forwarder.port}" for forwarder in self.forwarders)
        return f"mongodb://{hosts}/?retryWrites=false"

    @property
    def _servers(self) -> list[MongoServer]:
        return [self.config, *self.shards, *self.routers]

    async def start(self) -> None:
        """Starts everything; database ``relay`` is ready for a relay when this returns. Raises ServerError, and EmbeddedError
        when there is no mongod."""
        try:
            self._progress(f"starting the config server and {len(self.shards)} shards")
            await asyncio.gather(*(server.start() for server in self._servers))
            self._progress("starting the forwarders")
            await asyncio.gather(*(forwarder.start() for forwarder in self.forwarders))
            self._progress("adding the shards")
            for shard in (*self.shards, *self.routers):
                await self._tell_config(
                    "_configsvrAddShard", f"{shard.name}/{shard.address}", name=shard.name
                )
            for shard in self.shards:
                await self._tell_config("_configsvrAddShardToZone", shard.name, zone=shard.name)
            await self.config.client.admin.command("_configsvrBalancerStop")
            # As on a replica set, for clients that do not say.
            await self._tell_config("setDefaultRWConcern", 1, defaultWriteConcern={"w": "majority"})
            self._progress("sharding database relay")
            await self.create_database("relay")
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends everything it started."""
        await asyncio.gather(*(forwarder.kill() for forwarder in self.forwarders))
        await asyncio.gather(*(server.close() for server in self._servers))

    async def __aenter__(self) -> Self:
        """Started."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ended."""
        await self.close()

    async def create_database(self, name: str | None = None) -> str:
        """A database whose ``messages`` and ``fates`` are spread over the shards, with a relay's indexes; returns its name. About
        0.2 s."""
        name = name or f"t{uuid.uuid4().hex[:20]}"
        primary = self.shards[0]
        await self._tell_config("_configsvrCreateDatabase", name, primaryShardId=primary.name)
        found = await self.config.client.config.databases.find_one({"_id": name})
        assert found is not None
        kinds = (
            (MESSAGES, "conversationId", message_indexes(TTL_SECONDS), self._hex_bounds()),
            (
                FATES,
                "lane",
                [*fate_indexes(FATE_SECONDS), IndexModel([("lane", ASCENDING)], name="lane")],
                [shard.name for shard in self.shards[1:]],
            ),
        )
        for collection, key, indexes, bounds in kinds:
            lows, highs = [MinKey(), *bounds], [*bounds, MaxKey()]
            for shard, low, high in zip(self.shards, lows, highs, strict=True):
                await self.set_zone(name, collection, key, low, high, shard.name)
            # The other shards get the indexes that are there when it is sharded.
            await primary.client[name][collection].create_indexes(indexes)
            await primary.client[name].command(
                "_shardsvrCreateCollection",
                collection,
                shardKey={key: 1},
                unique=False,
                databaseVersion=found["version"],
                writeConcern=MAJORITY,
            )
        return name

    async def drop_database(self, name: str) -> None:
        """Removes a database from every shard, and what the config server knows of it."""
        async with AsyncMongoClient[dict[str, Any]](self.uri) as client:
            await client.drop_database(name)

    async def set_zone(
        self, database: str, collection: str, key: str, low: Any, high: Any, zone: str | None
    ) -> None:
        """Says to which zone (a shard's name) a range of the shard key belongs, to none when None. It moves nothing: the balancer
        is off. A range that overlaps another's is refused: take that off first."""
        await self._tell_config(
            "_configsvrUpdateZoneKeyRange",
            f"{database}.{collection}",
            min={key: low},
            max={key: high},
            zone=zone,
        )

    async def move(
        self,
        low: str | None,
        high: str | None,
        to: int,
        *,
        database: str = "relay",
        collection: str = MESSAGES,
        key: str = "conversationId",
    ) -> None:
        """Moves what lies from ``low`` up to ``high`` (None: no bound) to the shard of that place in ``shards``, splitting its
        chunk where need be. The range must lie within one chunk. Returns when it is committed."""
        found = await self.config.client.config.collections.find_one({"_id": f"{database}.{collection}"})
        assert found is not None, f"{database}.{collection} is not sharded"
        await self._tell_config(
            "_configsvrMoveRange",
            f"{database}.{collection}",
            toShard=self.shards[to].name,
            min={key: MinKey() if low is None else low},
            max={key: MaxKey() if high is None else high},
            epoch=found["lastmodEpoch"],
            collectionTimestamp=found["timestamp"],
        )

    async def chunks(self, database: str = "relay", collection: str = MESSAGES) -> list[tuple[Any, Any, str]]:
        """The chunks of a sharded collection in order: lower bound, upper bound, and the shard's name."""
        about = await self.config.client.config.collections.find_one({"_id": f"{database}.{collection}"})
        assert about is not None, f"{database}.{collection} is not sharded"
        rows = self.config.client.config.chunks.find({"uuid": about["uuid"]}).sort("min")
        return [(*row["min"].values(), *row["max"].values(), row["shard"]) for row in await rows.to_list()]

    def conversation(self, shard: int) -> str:
        """A new conversation id that lies on this shard while nothing was moved."""
        bounds = ["", *self._hex_bounds(), "g"]
        while not bounds[shard] <= (name := str(uuid.uuid4())) < bounds[shard + 1]:
            pass
        return name

    def _hex_bounds(self) -> list[str]:
        """The first conversation ids of the shards after the first, as short as can be: UUIDs spread evenly."""
        count = len(self.shards)
        return [f"{_HEX_PLACES * place // count:04x}".rstrip("0") for place in range(1, count)]

    async def _tell_config(self, command: str, value: Any, **fields: Any) -> None:
        await self.config.client.admin.command(command, value, writeConcern=MAJORITY, **fields)
