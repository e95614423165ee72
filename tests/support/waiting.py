"""Waiting for what must come true, and for what arrives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tests.support.device import Closed, WireDevice


async def until(holds: Callable[[], Awaitable[bool]], seconds: float, what: str) -> None:
    """Waits until ``holds`` answers True. AssertionError naming ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not await holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.05)


async def arriving(device: WireDevice, name: str, quiet: float = 0.5) -> list[dict[str, Any]]:
    """The operations of this name that arrive until none has come for ``quiet`` seconds or the socket is closed."""
    found: list[dict[str, Any]] = []
    while True:
        try:
            found.append(await device.expect(name, quiet))
        except (TimeoutError, Closed):
            return found


async def exactly(
    device: WireDevice, name: str, count: int, quiet: float = 0.3, seconds: float = 5
) -> list[dict[str, Any]]:
    """So many operations of this name, as soon as they are there, and whatever more comes within ``quiet`` seconds."""
    found = [await device.expect(name, seconds) for _ in range(count)]
    return found + await arriving(device, name, quiet)
