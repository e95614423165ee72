"""Several workers on one port: who serves, who is started again, how they leave, and that nothing of them stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from pymongo import AsyncMongoClient

from relay.store.embedded import EmbeddedMongo
from tests.faults.conftest import Processes
from tests.support.device import Closed, WireDevice
from tests.support.frozen import freeze
from tests.support.node import SECRET
from tests.support.process import ROOT, RelayProcess, environment, free_port, run_module, run_relay, running
from tests.support.waiting import until

WORKER = "-m relay"
VALKEY = "valkey-server"
LIFE = re.compile(r"\[info\] (stopping|stopped)\b.*\bworker=(\d)")


def beneath(relay: RelayProcess, kind: str = "") -> dict[int, str]:
    """The processes that the supervisor has started, of this kind, by pid, with their command lines."""
    pids = Path(f"/proc/{relay.pid}/task/{relay.pid}/children").read_text().split()
    found = {int(pid): _command(pid) for pid in pids}
    return {pid: command for pid, command in found.items() if kind in command and running(pid)}


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def ports_in_a_row(count: int) -> int:
    """The first of so many free loopback ports."""
    while True:
        first = free_port()
        try:
            for port in range(first + 1, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        return first


async def ended(pids: set[int], seconds: float, what: str) -> None:
    async def none_left() -> bool:
        return not any(running(pid) for pid in pids)

    await until(none_left, seconds, what)


@pytest.fixture
async def pair(mongod: EmbeddedMongo, tmp_path: Path) -> AsyncIterator[RelayProcess]:
    """A relay of two workers on the run's MongoDB, not started yet."""
    database = f"workers{uuid.uuid4().hex[:12]}"
    async with aiohttp.ClientSession() as http:
        relay = RelayProcess(
            tmp_path,
            http,
            workers=2,
            worker_port=ports_in_a_row(2),
            drain_seconds=3,
            mongo_uri=mongod.uri,
            mongo_database=database,
        )
        yield relay
        await relay.close()
    async with AsyncMongoClient[dict[str, Any]](mongod.uri) as client:
        await client.drop_database(database)


async def begin(relay: RelayProcess) -> None:
    """Starts it and waits until both workers listen."""
    await relay.start()
    await listening(relay, 2)


async def listening(relay: RelayProcess, times: int) -> None:
    async def told() -> bool:
        return relay.said().count("[info] listening") >= times

    await until(told, 30, f"a worker listened for the {times}th time")


async def ask(relay: RelayProcess, number: int, path: str) -> str:
    """What this worker alone answers."""
    url = f"http://127.0.0.1:{relay.settings['worker_port'] + number - 1}{path}"
    async with relay.http.get(url) as response:
        return await response.text()


async def connected(relay: RelayProcess, number: int) -> int:
    """How many devices are connected to this worker."""
    found = re.search(r"^relay_connections (\S+)$", await ask(relay, number, "/metrics"), re.MULTILINE)
    assert found is not None
    return int(float(found.group(1)))


async def close_code(device: WireDevice, seconds: float = 30) -> int | None:
    try:
        while True:
            await device.next(seconds)
    except Closed as closed:
        return closed.code


@pytest.mark.faults
async def test_two_workers_share_a_port_and_one_that_is_killed_comes_back(pair: RelayProcess) -> None:
    await begin(pair)
    users = [f"user-{n}" for n in range(24)]
    devices = await asyncio.gather(*(pair.connect(user) for user in users))
    shares = [await connected(pair, number) for number in (1, 2)]
    assert sum(shares) == 24
    assert all(shares), "the kernel spreads connections over both"
    assert re.search(r"listening .*worker=1", pair.said())
    assert re.search(r"listening .*worker=2", pair.said())
    code, out, err = await run_relay(
        port=pair.port, data_dir=pair.directory / "other", jwt_secret=SECRET, workers=2
    )
    assert (code, out) == (1, "")
    assert "another relay" in err.splitlines()[0], "its workers do not slip in among these"

    old = beneath(pair, WORKER)
    victim = min(old)
    os.kill(victim, signal.SIGKILL)
    closing = [asyncio.create_task(close_code(device), name=device.key) for device in devices]
    await listening(pair, 3)
    gone = [task for task in closing if task.done()]
    assert len(gone) == shares[0], "the other worker's devices notice nothing"
    new = beneath(pair, WORKER)
    assert len(new) == 2
    assert victim not in new
    again = await asyncio.gather(*(pair.connect(user) for user in users))
    assert await connected(pair, 1) > 0
    assert "a worker ended; it is started again" in pair.said()

    for task in closing:
        task.cancel()
    ending = [asyncio.create_task(close_code(device), name=device.key) for device in again]
    # As Ctrl-C on a terminal does.
    pair.signal_group(signal.SIGINT)
    assert set(await asyncio.gather(*ending)) == {1012}, "everybody is told, nobody is cut off"
    assert await pair.wait(20) == 0
    assert not any(running(pid) for pid in new)


@pytest.mark.faults
async def test_sighup_replaces_one_worker_after_the_other_and_the_port_always_accepts(
    pair: RelayProcess,
) -> None:
    await begin(pair)
    closed: Counter[str] = Counter()
    codes: set[int | None] = set()
    refused: list[str] = []
    turned: list[str] = []
    answered = 0
    ending = asyncio.Event()

    async def stay(user: str) -> None:
        while not ending.is_set():
            try:
                device = await pair.connect(user)
            except (aiohttp.ClientError, Closed) as error:
                # Accepted by a worker in the moment in which it turned away.
                turned.append(repr(error))
                continue
            codes.add(await close_code(device, 60))
            closed[user] += 1

    async def knock() -> None:
        nonlocal answered
        while not ending.is_set():
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", pair.port)
            except OSError as error:
                refused.append(repr(error))
                continue
            writer.write(b"GET /livez HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                answered += (await reader.read(15)).startswith(b"HTTP/1.1 200")
            writer.close()
            await asyncio.sleep(0.005)

    users = [f"user-{n}" for n in range(20)]
    staying = [asyncio.create_task(stay(user), name=user) for user in users]
    knocking = asyncio.create_task(knock(), name="knock")

    async def all_there() -> bool:
        return sum([await connected(pair, number) for number in (1, 2)]) == len(users)

    async def replaced() -> bool:
        return "replaced the workers" in pair.said()

    try:
        await until(all_there, 20, "all devices are connected")
        old = beneath(pair, WORKER)
        before = answered
        pair.signal(signal.SIGHUP)
        await until(replaced, 30, "the workers are replaced")
        await until(all_there, 10, "all devices are connected again")
        new = beneath(pair, WORKER)
    finally:
        ending.set()
        for task in staying:
            task.cancel()
        await asyncio.gather(*staying, knocking, return_exceptions=True)
    assert len(new) == 2
    assert not set(old) & set(new)
    assert refused == []
    assert answered > before
    assert codes == {1012}
    assert len(turned) <= len(users)
    assert sum(closed.values()) >= len(users)
    assert max(closed.values()) <= 2, "once a worker at most"


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
async def test_the_second_worker_serves_until_the_first_has_ended(
    pair: RelayProcess, number: signal.Signals
) -> None:
    await begin(pair)
    for n in range(24):
        # None of them reads, and so none answers the close: a worker that has some takes its time.
        await pair.connect(f"user-{n}")
    assert all([await connected(pair, worker) for worker in (1, 2)])
    (first,) = [pid for pid in beneath(pair, WORKER) if "RELAY_WORKER=1" in _environment(pid)]
    pair.signal(number)
    meanwhile = 0
    while not LIFE.search(pair.said()) or running(first):
        ready = await status(pair, 2, "/readyz")
        draining = LIFE.search(pair.said()) is not None
        if running(first):
            assert ready == 200, "the second one drains, and the first one still runs"
            meanwhile += draining
        await asyncio.sleep(0.02)
    assert meanwhile, "nobody looked while the first one drained"

    async def told() -> bool:
        return len(LIFE.findall(pair.said())) >= 4

    await until(told, 30, "both workers have drained")
    assert LIFE.findall(pair.said())[:4] == [
        ("stopping", "1"),
        ("stopped", "1"),
        ("stopping", "2"),
        ("stopped", "2"),
    ]


async def status(relay: RelayProcess, number: int, path: str) -> int:
    """The status that this worker alone answers; 0 when it does not."""
    url = f"http://127.0.0.1:{relay.settings['worker_port'] + number - 1}{path}"
    try:
        async with relay.http.get(url) as response:
            return response.status
    except aiohttp.ClientError:
        return 0


def _environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


@pytest.mark.faults
async def test_the_command_line_says_how_many_workers_and_outdoes_the_environment(pair: RelayProcess) -> None:
    pair.settings["workers"] = 1
    pair.arguments = ["--workers", "2"]
    await begin(pair)
    assert len(beneath(pair, WORKER)) == 2
    assert all([await status(pair, number, "/readyz") == 200 for number in (1, 2)])
    code, out, err = await run_module("relay", "--workers", "two", data_dir=pair.directory / "other")
    assert (code, out) == (2, "")
    assert err.startswith("relay: RELAY_WORKERS: ")


async def test_everything_that_the_supervisor_started_ends_with_it_and_valkey_is_started_again(
    processes: Processes,
) -> None:
    relay = processes(workers=2, drain_seconds=2)
    await begin(relay)
    relay.note_mongod()

    async def told() -> bool:
        return f"listens on {relay.url}" in relay.said()

    # The supervisor says so when it has heard of the last worker.
    await until(told, 10, "it tells where it listens")
    assert relay.said().count(f"listens on {relay.url}") == 1
    assert "in your MongoDB" not in relay.said()
    (valkey,) = beneath(relay, VALKEY)
    os.kill(valkey, signal.SIGKILL)

    async def again() -> bool:
        return "the embedded Valkey runs again" in relay.said()

    await until(again, 10, "Valkey runs again")
    secret = _secret_of_valkey(beneath(relay, WORKER))
    (valkey,) = beneath(relay, VALKEY)
    assert secret not in _command(str(valkey)), "everybody can read a command line"
    started = set(beneath(relay))
    assert len(started) == 4
    ann = await relay.connect("ann")
    relay.signal(signal.SIGTERM)
    assert await close_code(ann) == 1012
    assert await relay.wait(25) == 0
    assert not any(running(pid) for pid in started)
    assert "Traceback" not in relay.said()
    assert secret not in relay.said()


def _secret_of_valkey(workers: dict[int, str]) -> str:
    (url, *_) = {
        entry.removeprefix("RELAY_REDIS_URL=")
        for pid in workers
        for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")
        if entry.startswith("RELAY_REDIS_URL=")
    }
    password = urlsplit(url).password
    assert password
    return password


async def test_what_a_killed_supervisor_leaves_dies_with_it_and_the_next_one_takes_the_port(
    pair: RelayProcess,
) -> None:
    await begin(pair)
    started = set(beneath(pair))
    assert len(started) == 3, "two workers and Valkey"
    await pair.kill()
    await ended(started, 10, "what the supervisor had started has ended")
    await pair.start()


@pytest.mark.faults
async def test_a_second_signal_hurries_and_a_worker_that_stands_still_is_killed(pair: RelayProcess) -> None:
    await begin(pair)
    started = set(beneath(pair))
    freeze(min(beneath(pair, WORKER)))
    pair.signal(signal.SIGTERM)

    async def draining() -> bool:
        return "draining a worker" in pair.said()

    await until(draining, 5, "the first worker is asked to go")
    asked = time.monotonic()
    pair.signal(signal.SIGTERM)
    assert await pair.wait(20) == 0
    assert time.monotonic() - asked < 8, "sooner than a worker's own time to drain"
    assert not any(running(pid) for pid in started)


@pytest.mark.faults
async def test_a_worker_that_stands_still_holds_up_the_stop_for_its_time_only(pair: RelayProcess) -> None:
    await begin(pair)
    started = set(beneath(pair))
    freeze(min(beneath(pair, WORKER)))
    pair.signal(signal.SIGTERM)
    assert await pair.wait(40) == 0
    assert not any(running(pid) for pid in started)
    assert "did not end in time and is killed" in pair.said()


@pytest.mark.faults
async def test_a_terminal_that_is_closed_stops_it_in_order(tmp_path: Path, mongod: EmbeddedMongo) -> None:
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)
    port = free_port()
    settings = environment(
        workers=2,
        port=port,
        data_dir=tmp_path,
        jwt_secret=SECRET,
        mongo_uri=mongod.uri,
        mongo_database="terminal",
        drain_seconds=2,
    )
    # The first terminal that a session's leader opens is its own.
    become = "import os, sys; os.open(sys.argv[1], os.O_RDWR); os.execv(sys.executable, [sys.executable, '-m', 'relay'])"
    process = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-c", become, name],
        cwd=ROOT,
        env=settings,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    try:
        async with asyncio.timeout(30):
            while b"Ctrl-C" not in said:
                said += await asyncio.to_thread(os.read, ours, 4096)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.close(ours)
        assert await asyncio.to_thread(process.wait, 20) == 0
        await ended({int(pid) for pid in children}, 5, "its processes have ended")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


async def test_what_is_wrong_is_told_once_in_one_line(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"data_dir": tmp_path, "jwt_secret": SECRET, "port": free_port()}
    code, out, err = await run_relay(workers="two", **shared)
    assert (code, out) == (2, "")
    assert err.startswith("relay: RELAY_WORKERS: ")
    assert err.count("\n") == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        shared["port"] = taken.getsockname()[1]
        code, out, err = await run_relay(workers=2, log_level="error", **shared)
    assert (code, out) == (1, "")
    assert err.startswith(f"relay: cannot listen on 127.0.0.1:{shared['port']}: ")
    assert err.count("\n") == 1


@pytest.mark.faults
async def test_what_no_worker_can_start_with_is_told_by_the_first_alone(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"data_dir": tmp_path, "jwt_secret": SECRET, "port": free_port()}
    nobody = f"mongodb://127.0.0.1:{free_port()}/?serverSelectionTimeoutMS=300"
    code, out, err = await run_relay(workers=3, mongo_uri=nobody, log_level="error", **shared)
    assert (code, out) == (1, "")
    assert err.startswith("relay: MongoDB cannot be reached: ")
    assert err.count("\n") == 1
