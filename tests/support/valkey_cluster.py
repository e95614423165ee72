"""A real Valkey cluster on loopback: three masters, without replicas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from tests.support.valkey import Valkey

_SLOTS = 16_384


@asynccontextmanager
async def valkey_cluster(directory: Path, masters: int = 3) -> AsyncIterator[list[Valkey]]:
    """The started servers; together they serve every slot when this is entered."""
    servers = []
    try:
        for number in range(masters):
            own = directory / f"valkey-{number}"
            own.mkdir()
            servers.append(Valkey(own, clustered=True))
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


async def _serves_all(client: Any, masters: int) -> bool:
    info = await client.execute_command("CLUSTER INFO")
    return bool(info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == masters)
