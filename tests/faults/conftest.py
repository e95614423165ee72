"""Relay processes for the fault tests; none of them outlives its test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.process import Mongods, RelayProcess

Processes = Callable[..., RelayProcess]


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[Processes]:
    """Makes relay processes, not started yet; keyword arguments are settings."""
    made: list[RelayProcess] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        def make(**settings: Any) -> RelayProcess:
            home = tmp_path / f"relay{len(made)}"
            home.mkdir()
            made.append(RelayProcess(home, http, **settings))
            return made[-1]

        yield make
        for process in made:
            await process.close()


@pytest.fixture
async def mongods(tmp_path: Path) -> AsyncIterator[Mongods]:
    """Starts mongods without a relay."""
    found = Mongods(tmp_path / "mongods")
    yield found
    await found.close()
