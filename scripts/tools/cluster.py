"""``scripts/cluster up``: relay nodes, a Valkey between them and a real sharded MongoDB beneath, on loopback, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, nullcontext
from pathlib import Path
from time import monotonic
from typing import Annotated, Final

import typer
import uvloop
from pymongo.errors import PyMongoError

from relay.store.embedded_files import EmbeddedError
from relay.store.embedded_valkey import EmbeddedValkey
from scripts.tools.cluster_nodes import NodeError, RelayNode
from tests.cluster import MAX_SHARDS, Cluster
from tests.support.mongo_server import MongoServer, ServerError

_AGAIN_SECONDS: Final = 15.0
_MAX_NODES: Final = 8

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Everything that several relay nodes need, for trying and testing: a real sharded MongoDB (a config server, shards, and "
    "forwarders that stand for routers), a Valkey, and the nodes. On loopback only; the MongoDB is without access control.",
)


@app.callback()
def _commands() -> None:
    """Keeps `up` a command of its own."""


@app.command()
def up(
    shards: Annotated[int, typer.Option(min=1, max=MAX_SHARDS, help="How many shards.")] = 2,
    nodes: Annotated[
        int, typer.Option(min=0, max=_MAX_NODES, help="How many relay nodes; 0: the MongoDB alone.")
    ] = 2,
    port: Annotated[
        int, typer.Option(min=1, max=65_000, help="The first node's port; the next ones follow it.")
    ] = 8080,
    routers: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_SHARDS,
            help="Routers apart from the shards; 0: each shard is a router, too. Default: one for each node.",
        ),
    ] = None,
    directory: Annotated[
        str | None,
        typer.Option(
            help="Where its files go, kept afterwards; empty or new. Default: a temporary one, removed."
        ),
    ] = None,
) -> None:
    """Starts all of it, prints what it is and how to use it, and ends it on Ctrl-C."""
    place = None
    if directory is not None:
        place = Path(os.environ.get("CLUSTER_CALLER_DIRECTORY", "."), directory).resolve()
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            sys.exit(f"cluster: {place} is not an empty directory; name another, or remove it")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="relay-cluster-")
            if place is None
            else nullcontext(place) as used
        ):
            uvloop.run(_run(Path(used), shards, nodes if routers is None else routers, nodes, port))
    except (EmbeddedError, NodeError, ServerError, PyMongoError, OSError) as error:
        sys.exit(f"cluster: {str(error)[:500]}")


async def _run(directory: Path, shards: int, routers: int, nodes: int, port: int) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    began = monotonic()

    def say(text: str) -> None:
        print(f"cluster: {text}", file=sys.stderr, flush=True)

    try:
        async with AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(
                Cluster(directory, shards, routers=routers, progress=say)
            )
            valkey = await _start_valkey(stack, directory, say) if nodes else None
            relays = (
                [] if valkey is None else await _start_nodes(stack, cluster, valkey, directory, nodes, port)
            )
            say(f"ready after {monotonic() - began:.1f} s; its files are in {directory}")
            print(_instructions(cluster, valkey, relays), flush=True)
            async with asyncio.TaskGroup() as watchers:
                for server in (cluster.config, *cluster.shards, *cluster.routers):
                    watchers.create_task(_keep(server, say), name=f"watch-{server.name}")
                for relay in relays:
                    watchers.create_task(relay.keep(say), name=f"watch-{relay.name}")
    except* asyncio.CancelledError:
        say("ended")
    except* (NodeError, ServerError) as failed:
        raise failed.exceptions[0] from None


async def _start_valkey(stack: AsyncExitStack, directory: Path, say: Callable[[str], None]) -> EmbeddedValkey:
    say("starting Valkey and relay nodes")
    valkey = EmbeddedValkey(directory / "valkey")
    await valkey.start()
    stack.push_async_callback(valkey.stop)
    return valkey


async def _start_nodes(
    stack: AsyncExitStack, cluster: Cluster, valkey: EmbeddedValkey, directory: Path, count: int, port: int
) -> list[RelayNode]:
    relays: list[RelayNode] = []
    for number in range(count):
        forwarder = cluster.forwarders[number % len(cluster.forwarders)]
        uri = forwarder.uri if cluster.routers else cluster.uri
        relay = RelayNode(f"relay{number + 1}", port + number, directory, mongo=uri, redis=valkey.url)
        stack.push_async_callback(relay.close)
        # One after the other: the first one makes secrets and indexes.
        await relay.start()
        relays.append(relay)
    return relays


async def _keep(server: MongoServer, say: Callable[[str], None]) -> None:
    """Starts a server again some while after it was killed: time to see what a dead shard does."""
    while True:
        await server.ended()
        say(f"{server.name} has died; it starts again in {_AGAIN_SECONDS:g} s")
        await asyncio.sleep(_AGAIN_SECONDS)
        await server.start()
        say(f"{server.name} runs again, pid {server.pid}")


def _instructions(cluster: Cluster, valkey: EmbeddedValkey | None, relays: Sequence[RelayNode]) -> str:
    lines = [f"# {relay.name}  {relay.url}  pid {relay.pid}  log {relay.log}" for relay in relays]
    if relays:
        lines.append("# Two people at two nodes, each in a terminal of its own:")
        lines.append(f"scripts/chat --url {relays[0].url} --user ann --to bob")
        lines.append(f"scripts/chat --url {relays[-1].url} --user bob --to ann")
    else:
        lines.append("# A relay on it, from another terminal, after this line:  make run")
    lines.append(f"export RELAY_MONGO_URI='{cluster.uri}'")
    lines.append("# The shards themselves, past the routers:")
    lines += [f"#   {one.name}  {one.uri}  pid {one.pid}" for one in (*cluster.shards, cluster.config)]
    if valkey is not None:
        lines.append("# What the nodes tell each other over:")
        lines.append(f"#   valkey  {valkey.url}  pid {valkey.pid}")
    lines.append("# kill -9 or kill -STOP any of them to see what that does; what died starts again.")
    lines.append("# Ctrl-C ends all of it.")
    return "\n".join(lines)


if __name__ == "__main__":
    app(prog_name="scripts/cluster")
