"""Starting and stopping the process: what is refused, in one line, and what a stop leaves behind (nothing)."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from pathlib import Path

import aiohttp
import pytest

from relay.store.embedded import EmbeddedMongo
from tests.faults.conftest import Processes
from tests.support.load import Load
from tests.support.node import SECRET
from tests.support.process import Mongods, free_port, ledger_of, run_relay, running
from tests.support.waiting import until


@pytest.mark.faults
async def test_sigterm_says_bye_closes_with_1012_and_loses_nothing(processes: Processes) -> None:
    relay = processes()
    await relay.start()
    load = Load(relay, pairs=4)
    await load.start()
    conv = await relay.direct("ann", "bob")
    ann = await relay.connect("ann")
    kept = await ann.sent(conv, "kept")
    await load.stored_since(200, 10)
    mongod = relay.mongod_pid
    statuses: list[int] = []

    async def probe() -> None:
        async with aiohttp.ClientSession() as http:
            while True:
                try:
                    async with http.get(relay.url + "/readyz") as response:
                        statuses.append(response.status)
                except aiohttp.ClientConnectorError:
                    return
                except aiohttp.ClientError:
                    continue

    probing = asyncio.create_task(probe(), name="probe")
    await asyncio.sleep(0.1)
    asked = time.monotonic()
    relay.signal(signal.SIGTERM)
    bye = await ann.expect("bye")
    assert 0 < bye["retryAfter"] <= 30_000
    assert await ann.closed() == 1012
    assert await relay.wait(10) == 0
    await probing
    assert time.monotonic() - asked < 10
    assert statuses[0] == 200
    assert statuses[-1] == 503, "not ready while it drains"
    assert not running(mongod)
    assert "Traceback" not in relay.said()
    await relay.start()
    await load.stored_since(len(load.stored) + 50, 15)
    load.finish()
    await load.all_received(15)
    await load.close()
    bob = await relay.connect("bob")
    assert (await bob.expect("msg"))["id"] == kept["id"]
    await bob.ack(conv, kept["id"])

    async def gone() -> bool:
        return not await relay.db.messages.count_documents({})

    await until(gone, 5, "nothing is left in messages")
    await load.verify()


async def test_ctrl_c_ends_the_relay_and_its_mongod(processes: Processes) -> None:
    relay = processes()
    await relay.start()
    mongod = relay.mongod_pid
    ann = await relay.connect("ann")
    relay.signal_group(signal.SIGINT)
    assert await ann.closed() == 1012
    assert await relay.wait(10) == 0
    assert not running(mongod)
    assert "Traceback" not in relay.said()


@pytest.mark.faults
async def test_a_slow_socket_does_not_hold_up_the_stop(processes: Processes) -> None:
    relay = processes()
    await relay.start()
    # An upgrade that never authenticates, and a connection that is open but silent.
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    writer.write(b"GET /v1/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
    writer.write(b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
    assert b"101" in await reader.readline()
    _, silent = await asyncio.open_connection("127.0.0.1", relay.port)
    relay.signal(signal.SIGTERM)
    assert await relay.wait(10) == 0
    writer.close()
    silent.close()


async def test_sigterm_during_the_start_ends_it_and_leaves_no_mongod(processes: Processes) -> None:
    relay = processes()
    starting = asyncio.create_task(relay.start(), name="start")
    state = relay.directory / "data" / "mongo" / "mongod.json"

    async def begun() -> bool:
        return state.exists()

    await until(begun, 15, "mongod is being started")
    mongod = relay.note_mongod()
    relay.signal(signal.SIGTERM)
    with pytest.raises(AssertionError, match="the relay ended"):
        await starting
    assert await relay.wait(10) == 0
    assert not running(mongod)
    assert "Traceback" not in relay.said()


async def test_a_second_relay_on_the_same_data_directory_is_refused_in_one_line(processes: Processes) -> None:
    relay = processes()
    await relay.start()
    code, out, err = await run_relay(**{**relay.settings, "port": free_port()})
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    assert "another relay" in err and f"(pid {relay.pid})" in err
    conv = await relay.direct("ann", "bob")
    assert (await (await relay.connect("ann")).sent(conv))["seq"], "the first one is not disturbed"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"port": "many"}, "RELAY_PORT"),
        ({"window": 0}, "RELAY_WINDOW"),
        ({"jwt_secret": "short"}, "RELAY_JWT_SECRET"),
        ({"mongo_uri": "localhost"}, "RELAY_MONGO_URI"),
        ({"max_body_bytes": 200_000}, "RELAY_MAX_BODY_BYTES"),
    ],
)
async def test_a_wrong_setting_stops_the_start_in_one_line(
    tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    code, out, err = await run_relay(30, data_dir=tmp_path, **settings)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert named in err
    assert "short" not in err


async def test_a_port_in_use_stops_the_start_in_one_line(mongod: EmbeddedMongo, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, err = await run_relay(
            data_dir=tmp_path, port=port, mongo_uri=mongod.uri, mongo_database="inuse", jwt_secret=SECRET
        )
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    assert f"127.0.0.1:{port}" in err and "RELAY_PORT" in err


async def test_a_standalone_mongod_is_refused_in_one_line(mongods: Mongods, tmp_path: Path) -> None:
    port = await mongods.start()
    code, out, err = await run_relay(
        data_dir=tmp_path, port=free_port(), mongo_uri=f"mongodb://127.0.0.1:{port}", jwt_secret=SECRET
    )
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    assert "replica set" in err


@pytest.mark.faults
async def test_a_mongodb_that_is_not_there_is_told_in_one_line_without_its_password(tmp_path: Path) -> None:
    uri = f"mongodb://ann:hidden@127.0.0.1:{free_port()}/?replicaSet=rs"
    code, out, err = await run_relay(data_dir=tmp_path, port=free_port(), mongo_uri=uri, jwt_secret=SECRET)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    assert "cannot be reached" in err and "hidden" not in err


@pytest.mark.faults
async def test_the_account_of_a_new_life_opens_with_what_waits(processes: Processes) -> None:
    relay = processes()
    await relay.start()
    conv = await relay.group("ann", ["bob", "cleo"], announced=True)
    ann = await relay.connect("ann")
    for _ in range(3):
        await ann.sent(conv)
    relay.signal(signal.SIGKILL)
    await relay.wait(5)
    await relay.start()
    ledger = await ledger_of(relay)
    # All three await that they were made members; two people await each of the three messages.
    assert (ledger["accepted"], ledger["waiting"]) == (9, 9)
