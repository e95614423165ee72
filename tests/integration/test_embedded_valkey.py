"""The relay's own Valkey: who can reach it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from relay.store.embedded_valkey import EmbeddedValkey

LISTENS = "0A"


def listening(pid: int) -> set[str]:
    """The addresses, as the kernel writes them, on which this process listens."""
    sockets = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == LISTENS and f"socket:[{row[9]}]" in sockets}


async def said(port: int, *commands: str) -> list[str]:
    """The first line of each answer to somebody who has only connected."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write("".join(f"{command}\r\n" for command in commands).encode())
        async with asyncio.timeout(10):
            return [(await reader.readline()).decode().strip() for _ in commands]
    finally:
        writer.close()


async def test_it_listens_on_loopback_alone_and_asks_for_its_password(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path)
    try:
        url = await valkey.start()
        address = urlsplit(url)
        assert address.hostname == "127.0.0.1"
        assert address.port is not None
        assert valkey.pid is not None
        assert listening(valkey.pid) == {f"0100007F:{address.port:04X}"}

        refused = await said(
            address.port, "PING", "SET name value", "AUTH wrong", "AUTH default wrong", "KEYS *"
        )
        assert [answer.split()[0] for answer in refused] == [
            "-NOAUTH",
            "-NOAUTH",
            "-WRONGPASS",
            "-WRONGPASS",
            "-NOAUTH",
        ]
        with pytest.raises(AuthenticationError):
            async with Redis.from_url(f"redis://127.0.0.1:{address.port}") as stranger:
                await stranger.ping()
        assert address.password is not None
        assert len(address.password) >= 32
        async with Redis.from_url(url) as client:
            assert await client.ping()
            assert await client.dbsize() == 0
    finally:
        await valkey.stop()


async def test_every_one_has_a_password_of_its_own(tmp_path: Path) -> None:
    found = [EmbeddedValkey(tmp_path / name) for name in ("one", "other")]
    try:
        urls = [urlsplit(await valkey.start()) for valkey in found]
        assert urls[0].password != urls[1].password
        assert urls[0].port is not None
        assert (await said(urls[0].port, f"AUTH {urls[1].password}"))[0].startswith("-WRONGPASS")
    finally:
        for valkey in found:
            await valkey.stop()
