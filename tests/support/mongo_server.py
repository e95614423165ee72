"""One process of a test cluster: a mongod that is the only member of its replica set. It ends with the process that started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pymongo import AsyncMongoClient
from pymongo import timeout as time_limit
from pymongo.errors import OperationFailure, PyMongoError

from relay.tied import tied
from tests.support.frozen import send_signal
from tests.support.process import free_port

_PORT_TRIES: Final = 3
_NOT_YET_INITIALIZED: Final = 94
_START_SECONDS: Final = 60.0


class ServerError(Exception):
    """A process of the cluster does not start; one line for people."""


def spawn(arguments: Sequence[str], output: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Starts a process in a session of its own, so that Ctrl-C does not reach it, which the kernel ends with this one. Call in
    the main thread: a thread's end would be taken for it."""
    with output.open("ab") as log:
        return subprocess.Popen(
            tied(arguments),
            stdin=subprocess.DEVNULL,
            stdout=options.pop("stdout", log),
            stderr=log,
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
            **options,
        )


async def end(process: subprocess.Popen[bytes], patience: float = 5) -> None:
    """Kills a process and waits for its end."""
    process.kill()
    await asyncio.to_thread(process.wait, patience)


class MongoServer:
    """One mongod. Its port and its files stay the same over restarts. What it acknowledged with ``j: true`` survives ``kill``."""

    def __init__(
        self,
        name: str,
        directory: Path,
        binary: Path,
        *,
        role: str,
        parameters: Mapping[str, str],
        cache_gb: float,
    ) -> None:
        """``role`` is ``configsvr`` or ``shardsvr``; ``name`` that of its replica set."""
        self.name = name
        self.port = 0
        self._directory = directory
        self._binary = binary
        self._role = role
        self._parameters = parameters
        self._cache_gb = cache_gb
        self._process: subprocess.Popen[bytes] | None = None
        self._client: AsyncMongoClient[dict[str, Any]] | None = None

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"127.0.0.1:{self.port}"

    @property
    def uri(self) -> str:
        """Where to ask this server itself, past every router."""
        return f"mongodb://{self.address}/?directConnection=true&retryWrites=false"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, f"{self.name} does not run"
        return self._process.pid

    @property
    def client(self) -> AsyncMongoClient[dict[str, Any]]:
        """A client of this server itself; it lives as long as the server is not closed."""
        assert self._client is not None, f"{self.name} was never started"
        return self._client

    @property
    def is_running(self) -> bool:
        """Whether its process lives, stopped or not."""
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Starts it, again after ``kill``; it is primary when this returns. Raises ServerError."""
        if self.is_running:
            return
        for attempt in range(_PORT_TRIES):
            if self._client is None:
                self.port = free_port()
            try:
                await self._start()
                return
            except ServerError:
                # Somebody may have taken the port before it could.
                if self._client is not None or attempt == _PORT_TRIES - 1 or not self._is_port_taken():
                    raise

    async def _start(self) -> None:
        data = self._directory / "data"
        data.mkdir(parents=True, exist_ok=True)
        command = [str(self._binary), "--dbpath", str(data), "--port", str(self.port)]
        command += ["--bind_ip", "127.0.0.1", "--nounixsocket", f"--{self._role}", "--replSet", self.name]
        command += ["--networkMessageCompressors", "disabled", "--oplogSize", "256", "--quiet"]
        command += ["--wiredTigerCacheSizeGB", f"{self._cache_gb:g}"]
        command += ["--logpath", str(self._log), "--logappend", "--slowOpSampleRate", "0"]
        for name, value in {"diagnosticDataCollectionEnabled": "false", **self._parameters}.items():
            command += ["--setParameter", f"{name}={value}"]
        self._process = spawn(command, self._directory / "output")
        deadline = time.monotonic() + _START_SECONDS
        while not await self._is_listening():
            await self._pause(deadline)
        async with AsyncMongoClient[dict[str, Any]](
            "127.0.0.1", self.port, directConnection=True, serverSelectionTimeoutMS=5_000
        ) as client:
            while not await self._is_primary(client):
                await self._pause(deadline)
        if self._client is None:
            self._client = AsyncMongoClient(self.uri, tz_aware=True, serverSelectionTimeoutMS=10_000)

    async def _pause(self, deadline: float) -> None:
        if not self.is_running:
            raise ServerError(f"{self.name} ended while it started; see {self._log}")
        if time.monotonic() > deadline:
            raise ServerError(f"{self.name} is not ready after {_START_SECONDS:g} s; see {self._log}")
        await asyncio.sleep(0.02)

    async def _is_listening(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    async def _is_primary(self, client: AsyncMongoClient[dict[str, Any]]) -> bool:
        try:
            hello = await client.admin.command("hello")
            if "setName" not in hello:
                member = {"_id": 0, "host": self.address}
                about: dict[str, Any] = {"_id": self.name, "members": [member]}
                if self._role == "configsvr":
                    about["configsvr"] = True
                await client.admin.command("replSetInitiate", about)
            return bool(hello.get("isWritablePrimary"))
        except OperationFailure as error:
            # Initiated a moment ago, or not ready to be.
            if error.code != _NOT_YET_INITIALIZED and not self.is_running:
                raise ServerError(f"{self.name} does not become a replica set: {error}") from None
            return False
        except PyMongoError:
            return False

    def stop(self) -> None:
        """SIGSTOP: it keeps its connections and answers nothing. It stands still when this returns."""
        send_signal(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """The end of ``stop``."""
        send_signal(self.pid, signal.SIGCONT)

    async def ended(self) -> None:
        """Returns when its process has ended."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        # Readable at its end; it names this very process.
        descriptor = os.pidfd_open(self.pid)
        loop.add_reader(descriptor, over.set)
        try:
            await over.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    async def kill(self) -> None:
        """kill -9; ``start`` brings it back."""
        if self._process is not None:
            await end(self._process)

    async def close(self) -> None:
        """Kills it for good."""
        if self._client is not None:
            # Before: a client that ends its sessions waits for a server.
            with time_limit(1), contextlib.suppress(PyMongoError):
                await self._client.close()
            self._client = None
        await self.kill()

    @property
    def _log(self) -> Path:
        return self._directory / "mongod.log"

    def _is_port_taken(self) -> bool:
        return self._log.exists() and "already in use" in self._log.read_text(errors="replace")
