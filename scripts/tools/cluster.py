"""``scripts/cluster up``: a real sharded MongoDB on loopback, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from time import monotonic
from typing import Annotated, Final

import typer
import uvloop
from pymongo.errors import PyMongoError

from relay.store.embedded_files import EmbeddedError
from tests.cluster import MAX_SHARDS, Cluster
from tests.support.mongo_server import MongoServer, ServerError

_AGAIN_SECONDS: Final = 15.0

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A real sharded MongoDB for trying and testing: a config server, shards, and forwarders that stand for routers. On "
    "loopback only, without access control.",
)


@app.callback()
def _commands() -> None:
    """Keeps `up` a command of its own."""


@app.command()
def up(
    shards: Annotated[int, typer.Option(min=1, max=MAX_SHARDS, help="How many shards.")] = 2,
    routers: Annotated[
        int,
        typer.Option(
            min=0, max=MAX_SHARDS, help="Routers apart from the shards; 0: each shard is a router, too."
        ),
    ] = 0,
    directory: Annotated[
        str | None,
        typer.Option(
            help="Where its files go, kept afterwards; empty or new. Default: a temporary one, removed."
        ),
    ] = None,
) -> None:
    """Starts a cluster, prints how to run a relay on it, and ends it on Ctrl-C."""
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
            uvloop.run(_run(Path(used), shards, routers))
    except (EmbeddedError, ServerError, PyMongoError, OSError) as error:
        sys.exit(f"cluster: {str(error)[:500]}")


async def _run(directory: Path, shards: int, routers: int) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    began = monotonic()

    def say(text: str) -> None:
        print(f"cluster: {text}", file=sys.stderr, flush=True)

    try:
        async with Cluster(directory, shards, routers=routers, progress=say) as cluster:
            say(f"ready after {monotonic() - began:.1f} s; its files are in {directory}")
            print(_instructions(cluster), flush=True)
            async with asyncio.TaskGroup() as watchers:
                for server in (cluster.config, *cluster.shards, *cluster.routers):
                    watchers.create_task(_keep(server, say), name=f"watch-{server.name}")
    except asyncio.CancelledError:
        say("ended")


async def _keep(server: MongoServer, say: Callable[[str], None]) -> None:
    """Starts a server again some while after it was killed: time to see what a dead shard does."""
    while True:
        await server.ended()
        say(f"{server.name} has died; it starts again in {_AGAIN_SECONDS:g} s")
        await asyncio.sleep(_AGAIN_SECONDS)
        await server.start()
        say(f"{server.name} runs again, pid {server.pid}")


def _instructions(cluster: Cluster) -> str:
    shards = "\n".join(f"#   {shard.name}  {shard.uri}  pid {shard.pid}" for shard in cluster.shards)
    return (
        f"export RELAY_MONGO_URI='{cluster.uri}'\n"
        "# A relay on it, from another terminal, after that line:  make run\n"
        "# A second one:  RELAY_PORT=8081 make run\n"
        f"# The shards themselves, past the routers:\n{shards}\n"
        f"#   config  {cluster.config.uri}  pid {cluster.config.pid}\n"
        f"# kill -9 or kill -STOP one to see what that does; a dead one starts again after {_AGAIN_SECONDS:g} s.\n"
        "# Ctrl-C ends all of it."
    )


if __name__ == "__main__":
    app(prog_name="scripts/cluster")
