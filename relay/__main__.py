"""``python -m relay``: one node, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys

import structlog
import uvloop

from config import settings as configuration
from relay import __version__, app, logs
from relay.configured import StartError

log = structlog.get_logger(__name__)


def main() -> int:
    """Runs the relay; returns the exit code."""
    try:
        settings = configuration.load()
    except configuration.SettingsError as error:
        print(f"relay: {error}", file=sys.stderr)
        return 2
    logs.configure(settings.log_format, settings.log_level)
    _allow_many_sockets()
    for name in configuration.unknown_variables():
        log.warning("this environment variable is no setting of the relay; see docs/settings.md", name=name)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_serve(settings))
        # Nothing is left to do, but threads of the driver may wait on a store that does not answer; the interpreter
        # would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


async def _serve(settings: configuration.Settings) -> int:
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
    except StartError as error:
        stop.cancel()
        print(f"relay: {error}", file=sys.stderr)
        return 1
    _greet(relay)
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
    if relay.embedded is None and not sys.stdout.isatty():
        return
    # scripts/chat looks for a relay there by itself.
    where = "" if relay.url == "http://127.0.0.1:8080" else f" --url {relay.url}"
    kept = f"in {settings.data_dir}/ (own MongoDB)" if relay.embedded is not None else "in your MongoDB"
    print(
        f"\n  Relay {__version__} listens on {relay.url}; messages are kept {kept}.\n\n"
        "  Try it, in two more terminals:\n"
        f"    scripts/chat --user ann --to bob{where}\n"
        f"    scripts/chat --user bob --to ann{where}\n\n"
        f"  Look at it:  {relay.url}/docs  {relay.url}/metrics\n"
        "  Stop it:     Ctrl-C\n",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
