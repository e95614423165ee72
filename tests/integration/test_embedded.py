"""The embedded MongoDB against real mongod processes: start, stop, kill, take-over, and the errors people read."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pymongo import AsyncMongoClient, WriteConcern

from relay.store.embedded import EmbeddedError, EmbeddedMongo
from relay.store.embedded_files import LOG_LIMIT, Layout, find_mongod, last_words, trim_log
from tests.support.frozen import freeze
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
DURABLE = WriteConcern(w="majority", j=True)

OWNER = """
import asyncio, sys
from pathlib import Path
from relay.store.embedded import EmbeddedMongo
from tests.support.frozen import freeze

async def main() -> None:
    mongo = EmbeddedMongo(Path(sys.argv[1]), cache_gb=0.25)
    uri = await mongo.start()
    print(mongo.pid, uri, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def embedded(directory: Path, **parameters: str) -> EmbeddedMongo:
    return EmbeddedMongo(directory, server_parameters=parameters, cache_gb=0.25)


@asynccontextmanager
async def running(directory: Path, **parameters: str) -> AsyncIterator[EmbeddedMongo]:
    mongo = embedded(directory, **parameters)
    await mongo.start()
    try:
        yield mongo
    finally:
        await mongo.stop()


async def write(uri: str, *ids: int) -> None:
    async with AsyncMongoClient[dict[str, Any]](uri, serverSelectionTimeoutMS=10000) as client:
        things = client.check.get_collection("things", write_concern=DURABLE)
        await things.insert_many([{"_id": number} for number in ids])


async def held(uri: str) -> list[int]:
    async with AsyncMongoClient[dict[str, Any]](uri, serverSelectionTimeoutMS=10000) as client:
        return [found["_id"] async for found in client.check.things.find().sort("_id")]


def running_pid(mongo: EmbeddedMongo) -> int | None:
    """Its pid now; a call, because it changes behind the type checker's back."""
    return mongo.pid


async def restarted(mongo: EmbeddedMongo, times: int) -> None:
    async with asyncio.timeout(10):
        while mongo.restarts < times:
            await asyncio.sleep(0.02)


async def abandoned(directory: Path) -> tuple[int, str]:
    """Start mongod in a relay of its own, write 1 and 2, then kill that relay; returns mongod's pid and URI."""
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(directory), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    pid, uri = (await owner.stdout.readline()).decode().split()
    await write(uri, 1, 2)
    owner.kill()
    await owner.wait()
    return int(pid), uri


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


async def test_a_cold_start_gives_a_private_writable_primary_and_a_clean_stop_keeps_the_data(
    tmp_path: Path,
) -> None:
    mongo = embedded(tmp_path / "mongo", enableTestCommands="1")
    began = time.monotonic()
    uri = await mongo.start()
    assert time.monotonic() - began < 5
    pid, port = mongo.pid, mongo.port
    assert pid is not None and os.getsid(pid) == pid
    assert (tmp_path / "mongo").stat().st_mode & 0o777 == 0o700
    async with AsyncMongoClient[dict[str, Any]](uri) as client:
        hello = await client.admin.command("hello")
        assert hello["isWritablePrimary"] and hello["setName"] == "relay0"
        test_commands = await client.admin.command("getParameter", enableTestCommands=1)
        assert test_commands["enableTestCommands"]
    await write(uri, 1, 2, 3)
    assert await mongo.start() == uri and mongo.pid == pid

    began = time.monotonic()
    await mongo.stop()
    assert time.monotonic() - began < 5
    await mongo.stop()
    assert running_pid(mongo) is None
    assert not alive(pid)

    began = time.monotonic()
    assert await mongo.start() == uri and mongo.port == port
    assert time.monotonic() - began < 20, "it does not wait for an election"
    assert await held(uri) == [1, 2, 3]
    assert mongo.restarts == 0
    await mongo.stop()


async def test_a_killed_mongod_is_restarted_at_the_same_address_with_all_it_acknowledged(
    tmp_path: Path,
) -> None:
    before = asyncio.all_tasks()
    async with running(tmp_path) as mongo:
        uri, pid = mongo.uri, mongo.pid
        assert pid is not None
        await write(uri, *range(100))
        os.kill(pid, signal.SIGKILL)
        await restarted(mongo, 1)
        assert mongo.uri == uri and mongo.pid not in (None, pid)
        assert await held(uri) == list(range(100))
        await write(uri, 100)
        second = mongo.pid
        assert second is not None
    assert not alive(second)
    started = asyncio.all_tasks() - before
    assert not [task for task in started if task.get_name().startswith("embedded-mongo")]


async def test_a_stop_during_the_backoff_leaves_nothing_running(tmp_path: Path) -> None:
    mongo = embedded(tmp_path)
    await mongo.start()
    assert mongo.pid is not None
    os.kill(mongo.pid, signal.SIGKILL)
    await asyncio.sleep(0.3)
    await mongo.stop()
    ours = str(tmp_path / "data").encode()

    async def ended() -> bool:
        running_now = [entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return not any(ours in _command_line(entry) for entry in running_now)

    await until(ended, 5, "nothing of it runs; a killed process takes a moment to go")


def _command_line(process: Path) -> bytes:
    with suppress(OSError):
        return (process / "cmdline").read_bytes()
    return b""


async def test_the_mongod_of_a_killed_relay_is_taken_over_and_watched(tmp_path: Path) -> None:
    pid, uri = await abandoned(tmp_path)
    async with running(tmp_path) as mongo:
        assert mongo.pid == pid and mongo.uri == uri
        assert await held(uri) == [1, 2]
        os.kill(pid, signal.SIGKILL)
        await restarted(mongo, 1)
        assert mongo.pid != pid and mongo.uri == uri
        assert await held(uri) == [1, 2]


async def test_a_stopped_mongod_of_a_killed_relay_is_replaced_on_its_data(tmp_path: Path) -> None:
    pid, _ = await abandoned(tmp_path)
    freeze(pid)
    (tmp_path / "mongod.json").unlink()
    async with running(tmp_path) as mongo:
        assert mongo.pid != pid and not alive(pid)
        assert await held(mongo.uri) == [1, 2]


async def test_a_mongod_left_with_other_server_parameters_is_replaced(tmp_path: Path) -> None:
    pid, uri = await abandoned(tmp_path)
    async with running(tmp_path, ttlMonitorSleepSecs="1") as mongo:
        assert mongo.pid != pid and not alive(pid)
        assert mongo.uri == uri and await held(uri) == [1, 2]


async def test_a_process_that_only_has_the_recorded_pid_is_never_signalled(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        started = int(Path(f"/proc/{stranger.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
        state = f'{{"port": 27999, "pid": {stranger.pid}, "started": {started}}}'
        (tmp_path / "mongod.json").write_text(state)
        (tmp_path / "data" / "mongod.lock").write_text(f"{stranger.pid}\n")
        async with running(tmp_path) as mongo:
            assert mongo.pid != stranger.pid
            assert stranger.returncode is None and alive(stranger.pid)
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_second_relay_on_the_directory_is_refused_by_the_pid_of_the_first(tmp_path: Path) -> None:
    async with running(tmp_path) as mongo:
        with pytest.raises(EmbeddedError, match=rf"pid {os.getpid()}\b") as refused:
            await embedded(tmp_path).start()
        assert "\n" not in str(refused.value)
        await write(mongo.uri, 1)


async def test_a_port_taken_by_another_server_is_left_to_it(tmp_path: Path) -> None:
    async with running(tmp_path) as mongo:
        port = mongo.port
        await write(mongo.uri, 1)

    def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", port), running(tmp_path) as moved:
        assert moved.port != port
        assert await held(moved.uri) == [1]
        await write(moved.uri, 2)


async def test_a_port_taken_by_a_listener_that_never_answers_costs_seconds_and_no_data(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as mongo:
        port = mongo.port
        await write(mongo.uri, 1)
        assert mongo.pid is not None
        os.kill(mongo.pid, signal.SIGKILL)
        await restarted(mongo, 1)
        await write(mongo.uri, 2)
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        began = time.monotonic()
        async with running(tmp_path) as moved:
            assert time.monotonic() - began < 20
            assert moved.port != port
            assert await held(moved.uri) == [1, 2]
            await write(moved.uri, 3)


@pytest.mark.parametrize(
    ("library", "advice"),
    [
        ("libcurl.so.4", "apt-get install libcurl4"),
        ("libodd.so.7", "install the Debian package that provides it"),
    ],
)
async def test_a_missing_library_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, advice: str
) -> None:
    fake = tmp_path / "bin" / "mongod"
    fake.parent.mkdir()
    fake.write_text(
        f"#!/bin/sh\necho 'mongod: error while loading shared libraries: {library}: cannot open' >&2\nexit 127\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    with pytest.raises(EmbeddedError) as failed:
        await embedded(tmp_path / "mongo").start()
    assert library in str(failed.value) and advice in str(failed.value)
    assert "\n" not in str(failed.value)


async def test_a_start_that_fails_says_why_in_one_line_and_lets_go_of_the_directory(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="noSuchParameter") as failed:
        await embedded(tmp_path, noSuchParameter="1").start()
    assert str(tmp_path / "mongod.log") in str(failed.value) and "\n" not in str(failed.value)
    async with running(tmp_path) as mongo:
        await write(mongo.uri, 1)


async def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedError, match=str(tmp_path / "file")):
        await embedded(tmp_path / "file" / "mongo").start()


async def test_what_people_wrote_never_reaches_the_log_of_mongod(tmp_path: Path) -> None:
    async with running(tmp_path) as mongo, AsyncMongoClient[dict[str, Any]](mongo.uri) as client:
        await client.admin.command("profile", 0, slowms=0)
        await client.check.things.insert_one({"_id": 1, "body": "a-private-word"})
        await client.check.things.find_one({"body": "a-private-word"})
        await client.check.things.update_one({"body": "a-private-word"}, {"$set": {"body": "another"}})
    log = (tmp_path / "mongod.log").read_text()
    assert "Waiting for connections" in log and "a-private-word" not in log


def test_a_packed_mongod_that_cannot_be_made_executable_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "site" / "mongod"
    packed.parent.mkdir()
    packed.write_text("#!/bin/sh\nexit 0\n")
    packed.chmod(0o644)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr("relay.store.embedded_files._packed_mongod", lambda: packed)
    original = Path.chmod

    def refuse(path: Path, mode: int, *, follow_symlinks: bool = True) -> None:
        if path == packed:
            raise PermissionError("read-only file system")
        original(path, mode, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "chmod", refuse)
    layout = Layout(tmp_path / "mongo")
    layout.root.mkdir()
    found = find_mongod(layout)
    assert found == layout.binary and os.access(found, os.X_OK)
    first = found.stat().st_ino
    assert find_mongod(layout).stat().st_ino == first


def test_a_long_log_is_set_aside_at_a_start(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.log.write_bytes(b"x" * LOG_LIMIT)
    assert trim_log(layout) == LOG_LIMIT
    layout.log.write_bytes(b"x" * (LOG_LIMIT + 1))
    assert trim_log(layout) == 0
    assert not layout.log.exists() and (tmp_path / "mongod.log.1").stat().st_size == LOG_LIMIT + 1


def test_the_last_words_tell_the_cause_not_the_panic_after_it(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    earlier = '{"s":"E","msg":"Of another run"}\n'
    layout.log.write_text(
        earlier
        + '{"s":"I","msg":"Starting"}\n'
        + '{"s":"E","msg":"WiredTiger error message","attr":{"error":28,"message":"No space\\nleft on device"}}\n'
        + '{"s":"F","msg":"Fatal assertion","attr":{"error":"WT_PANIC"}}\n'
        + '{"s":"F","msg":"\\n\\n***aborting after fassert() failure\\n\\n"}\n'
    )
    words = last_words(layout, len(earlier))
    assert "No space left on device" in words and "WT_PANIC" not in words


def test_without_any_mongod_the_error_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("relay.store.embedded_files._packed_mongod", lambda: None)
    assert shutil.which("mongod") is None
    with pytest.raises(EmbeddedError, match="RELAY_MONGO_URI"):
        find_mongod(Layout(tmp_path))
