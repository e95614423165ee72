"""The processes of a run: mongod, the relay, the load generator. Each is ended by its id, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import secrets
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from relay.store.embedded import EmbeddedMongo
from scripts.tools.bench.messages import AnyNews, Failed, Order

ROOT: Final = Path(__file__).resolve().parents[3]
AUDIENCE: Final = "relay"
_START_SECONDS: Final = 60.0
_END_SECONDS: Final = 15.0
_LINE: Final = 1 << 20
_KEPT_LINES: Final = 20
# All load comes from one address, and from few devices: the limits would be what is measured.
_WITHOUT_LIMITS: Final = {
    "RELAY_MESSAGE_RATE": "0",
    "RELAY_RATE_LOGIN_ADDRESS": "off",
    "RELAY_RATE_LOGIN_ACCOUNT": "off",
    "RELAY_RATE_REGISTER": "off",
    "RELAY_RATE_REFRESH": "off",
    "RELAY_RATE_CONNECT": "off",
    "RELAY_RATE_SEARCH": "off",
    "RELAY_RATE_KEY_CHANGE": "off",
    "RELAY_RATE_KEY_CLAIM_PAIR": "off",
    "RELAY_RATE_KEY_CLAIM_CALLER": "off",
    "RELAY_RATE_CONTACT_CHANGE": "off",
    "RELAY_RATE_PROFILE_CHANGE": "off",
    "RELAY_RATE_CONVERSATION": "off",
}
_decode_news: Final = msgspec.json.Decoder(AnyNews).decode


class BenchError(Exception):
    """The run cannot go on; one line for people."""


@dataclass(slots=True)
class RelayNode:
    """A relay of the bench's own. ``complaints`` are the first lines it logged as warnings or worse, ``faults`` counts
    those that are errors."""

    url: str
    pid: int
    secret: str
    database: str
    complaints: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    faults: int = 0


class LoadGenerator:
    """The load generator while it runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def news(self) -> AnyNews:
        """The next thing it tells. Raises BenchError when it fails or has ended."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise BenchError("the load generator ended unexpectedly; the lines above say why")
        found: AnyNews = _decode_news(line)
        if isinstance(found, Failed):
            raise BenchError(f"the load could not be generated: {found.reason}")
        return found

    def end_phase(self) -> None:
        """The next phase of its window begins, or the window ends."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")

    def dismiss(self) -> None:
        """Lets it tell its final counts and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()


@contextlib.asynccontextmanager
async def mongod(directory: Path, cache_gb: float) -> AsyncIterator[tuple[str, int]]:
    """A mongod of the bench's own: its URI and process id. Raises EmbeddedError."""
    embedded = EmbeddedMongo(directory, cache_gb=cache_gb)
    uri = await embedded.start()
    try:
        assert embedded.pid is not None
        yield uri, embedded.pid
    finally:
        await embedded.stop()


@contextlib.asynccontextmanager
async def relay_node(
    uri: str,
    database: str,
    directory: Path,
    settings: Mapping[str, str] | None = None,
    *,
    secret: str | None = None,
) -> AsyncIterator[RelayNode]:
    """A relay on this database, listening on a free port. RELAY_* of the environment apply, but for what says where
    things are, and ``settings`` instead of them. ``secret`` signs tokens; one of its own when None. Raises BenchError."""
    secret = secret or secrets.token_hex(32)
    own = {
        "RELAY_HOST": "127.0.0.1",
        "RELAY_PORT": "0",
        "RELAY_DATA_DIR": str(directory),
        "RELAY_MONGO_URI": uri,
        "RELAY_MONGO_DATABASE": database,
        "RELAY_JWT_SECRET": secret,
        "RELAY_JWT_AUDIENCE": AUDIENCE,
        "RELAY_AUTO_PROVISION": "true",
        "RELAY_LOG_FORMAT": "json",
        "RELAY_LOG_LEVEL": "info",
    }
    elsewhere = {
        "RELAY_REDIS_URL",
        "RELAY_JWT_SECRET_FILE",
        "RELAY_JWT_PUBLIC_KEY_FILE",
        "RELAY_JWT_JWKS_FILE",
    }
    given = {name: value for name, value in os.environ.items() if name not in elsewhere}
    environment = _WITHOUT_LIMITS | given | dict(settings or {}) | own
    process = await _start("relay", environment, stderr=asyncio.subprocess.PIPE)
    node = RelayNode("", process.pid, secret, database)
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    reading = asyncio.create_task(_read_log(process, node, listening), name="relay log")
    try:
        try:
            node.url = await asyncio.wait_for(listening, _START_SECONDS)
        except TimeoutError:
            raise BenchError(f"the relay did not listen within {_START_SECONDS:g} s") from None
        yield node
    finally:
        await _end(process, signal.SIGTERM)
        await reading


@contextlib.asynccontextmanager
async def load_generator(order: Order) -> AsyncIterator[LoadGenerator]:
    """The load generator at work on an order."""
    async with helper("scripts.tools.bench.load") as process:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        await process.stdin.drain()
        yield LoadGenerator(process)


@contextlib.asynccontextmanager
async def helper(module: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A module as a process whose standard input and output are pipes; ended with the block."""
    process = await _start(
        module, dict(os.environ), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        await _end(process, signal.SIGTERM)


def raise_file_limit(wanted: int) -> None:
    """Lets this process and those it starts open so many files. Raises BenchError when the system does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise BenchError(
            f"{wanted} open files are needed and the system allows {hard}; raise it with ulimit -Hn"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _start(
    module: str,
    environment: dict[str, str],
    *,
    stdin: int = asyncio.subprocess.DEVNULL,
    stdout: int = asyncio.subprocess.DEVNULL,
    stderr: int | None = None,
) -> asyncio.subprocess.Process:
    # A session of its own: Ctrl-C reaches the bench alone, which then ends the others in order.
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        cwd=ROOT,
        env=environment,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        limit=_LINE,
        start_new_session=True,
    )


async def _end(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            await asyncio.wait_for(process.wait(), _END_SECONDS)
        except (TimeoutError, asyncio.CancelledError):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _read_log(
    process: asyncio.subprocess.Process, node: RelayNode, listening: asyncio.Future[str]
) -> None:
    assert process.stderr is not None
    last = ""
    try:
        async for raw in process.stderr:
            last = raw.decode(errors="replace").strip()
            try:
                line = msgspec.json.decode(raw, type=dict[str, object])
            except msgspec.DecodeError:
                node.complaints.append(last)
                continue
            level = line.get("level")
            if line.get("event") == "listening" and not listening.done():
                listening.set_result(str(line.get("url")))
            elif level in ("error", "critical"):
                node.faults += 1
                node.complaints.append(last)
            elif level == "warning":
                node.complaints.append(last)
    finally:
        if not listening.done():
            listening.set_exception(BenchError(f"the relay did not start: {last or 'it said nothing'}"))
