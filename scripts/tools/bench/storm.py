"""A storm of log-ins: as many as are answered, for as long as it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from statistics import median
from time import perf_counter
from typing import Final

import aiohttp
import msgspec
from argon2 import PasswordHasher, Type

CLIENTS: Final = 16
PASSWORD: Final = "one password for all of them"
# As relay.security.passwords has them.
HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1, type=Type.ID)
_HASHES: Final = 10


class Storm(msgspec.Struct, frozen=True):
    """Log-ins. ``hash_ms``: one hash alone on this machine; ``alone`` and ``beside`` are log-ins/s without and with the
    messages; ``p50`` of the former in ms, with ``clients`` asking at once."""

    clients: int
    hash_ms: float
    alone: float
    p50: float
    beside_latency: float
    beside_throughput: float
    refused: int


class LogIns:
    """Log-ins as fast as they are answered."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.refused = 0

    def mark(self) -> tuple[int, float]:
        """Now, for ``since``."""
        return len(self.times), perf_counter()

    def since(self, mark: tuple[int, float]) -> tuple[float, float]:
        """Log-ins a second and their median in ms."""
        count, began = mark
        times = self.times[count:]
        return len(times) / (perf_counter() - began), median(times) if times else 0.0

    async def log_in(self, http: aiohttp.ClientSession, url: str, username: str, device: str) -> None:
        """One after the other, until it is cancelled."""
        body = {
            "username": username,
            "password": PASSWORD,
            "device": {"id": device, "name": device, "platform": "bench"},
        }
        while True:
            began = perf_counter()
            async with http.post(f"{url}/v1/auth/login", json=body) as answer:
                await answer.read()
                if answer.status == 200:
                    self.times.append((perf_counter() - began) * 1000)
                else:
                    self.refused += 1
                    await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def storm(url: str, names: list[str]) -> AsyncIterator[LogIns]:
    """Log-ins of these user names go on while the context is open. Raises what the HTTP client raises."""
    found = LogIns()
    connector = aiohttp.TCPConnector(limit=CLIENTS)
    async with aiohttp.ClientSession(connector=connector) as http:
        tasks = [
            asyncio.create_task(
                found.log_in(http, url, names[number % len(names)], f"storm-{number}"),
                name=f"log-ins {number}",
            )
            for number in range(CLIENTS)
        ]
        try:
            yield found
        finally:
            for task in tasks:
                task.cancel()
            failed = await asyncio.gather(*tasks, return_exceptions=True)
    for error in failed:
        if isinstance(error, aiohttp.ClientError):
            raise error


def hash_ms() -> float:
    """What checking one password takes here, in ms."""
    stored = HASHER.hash(PASSWORD)
    times = []
    for _ in range(_HASHES):
        began = perf_counter()
        HASHER.verify(stored, PASSWORD)
        times.append((perf_counter() - began) * 1000)
    return median(times)
