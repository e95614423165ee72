"""Which connections still live: silent ones are pinged, dead ones and those with expired tokens closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from relay.routing.hub import Connected, Hub
from relay.wire import errors
from relay.wire.clock import wall_seconds


class Heartbeat:
    """Looks at every connection once a second or so. Pinged after one heartbeat of silence, closed after two; ``silent`` is
    told of those from which nothing has come for a heartbeat, at every look."""

    def __init__(
        self, hub: Hub, seconds: float, silent: Callable[[Connected], None] = lambda _: None
    ) -> None:
        self._tell = silent
        self._hub = hub
        self._seconds = seconds

    async def run(self) -> None:
        """One look."""
        now = asyncio.get_running_loop().time()
        wall = wall_seconds()
        for connection in self._hub:
            if connection.expires <= wall:
                connection.shut(errors.UNAUTHORIZED)
                continue
            if now - connection.heard < self._seconds:
                continue
            connection.listen(now)
            silent = now - connection.heard
            if silent >= self._seconds:
                self._tell(connection)
            if silent >= 2 * self._seconds:
                connection.shut(errors.TIMED_OUT)
            elif silent >= self._seconds and not connection.pinged:
                await connection.ping()
