"""Several nodes, Redis between them, shards beneath them, each against the same without, in turn in one run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from relay.store.embedded_valkey import EmbeddedValkey
from relay.store.mongo import Mongo
from scripts.tools.bench import disk, groups, live, nodes_costs, nodes_storm
from scripts.tools.bench.messages import Placement
from scripts.tools.bench.nodes_options import Options, Scenario, sizes
from scripts.tools.bench.nodes_results import Compared, Hop, Nodes, Storm, goals, side
from scripts.tools.bench.report import Check, Screen
from scripts.tools.bench.sites import Beneath, Run, Site, drive, site
from scripts.tools.bench.stage import AUDIENCE, BenchError, raise_file_limit
from scripts.tools.bench.storm_calls import devices
from tests.cluster import Cluster

_ABOUT: Final[Mapping[str, Callable[[Run], float]]] = {
    "workers": lambda run: run.rate,
    "shards": lambda run: run.cpu_us.get("relay", 0.0) + run.cpu_us.get("mongod", 0.0),
}
_PREFIX: Final = "relay_bench_"
_SPARE_FILES: Final = 400
_MOST_STORM_SECONDS: Final = 150.0


async def run(options: Options, screen: Screen) -> Nodes:
    """Everything that was asked for. Raises BenchError and what servers and drivers raise."""
    if options.devices % options.group_devices:
        raise BenchError(
            f"--devices {options.devices}: must be whole groups of --group-devices {options.group_devices}"
        )
    raise_file_limit(options.devices + options.devices // options.group_devices + _SPARE_FILES)
    chosen = options.scenarios
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-bench-")))
        with screen.working("starting MongoDB and Valkey"):
            uri, pids = await stack.enter_async_context(live.database(None, directory))
            valkey = EmbeddedValkey(directory / "valkey")
            await valkey.start()
            stack.push_async_callback(valkey.stop)
        assert valkey.pid is not None
        pids = {"bench": os.getpid(), **pids}
        work = _Work(options, screen, directory, uri, pids, valkey.url, valkey.pid)
        workers = await work.workers() if Scenario.WORKERS in chosen else None
        hop = await work.hop() if Scenario.HOP in chosen else None
        storm = await work.storm(kill=False) if Scenario.STORM in chosen else None
        kill = await work.storm(kill=True) if Scenario.KILL in chosen else None
        costs = await work.costs() if Scenario.COSTS in chosen else None
        idle = await work.idle() if Scenario.IDLE in chosen else None
        kept = await work.disk() if Scenario.DISK in chosen else None
        shards = await work.shards() if Scenario.SHARDS in chosen else None
    checks: list[Check] = []
    for one in (workers, hop, shards, storm, kill):
        checks += [] if one is None else one.checks
    for more in (costs, idle, kept):
        checks += [] if more is None else more.checks
    found = Nodes(
        ok=all(check.ok for check in checks),
        workers=workers,
        hop=hop,
        shards=shards,
        storm=storm,
        kill=kill,
        costs=costs,
        idle=idle,
        disk=kept,
        goals=[],
        checks=checks,
        relay_log=work.relay_log,
    )
    return msgspec.structs.replace(found, goals=goals(found))


def _everything(run: Run) -> float:
    return sum(used for kind, used in run.cpu_us.items() if kind != "forwarder")


@dataclass(frozen=True, slots=True)
class _Work:
    options: Options
    screen: Screen
    directory: Path
    uri: str
    pids: dict[str, int]
    redis_url: str
    valkey_pid: int
    relay_log: list[str] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def _site(self, count: int) -> AsyncIterator[Site]:
        """Nodes on the replica set, with Redis when there are several, on a database that is dropped afterwards."""
        several = count > 1
        beneath = Beneath(
            self.uri,
            _PREFIX + secrets.token_hex(4),
            [self.uri],
            {**self.pids, **({"valkey": self.valkey_pid} if several else {})},
            self.redis_url if several else None,
        )
        try:
            async with self._noting(beneath, count) as found:
                yield found
        finally:
            mongo = Mongo(self.uri, beneath.database)
            await mongo.client.drop_database(beneath.database)
            mongo.close()

    @contextlib.asynccontextmanager
    async def _noting(self, beneath: Beneath, count: int) -> AsyncIterator[Site]:
        async with site(beneath, self.directory, count) as found:
            try:
                yield found
            finally:
                for node in found.nodes:
                    self.relay_log.extend(node.complaints)

    async def workers(self) -> Compared:
        """One node against two, as fast as they can."""
        async with self._site(1) as one, self._site(2) as two:
            return await self._compare(
                "workers", ("one node", one, "first"), ("two nodes, Redis", two, "mixed"), None
            )

    async def hop(self) -> Hop:
        """Sender and recipient at the same node or at two, in the same window: what else the machine does concerns both."""
        options = self.options
        runs = []
        with self.screen.working("hop") as show:
            async with self._site(2) as two:
                for number in range(options.rounds):
                    order = two.order(
                        placement="mixed",
                        pairs=options.pairs,
                        size=options.size,
                        warmup=options.warmup,
                        seconds=options.seconds,
                        rate=options.rate,
                    )
                    runs.append(await drive(two, order, show, f"hop: {number + 1} of {options.rounds}"))
        same = [run.measured.together_ms for run in runs]
        another = [run.measured.apart_ms for run in runs]
        return Hop(
            pairs=options.pairs,
            asked_rate=options.rate,
            rounds=options.rounds,
            seconds=options.seconds,
            same=same,
            another=another,
            more_p50=median(after.p50 - before.p50 for before, after in zip(same, another, strict=True)),
            more_p99=median(after.p99 - before.p99 for before, after in zip(same, another, strict=True)),
            run=side("two nodes", runs),
            checks=[
                Check(f"hop {number}: {check.name}", check.ok, check.found)
                for number, run in enumerate(runs, 1)
                for check in run.checks
            ],
        )

    async def shards(self) -> Compared:
        """A replica set against a cluster of two shards."""
        async with contextlib.AsyncExitStack() as stack:
            one = await stack.enter_async_context(self._site(1))
            with self.screen.working("shards: starting the cluster"):
                cluster = await stack.enter_async_context(Cluster(self.directory / "cluster", cache_gb=0.5))
            servers = [*cluster.shards, cluster.config]
            pids = {**self.pids, **{f"mongod {server.name}": server.pid for server in servers}}
            pids |= {f"forwarder {place}": one.pid for place, one in enumerate(cluster.forwarders, 1)}
            del pids["mongod"]
            beneath = Beneath(cluster.uri, "relay", [server.uri for server in servers], pids)
            two = await stack.enter_async_context(self._noting(beneath, 1))
            return await self._compare(
                "shards",
                ("replica set", one, "first"),
                ("two shards", two, "first"),
                self.options.shards_rate,
            )

    async def _compare(
        self,
        name: str,
        first: tuple[str, Site, Placement],
        second: tuple[str, Site, Placement],
        rate: float | None,
    ) -> Compared:
        options = self.options
        runs: tuple[list[Run], list[Run]] = ([], [])
        with self.screen.working(name) as show:
            for number in range(options.rounds):
                # Whoever goes second finds what the first has left behind: so they take turns in that, too.
                sides = list(zip((first, second), runs, strict=True))
                for (what, where, placement), kept in sides[:: -1 if number % 2 else 1]:
                    order = where.order(
                        placement=placement,
                        pairs=options.pairs,
                        size=options.size,
                        warmup=options.warmup,
                        seconds=options.seconds,
                        window=options.window,
                        rate=rate,
                    )
                    doing = f"{name}: {what}, {number + 1} of {options.rounds}"
                    kept.append(await drive(where, order, show, doing))
        one, other = side(first[0], runs[0]), side(second[0], runs[1])

        def ratio(about: Callable[[Run], float]) -> float:
            return median(
                about(after) / max(about(before), 1e-9) for before, after in zip(*runs, strict=True)
            )

        return Compared(
            pairs=options.pairs,
            window=options.window,
            asked_rate=rate,
            rounds=options.rounds,
            seconds=options.seconds,
            first=one,
            second=other,
            ratio=ratio(_ABOUT[name]),
            cpu_ratio=ratio(_everything),
            checks=[
                Check(f"{name}: {side.name} {number}: {check.name}", check.ok, check.found)
                for side, its in ((one, runs[0]), (other, runs[1]))
                for number, one_run in enumerate(its, 1)
                for check in one_run.checks
            ],
        )

    async def storm(self, *, kill: bool) -> Storm:
        """Many come back at once, while others talk."""
        options = self.options
        name = "kill" if kill else "storm"
        with self.screen.working(
            f"{name}: {options.devices:,} people in {len(sizes(options))} groups"
        ) as show:
            async with self._site(2) as two, devices(two.secret, AUDIENCE, options.size) as crowd:
                await crowd.assemble(
                    await asyncio.to_thread(groups.make, self.uri, two.beneath.database, sizes(options))
                )
                return await nodes_storm.storm(two, crowd, options, show, kill=kill)

    async def costs(self) -> nodes_costs.Costs:
        """What a message costs, and what the calls beneath it do."""
        options = self.options
        async with self._site(1) as one, self._site(2) as two:
            with self.screen.working("costs") as show:
                return await nodes_costs.costs(
                    one,
                    two,
                    options.rates,
                    show,
                    pairs=options.pairs,
                    size=options.size,
                    warmup=options.warmup,
                    seconds=options.seconds,
                )

    async def idle(self) -> nodes_costs.Idle:
        """What devices cost that only listen."""
        options = self.options
        with self.screen.working(f"idle: {options.devices:,} devices") as show:
            async with self._site(2) as two, devices(two.secret, AUDIENCE, options.size) as crowd:
                await crowd.assemble(
                    await asyncio.to_thread(groups.make, self.uri, two.beneath.database, sizes(options))
                )
                return await nodes_costs.idle(two, crowd, options.devices, options.idle_seconds, show)

    async def disk(self) -> disk.Kept:
        """What messages and their fates take."""
        options = self.options
        with self.screen.working("disk: messages come and go") as show:
            async with self._site(1) as one:
                order = one.order(
                    placement="first",
                    pairs=options.pairs,
                    size=options.size,
                    warmup=0,
                    seconds=options.seconds,
                    window=options.window,
                )
                run = await drive(one, order, show, "disk")
                oplog = await disk.oplog(self.uri, one.beneath.database)
            show(f"disk: {options.kept:,} messages wait")
            document, message, fate = await disk.waiting(
                self.uri, _PREFIX + secrets.token_hex(4), options.kept, options.size
            )
        return disk.Kept(
            messages=options.kept,
            document=document,
            message=message,
            fate=fate,
            oplog=oplog,
            checks=[Check(f"disk: {check.name}", check.ok, check.found) for check in run.checks],
        )
