"""``scripts/bench``: limit, live, fanout, nodes, idle, soak, control."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import aiohttp
import msgspec
import typer
import uvloop
from redis.exceptions import RedisError

from relay.store.embedded import EmbeddedError
from relay.store.mongo import MongoUnavailable, PyMongoError
from scripts.tools.bench import control as plane
from scripts.tools.bench import fanout as spreading
from scripts.tools.bench import fanout_results, memory, nodes_options, nodes_results
from scripts.tools.bench import live as traffic
from scripts.tools.bench import nodes as several
from scripts.tools.bench.limit import CYCLES_IN_FLIGHT, Limit
from scripts.tools.bench.live import Live, Options
from scripts.tools.bench.memory import Idle, Soak
from scripts.tools.bench.report import Screen, write_json
from scripts.tools.bench.stage import BenchError
from tests.support.mongo_server import ServerError

_INTERRUPTED: Final = 130
_EXPECTED: Final = (
    BenchError,
    EmbeddedError,
    MongoUnavailable,
    PyMongoError,
    RedisError,
    ServerError,
    OSError,
    aiohttp.ClientError,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="What the relay can do on this machine, beside what its database can do alone. Absolute figures move between "
    "machines and hours: compare ratios of one run. mongod's files go to the directory for temporary files (TMPDIR); "
    "memory file systems make fsync free and the figures meaningless. RELAY_* settings apply to the relay it starts.",
)

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write everything for machines; - is standard output."),
]
MongoUri = Annotated[
    str | None,
    typer.Option(help="A MongoDB to use instead of an own one; databases of its own, dropped afterwards."),
]
Pairs = Annotated[int, typer.Option(min=1, max=5000, help="Direct conversations, two devices each.")]
Window = Annotated[int, typer.Option(min=1, max=256, help="Messages each sender has under way.")]
Size = Annotated[int, typer.Option(min=1, max=60_000, help="Bytes of a message's body.")]
Cycles = Annotated[int, typer.Option(min=1, max=32, help="Raw cycles under way at once.")]
Batch = Annotated[int, typer.Option(min=1, max=10_000, help="Messages of one raw cycle.")]


Found = TypeVar("Found")


@app.command()
def limit(
    seconds: Annotated[float, typer.Option(min=0.5, max=600)] = 10,
    batch: Batch = 500,
    cycles: Cycles = CYCLES_IN_FLIGHT,
    size: Size = 200,
    mongo_uri: MongoUri = None,
    json: Json = None,
) -> None:
    """MongoDB's raw cycle: insert and delete, with the relay's driver, documents, indexes and durability."""
    screen = Screen(json_on_stdout=json == "-")
    options = Options(batch=batch, cycles=cycles, size=size, mongo_uri=mongo_uri)

    async def work() -> Limit:
        with tempfile.TemporaryDirectory(prefix="relay-bench-") as directory:
            async with traffic.database(mongo_uri, Path(directory)) as (uri, pids):
                pids |= {"bench": os.getpid()}
                return await traffic.measure_limit(options, uri, pids, seconds, screen)

    _finish(_run(work()), screen.limit, json)


@app.command()
def live(
    pairs: Pairs = 100,
    window: Window = 4,
    seconds: Annotated[float, typer.Option(min=0.5, max=3600, help="The measured window.")] = 20,
    warmup: Annotated[float, typer.Option(min=0, max=600, help="Seconds before it.")] = 3,
    size: Size = 200,
    rate: Annotated[
        float | None,
        typer.Option(min=1, help="Open loop: so many messages/s in all, timed from when each was due."),
    ] = None,
    limit_seconds: Annotated[
        float, typer.Option(min=0, max=600, help="The raw cycle, half before and half after; 0: without.")
    ] = 10,
    batch: Batch = 500,
    cycles: Cycles = CYCLES_IN_FLIGHT,
    mongo_uri: MongoUri = None,
    url: Annotated[
        str | None, typer.Option(help="A relay that runs on this machine, instead of an own one.")
    ] = None,
    secret: Annotated[
        str | None, typer.Option(envvar="RELAY_JWT_SECRET", help="Its HS256 secret.", show_default=False)
    ] = None,
    json: Json = None,
) -> None:
    """Live traffic between pairs of devices, against the raw cycle of the same run. Every message is accounted for."""
    screen = Screen(json_on_stdout=json == "-")
    options = Options(
        pairs=pairs,
        window=window,
        seconds=seconds,
        warmup=warmup,
        size=size,
        batch=batch,
        cycles=cycles,
        rate=rate,
        limit_seconds=limit_seconds,
        mongo_uri=mongo_uri,
        url=url,
        secret=secret,
    )
    found: Live = _run(traffic.run(options, screen))
    _finish(found, screen.live, json, ok=found.ok)


@app.command()
def fanout(
    scenario: Annotated[
        list[spreading.Scenario] | None,
        typer.Option(help="Only this, several times for several; all without.", show_default=False),
    ] = None,
    devices: Annotated[
        int, typer.Option(min=1, max=10_000, help="Recipient devices of a large group, all connected.")
    ] = 1000,
    messages: Annotated[
        int, typer.Option(min=1, max=10_000, help="One at a time (latency), and waiting (reconnect).")
    ] = 50,
    senders: Annotated[
        int, typer.Option(min=1, max=1000, help="Devices that send into the large group.")
    ] = 4,
    window: Annotated[
        int, typer.Option(min=1, max=256, help="Messages each sender of a group has under way.")
    ] = 4,
    inline_groups: Annotated[int, typer.Option(min=1, max=1000, help="Small groups, one sender each.")] = 16,
    inline_devices: Annotated[
        int, typer.Option(min=1, max=1024, help="Recipient devices of each small group.")
    ] = 64,
    huge_devices: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Recipient devices of the huge group.")
    ] = 10_000,
    online: Annotated[int, typer.Option(min=0, max=10_000, help="So many of them are connected.")] = 1000,
    pairs: Annotated[int, typer.Option(min=1, max=5000, help="Pairs beside a large group.")] = 50,
    rate: Annotated[float, typer.Option(min=1, help="Messages/s of these pairs, in an open loop.")] = 200,
    seconds: Annotated[float, typer.Option(min=0.5, max=3600, help="Each measured window.")] = 10,
    warmup: Annotated[float, typer.Option(min=0, max=600, help="Seconds before it.")] = 3,
    size: Size = 200,
    limit_seconds: Annotated[
        float, typer.Option(min=0, max=600, help="The raw cycle, half before and half after; 0: without.")
    ] = 10,
    compare: Annotated[
        str | None,
        typer.Option(metavar="NAME=VALUE", help="Reconnect again with this RELAY_ setting, and compare."),
    ] = None,
    mongo_uri: MongoUri = None,
    json: Json = None,
) -> None:
    """Messages to many devices: groups of 64, of a thousand and of ten thousand. Every delivery is accounted for."""
    screen = Screen(json_on_stdout=json == "-")
    options = spreading.Options(
        scenarios=tuple(scenario or spreading.Scenario),
        devices=devices,
        messages=messages,
        senders=senders,
        window=window,
        inline_groups=inline_groups,
        inline_devices=inline_devices,
        huge_devices=huge_devices,
        online=online,
        pairs=pairs,
        rate=rate,
        seconds=seconds,
        warmup=warmup,
        size=size,
        limit_seconds=limit_seconds,
        compare=compare,
        mongo_uri=mongo_uri,
    )
    found: fanout_results.Fanout = _run(spreading.run(options, screen))
    _finish(found, lambda shown: fanout_results.show(shown, screen), json, ok=found.ok)


@app.command()
def nodes(
    scenario: Annotated[
        list[nodes_options.Scenario] | None,
        typer.Option(help="Only this, several times for several; all without.", show_default=False),
    ] = None,
    pairs: Pairs = 100,
    window: Window = 4,
    size: Size = 200,
    rounds: Annotated[
        int, typer.Option(min=1, max=50, help="How often the two of a comparison take turns.")
    ] = 3,
    seconds: Annotated[float, typer.Option(min=0.5, max=3600, help="The measured window of each turn.")] = 5,
    warmup: Annotated[float, typer.Option(min=0, max=600, help="Seconds before it.")] = 2,
    rate: Annotated[float, typer.Option(min=1, help="hop: messages/s.")] = 1000,
    shards_rate: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="shards: messages/s of an open loop, instead of as many as can be.",
            show_default=False,
        ),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, max=100_000, help="storm, kill, idle: so many.")] = 2000,
    group_devices: Annotated[
        int, typer.Option(min=1, max=1000, help="storm, kill: of one group, to the same messages.")
    ] = 10,
    messages: Annotated[int, typer.Option(min=1, max=256, help="storm, kill: waiting for each.")] = 5,
    storm_rate: Annotated[float, typer.Option(min=1, help="storm, kill: messages/s of others.")] = 300,
    at_once: Annotated[
        int, typer.Option(min=1, max=100_000, help="storm, kill: devices under way at the same time.")
    ] = 2000,
    calm: Annotated[float, typer.Option(min=0.5, max=600, help="storm, kill: seconds before it.")] = 8,
    rates: Annotated[
        list[float] | None,
        typer.Option(
            help="costs: messages/s, several times for several; 300, 1,000 and 3,000 without.",
            show_default=False,
        ),
    ] = None,
    idle_seconds: Annotated[
        float, typer.Option(min=1, max=3600, help="idle: so long do the devices only listen.")
    ] = 35,
    kept: Annotated[int, typer.Option(min=100, max=10_000_000, help="disk: messages stored.")] = 100_000,
    json: Json = None,
) -> None:
    """Two nodes against one, another node against the same, two shards against a replica set, and many devices at once."""
    screen = Screen(json_on_stdout=json == "-")
    options = nodes_options.Options(
        scenarios=tuple(scenario or nodes_options.Scenario),
        pairs=pairs,
        window=window,
        size=size,
        rounds=rounds,
        seconds=seconds,
        warmup=warmup,
        rate=rate,
        shards_rate=shards_rate,
        devices=devices,
        group_devices=group_devices,
        messages=messages,
        storm_rate=storm_rate,
        at_once=at_once,
        calm=calm,
        rates=tuple(rates or nodes_options.RATES),
        idle_seconds=idle_seconds,
        kept=kept,
    )
    found: nodes_results.Nodes = _run(several.run(options, screen))
    _finish(found, lambda shown: nodes_results.show(shown, screen), json, ok=found.ok)


@app.command()
def idle(
    connections: Annotated[int, typer.Option(min=1, max=100_000)] = 10_000,
    mongo_uri: MongoUri = None,
    json: Json = None,
) -> None:
    """What an idle connection costs in memory."""
    screen = Screen(json_on_stdout=json == "-")
    found: Idle = _run(memory.idle(connections, mongo_uri, screen))
    _finish(found, screen.idle, json, ok=found.ok)


@app.command()
def soak(
    messages: Annotated[int, typer.Option(min=100, max=1_000_000_000)] = 1_000_000,
    pairs: Pairs = 100,
    window: Window = 4,
    size: Size = 200,
    mongo_uri: MongoUri = None,
    json: Json = None,
) -> None:
    """Whether the relay's memory grows under long traffic."""
    screen = Screen(json_on_stdout=json == "-")
    options = Options(pairs=pairs, window=window, size=size, mongo_uri=mongo_uri)
    found: Soak = _run(memory.soak(messages, options, screen))
    _finish(found, screen.soak, json, ok=found.ok)


@app.command()
def control(
    users: Annotated[int, typer.Option(min=100, max=10_000_000)] = 100_000,
    memberships: Annotated[int, typer.Option(min=100)] = 1_000_000,
    contacts: Annotated[int, typer.Option(min=100)] = 400_000,
    heavy: Annotated[
        int,
        typer.Option(
            min=10, max=10_000, help="Conversations, and contacts, of the one whose lists are read."
        ),
    ] = 2000,
    samples: Annotated[int, typer.Option(min=5, max=10_000, help="Requests timed at each depth.")] = 50,
    seconds: Annotated[
        float, typer.Option(min=0.5, max=600, help="Of each run of messages and log-ins.")
    ] = 10,
    pairs: Pairs = 100,
    rate: Annotated[float, typer.Option(min=1, help="Messages/s of the open loop.")] = 500,
    mongo_uri: MongoUri = None,
    json: Json = None,
) -> None:
    """Lists, searches and log-ins among many generated people, and what log-ins do to messages."""
    screen = Screen(json_on_stdout=json == "-")
    options = plane.Options(
        users=users,
        memberships=memberships,
        contacts=contacts,
        heavy=heavy,
        samples=samples,
        seconds=seconds,
        pairs=pairs,
        rate=rate,
        mongo_uri=mongo_uri,
    )
    found: plane.Control = _run(plane.run(options, screen))
    _finish(found, lambda shown: plane.show(shown, screen), json, ok=found.ok)


def _run(work: Coroutine[Any, Any, Found]) -> Found:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_interruptible(work))
    except asyncio.CancelledError:
        raise typer.Exit(_INTERRUPTED) from None
    except BaseExceptionGroup as problems:
        known, unknown = problems.split(_EXPECTED)
        if known is None or unknown is not None:
            raise
        raise _failure(known) from None
    except _EXPECTED as problem:
        raise _failure(problem) from None


async def _interruptible(work: Coroutine[Any, Any, Found]) -> Found:
    task = asyncio.create_task(work, name="bench")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    return await task


def _failure(problem: BaseException) -> typer.Exit:
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    print(f"bench: {' '.join(str(problem).split()) or type(problem).__name__}", file=sys.stderr)
    return typer.Exit(1)


def _finish(found: msgspec.Struct, show: Callable[[Any], None], json: str | None, *, ok: bool = True) -> None:
    show(found)
    if json is not None:
        try:
            write_json(found, json, Path(os.environ.get("BENCH_CALLER_DIRECTORY") or "."))
        except OSError as error:
            print(f"bench: {json} cannot be written: {error.strerror or error}", file=sys.stderr)
            raise typer.Exit(1) from None
    if not ok:
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="scripts/bench")
