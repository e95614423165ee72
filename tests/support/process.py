"""A relay as it runs in earnest: a process of its own, which a test kills, pauses and starts again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import aiohttp
from pymongo import AsyncMongoClient

from relay.store.embedded_files import Layout, find_mongod
from tests.support.frozen import send_signal
from tests.support.node import SECRET, Node
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
LEDGER_LINE = re.compile(r'^relay_deliveries_(?:total\{outcome="(\w+)"\}|(waiting)) (\S+)$', re.MULTILINE)


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def ledger_of(node: Node) -> dict[str, int]:
    """The node's ledger as its ``/metrics`` show it, by outcome, with ``waiting``."""
    async with node.http.get(node.url + "/metrics") as response:
        text = await response.text()
    return {name or waiting: int(float(value)) for name, waiting, value in LEDGER_LINE.findall(text)}


async def metric(node: Node, name: str) -> float:
    """One value of the node's ``/metrics``, by its name with labels; 0 when it is absent."""
    async with node.http.get(node.url + "/metrics") as response:
        text = await response.text()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return 0.0 if found is None else float(found.group(1))


def environment(**settings: Any) -> dict[str, str]:
    """This process's environment without its own relay settings, with these instead, and without the limits that a test's
    load would meet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    off = dict.fromkeys(("rate_connect", "rate_conversation", "rate_conversation_change"), "off")
    given = {"message_rate": 0, **off, **settings}
    return {**kept, **{f"RELAY_{name.upper()}": str(value) for name, value in given.items()}}


async def run_relay(seconds: float = 30, **settings: Any) -> tuple[int, str, str]:
    """Runs a relay that is expected to end by itself: exit code, standard output, standard error."""
    return await run_module("relay", seconds=seconds, **settings)


async def run_module(*line: str, seconds: float = 30, **settings: Any) -> tuple[int, str, str]:
    """Runs a module of the project, with arguments, that is expected to end by itself, as ``run_relay`` does."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *line,
        cwd=ROOT,
        env=environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def running(pid: int) -> bool:
    """Whether this process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class RelayProcess(Node):
    """One relay process with its own mongod, unless ``mongo_uri`` is among the settings; the port stays the same through
    every restart. ``close`` ends whatever of it still runs, by process id."""

    def __init__(self, directory: Path, http: aiohttp.ClientSession, **settings: Any) -> None:
        self.directory = directory
        self.http = http
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / "relay.log"
        self.settings = {
            "port": self.port,
            "data_dir": directory / "data",
            "jwt_secret": SECRET,
            "embedded_cache_gb": 0.25,
            "log_format": "text",
            **settings,
        }
        self.environment: dict[str, str] = {}
        """What its environment has beside its settings."""
        self.arguments: list[str] = []
        self._devices = []
        self._process: subprocess.Popen[bytes] | None = None
        self._client: AsyncMongoClient[dict[str, Any]] | None = None
        self._mongods: set[int] = set()

    @property
    def pid(self) -> int:
        """The relay's process id."""
        assert self._process is not None
        return self._process.pid

    async def start(self, seconds: float = 30) -> None:
        """Starts the process and waits until it is ready."""
        # A process group of its own, as a terminal gives it: Ctrl-C goes to the whole group.
        with self.log.open("ab") as log:
            self._process = await asyncio.to_thread(
                subprocess.Popen,
                [sys.executable, "-m", "relay", *self.arguments],
                cwd=ROOT,
                env={**environment(**self.settings), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        await self.ready(seconds)
        if "mongo_uri" not in self.settings:
            self._mongods.add(self.mongod_pid)
        if self._client is None:
            self._client = AsyncMongoClient(self.mongo_uri, tz_aware=True)
            self.db = self._client[self.settings.get("mongo_database", "relay")]

    async def ready(self, seconds: float = 30) -> None:
        """Waits until the relay says that it is ready."""

        async def asked() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"the relay ended: {self.said()[-2000:]}"
            try:
                async with self.http.get(self.url + "/readyz") as response:
                    return response.status == 200
            except (aiohttp.ClientError, OSError):
                return False

        await until(asked, seconds, "the relay is ready")

    @property
    def mongo_uri(self) -> str:
        """Where its MongoDB is."""
        if "mongo_uri" in self.settings:
            return str(self.settings["mongo_uri"])
        return f"mongodb://127.0.0.1:{self._mongod_state()['port']}/?directConnection=true"

    @property
    def mongod_pid(self) -> int:
        """The process id of the mongod that runs now."""
        return int(self._mongod_state()["pid"])

    def note_mongod(self) -> int:
        """The present mongod's process id, remembered for ``close``."""
        pid = self.mongod_pid
        self._mongods.add(pid)
        return pid

    def _mongod_state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Layout(self.directory / "data" / "mongo").state.read_text())
        return found

    def said(self) -> str:
        """All that it has logged and printed."""
        return self.log.read_text(errors="replace")

    def rss(self) -> int:
        """Resident memory of the relay, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return int(found.group(1)) * 1024

    def signal(self, number: int) -> None:
        """Sends a signal to the relay alone; with SIGSTOP it stands still when this returns."""
        send_signal(self.pid, number)

    def signal_group(self, number: int) -> None:
        """Sends a signal to its whole process group, as a terminal does."""
        os.killpg(self.pid, number)

    async def wait(self, seconds: float) -> int:
        """Waits for its end; the exit code. TimeoutError when it goes on."""
        process = self._process
        assert process is not None
        try:
            return await asyncio.to_thread(process.wait, seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the relay still runs after {seconds:g} s") from None

    async def kill(self) -> None:
        """kill -9, of the relay alone."""
        self.signal(signal.SIGKILL)
        await self.wait(5)

    async def close(self) -> None:
        """Ends the devices, the relay and every mongod of its data directory."""
        for device in self._devices:
            await device.close()
        if self._client is not None:
            await self._client.close()
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, 12)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait, 5)
        if "mongo_uri" not in self.settings:
            with contextlib.suppress(OSError, ValueError, TypeError):
                self._mongods.add(self.mongod_pid)
            data = str(Layout(self.directory / "data" / "mongo").data)
            await end_all(pid for pid in self._mongods if _runs_on(pid, data))


async def end_all(pids: Iterable[int]) -> None:
    """Kills these processes and waits for their end."""
    wanted = [pid for pid in pids if running(pid)]
    for pid in wanted:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    async def ended() -> bool:
        return not any(running(pid) for pid in wanted)

    await until(ended, 5, "the killed processes end")


def _runs_on(pid: int, data: str) -> bool:
    try:
        return data in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return False


class Mongods:
    """mongod processes of a test's own, without a relay around them: a standalone one, or a set of several members."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ports: list[int] = []

    async def start(self, *arguments: str) -> int:
        """Starts one more on a free port; returns the port. It answers when this returns."""
        home = self._directory / f"member{len(self.ports)}"
        (home / "data").mkdir(parents=True)
        binary = await asyncio.to_thread(find_mongod, Layout(home))
        port = free_port()
        command = [str(binary), "--dbpath", str(home / "data"), "--port", str(port), "--bind_ip", "127.0.0.1"]
        command += ["--nounixsocket", "--wiredTigerCacheSizeGB", "0.25", "--logpath", str(home / "log")]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false", *arguments]
        process = await asyncio.to_thread(
            subprocess.Popen, command, stdout=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}
        )
        self._processes.append(process)
        self.ports.append(port)
        async with AsyncMongoClient[dict[str, Any]](
            "127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=20_000
        ) as client:
            await client.admin.command("ping")
        return port

    async def start_set(self, members: int) -> str:
        """Starts a replica set whose first member becomes its primary; returns the URI."""
        for _ in range(members):
            await self.start(
                "--replSet", "faults", "--oplogSize", "64", "--setParameter", "enableTestCommands=1"
            )
        async with AsyncMongoClient[dict[str, Any]](
            "127.0.0.1", self.ports[0], directConnection=True
        ) as client:
            rows = [
                {"_id": number, "host": f"127.0.0.1:{port}", "priority": 1 if number == 0 else 0}
                for number, port in enumerate(self.ports)
            ]
            await client.admin.command("replSetInitiate", {"_id": "faults", "members": rows})

            async def primary() -> bool:
                return bool((await client.admin.command("hello")).get("isWritablePrimary"))

            await until(primary, 30, "the set has its primary")
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"mongodb://{hosts}/?replicaSet=faults"

    def signal(self, member: int, number: int) -> None:
        """Sends a signal to one member; with SIGSTOP it stands still when this returns."""
        send_signal(self._processes[member].pid, number)

    async def close(self) -> None:
        """Kills them all."""
        for process in self._processes:
            process.kill()
            await asyncio.to_thread(process.wait, 5)
