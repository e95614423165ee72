"""Starting an embedded server again after it died, with growing pauses while it does not start."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from relay.store.embedded_files import EmbeddedError

FIRST_BACKOFF: Final = 0.1
LAST_BACKOFF: Final = 5.0
STEADY: Final = 30.0
"""A server that lived for so long (s) is started again without regard to how often it had died before."""

Running = TypeVar("Running")
_log: structlog.stdlib.BoundLogger = structlog.get_logger("relay.embedded")


class Restarting:
    """``server`` is its name, for the log."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._delay = FIRST_BACKOFF

    async def again(self, launch: Callable[[], Awaitable[Running]], *, lived: float) -> Running:
        """Launches it until that succeeds; ``lived`` is how long the last one did (s)."""
        if lived > STEADY:
            self._delay = FIRST_BACKOFF
        while True:
            await asyncio.sleep(self._delay)
            self._delay = min(self._delay * 2, LAST_BACKOFF)
            try:
                return await launch()
            except (EmbeddedError, OSError) as error:
                _log.error(
                    f"the embedded {self._server} could not be started; trying again",
                    reason=str(error),
                    retry_in_s=self._delay,
                )
