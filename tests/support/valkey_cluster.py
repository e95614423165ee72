"""A real Valkey cluster on loopback: three masters, without replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.crc import key_slot

from tests.support.valkey import Valkey

_SLOTS = 16_384


@asynccontextmanager
async def valkey_cluster(
    directory: Path, masters: int = 3, *, options: Sequence[str] = ()
) -> AsyncIterator[list[Valkey]]:
    """The started servers, with these options; together they serve every slot when this is entered."""
    servers = []
    try:
        for number in range(masters):
            own = directory / f"valkey-{number}"
            own.mkdir()
            servers.append(Valkey(own, clustered=True, options=options))
        await asyncio.gather(*(server.start() for server in servers))
        clients: list[Any] = [Redis(port=server.port) for server in servers]
        try:
            for number, client in enumerate(clients):
                first, last = (_SLOTS * number // masters, _SLOTS * (number + 1) // masters - 1)
                await client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
                await client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
            for server in servers[1:]:
                await clients[0].execute_command(
                    "CLUSTER MEET", "127.0.0.1", server.port, server.cluster_port
                )
            async with asyncio.timeout(20):
                while not all([await _serves_all(client, masters) for client in clients]):
                    await asyncio.sleep(0.05)
        finally:
            for client in clients:
                await client.aclose()
        yield servers
    finally:
        for server in servers:
            await server.kill()


def master_of(key: str, masters: int = 3) -> int:
    """Which of the servers has this key."""
    slot = key_slot(key.encode())
    return next(n for n in range(masters) if slot < _SLOTS * (n + 1) // masters)


async def _serves_all(client: Any, masters: int) -> bool:
    info = await client.execute_command("CLUSTER INFO")
    return bool(info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == masters)
