"""Running and ending background tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

Item = TypeVar("Item")
_AGAIN_SECONDS: Final = 0.05


async def each(
    items: Iterable[Item], work: Callable[[Item], Awaitable[None]], *, at_once: int, name: str
) -> None:
    """Does ``work`` for each of these, in order, so many at once: one that takes long, or hangs, holds up no other. ``work`` does
    not raise; should it, everything ends."""
    left = iter(items)

    async def go_on() -> None:
        for item in left:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for number in range(at_once):
            group.create_task(go_on(), name=f"{name} {number + 1}")


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels these and waits until all have ended, however often that takes. Raises nothing of theirs.

    Once is not enough for a task that goes on in a loop: in Python 3.11 ``asyncio.wait_for``, through which the client of Redis
    sends, loses a cancellation that comes at the moment when what it waits for is done."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=_AGAIN_SECONDS)
        for task in done:
            if not task.cancelled():
                task.exception()
