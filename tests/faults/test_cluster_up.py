"""``scripts/cluster up``: everything from one command, and all of it gone with it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pymongo import AsyncMongoClient

from relay.security.tokens import mint
from tests.faults.test_workers import ports_in_a_row
from tests.support.device import WireDevice
from tests.support.process import ROOT, running
from tests.support.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(150)]


async def connect(http: aiohttp.ClientSession, url: str, secret: str, user: str) -> WireDevice:
    headers = {"Authorization": f"Bearer {mint(secret, user, 'phone', audience='relay', lifetime=600)}"}
    device = WireDevice(await http.ws_connect(f"{url}/v1/ws", headers=headers), user, "phone")
    await device.expect("welcome", 15)
    return device


async def test_one_command_starts_two_nodes_that_talk_and_restarts_what_dies(tmp_path: Path) -> None:
    data = tmp_path / "data"
    environment = {**os.environ, "RELAY_DATA_DIR": str(data), "PYTHONUNBUFFERED": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *(
            "-m",
            "scripts.tools.cluster",
            "up",
            "--port",
            str(ports_in_a_row(2)),
            "--directory",
            str(tmp_path / "c"),
        ),
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    said = ""
    async with asyncio.timeout(80):
        while "Ctrl-C" not in said:
            line = await process.stdout.readline()
            assert line, said
            said += line.decode()
    pids = [int(found) for found in re.findall(r"pid (\d+)", said)]
    urls = re.findall(r"# relay\d  (\S+)", said)
    assert len(pids) == 5
    assert len(urls) == 2
    (uri,) = re.findall(r"^export RELAY_MONGO_URI='(\S+)'$", said, re.MULTILINE)
    secret = (data / "jwt-secret").read_text().strip()
    try:
        async with AsyncMongoClient[dict[str, Any]](uri, serverSelectionTimeoutMS=10_000) as client:
            assert (await client.admin.command("ping"))["ok"] == 1
            assert client.topology_description.topology_type_name == "Sharded"
            assert "users" in await client.relay.list_collection_names(), "the database of its nodes"
        async with aiohttp.ClientSession() as http:
            ann, bob = [
                await connect(http, url, secret, user) for url, user in zip(urls, ("ann", "bob"), strict=True)
            ]
            answer = await http.post(
                f"{urls[0]}/v1/conversations",
                json={"type": "direct", "members": ["bob"]},
                headers={
                    "Authorization": f"Bearer {mint(secret, 'ann', 'phone', audience='relay', lifetime=600)}"
                },
            )
            conv = (await answer.json())["id"]
            sent = await ann.sent(conv)
            await bob.expect("msg", 10, id=sent["id"])
            await bob.ack(conv, sent["id"])
            os.kill(pids[1], signal.SIGKILL)

            async def back() -> bool:
                try:
                    async with http.get(f"{urls[1]}/readyz") as ready:
                        return ready.status == 200
                except (aiohttp.ClientError, OSError):
                    return False

            await until(back, 40, "the killed node runs again")
    finally:
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(40):
            await process.wait()
    assert process.returncode == 0

    async def ended() -> bool:
        return not any(map(running, pids))

    await until(ended, 5, "all of it has ended")
