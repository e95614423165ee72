"""``python -m relay``: one node, or several workers on one port, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import signal
import sys

import structlog
import uvloop

from config import settings as configuration
from relay import __version__, app, logs, workers
from relay.configured import StartError
from relay.worker import tell_ready

log = structlog.get_logger(__name__)


def main() -> int:
    """Runs the relay; returns the exit code."""
    _read_arguments()
    try:
        settings = configuration.load()
    except configuration.SettingsError as error:
        print(f"relay: {error}", file=sys.stderr)
        return 2
    logs.configure(settings.log_format, settings.log_level, worker=settings.worker)
    _allow_many_sockets()
    for name in configuration.unknown_variables():
        log.warning("this environment variable is no setting of the relay; see docs/settings.md", name=name)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_serve(settings))
        # Nothing is left to do, but threads of the driver may wait on a store that does not answer; the interpreter
        # would wait for them.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _read_arguments() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m relay",
        description="Runs the relay. Its settings come from the environment; docs/settings.md lists them.",
    )
    parser.add_argument("--workers", metavar="N", help="processes on the one port (RELAY_WORKERS)")
    count = parser.parse_args().workers
    if count is not None:
        os.environ["RELAY_WORKERS"] = count


async def _serve(settings: configuration.Settings) -> int:
    try:
        if settings.workers > 1 and not settings.worker:
            return await workers.serve(settings, _welcome(settings))
        return await _serve_alone(settings)
    except StartError as error:
        print(f"relay: {error}", file=sys.stderr)
        return 1


async def _serve_alone(settings: configuration.Settings) -> int:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked.set)
    starting = asyncio.create_task(app.start(settings), name="start")
    stop = asyncio.create_task(asked.wait(), name="signal")
    await asyncio.wait({starting, stop}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return 0
    try:
        relay = starting.result()
    except StartError:
        stop.cancel()
        raise
    _greet(relay)
    tell_ready()
    failed = asyncio.create_task(relay.stopping.wait(), name="fault")
    await asyncio.wait({stop, failed}, return_when=asyncio.FIRST_COMPLETED)
    log.info("stopping", connections=len(relay.context.hub))
    await relay.stop()
    stop.cancel()
    failed.cancel()
    log.info("stopped")
    return 0 if relay.fault is None else 1


def _allow_many_sockets() -> None:
    """Every connection is an open file; the usual soft limit of 1,024 is far below what the process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _greet(relay: app.Relay) -> None:
    settings = relay.settings
    log.info("listening", url=relay.url, waiting=relay.context.ledger.waiting)
    _welcome(settings)(relay.url, relay.embedded is not None)


def _welcome(settings: configuration.Settings) -> workers.Welcome:
    def welcome(url: str, own: bool) -> None:
        if not own and not sys.stdout.isatty():
            return
        # scripts/chat looks for a relay there by itself.
        where = "" if url == "http://127.0.0.1:8080" else f" --url {url}"
        kept = f"in {settings.data_dir}/ (own MongoDB)" if own else "in your MongoDB"
        print(
            f"\n  Relay {__version__} listens on {url}; messages are kept {kept}.\n\n"
            "  Try it, in two more terminals:\n"
            f"    scripts/chat --user ann --to bob{where}\n"
            f"    scripts/chat --user bob --to ann{where}\n\n"
            f"  Look at it:  {url}/docs  {url}/metrics\n"
            "  Stop it:     Ctrl-C\n",
            flush=True,
        )

    return welcome


if __name__ == "__main__":
    sys.exit(main())
