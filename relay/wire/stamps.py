"""When something was last changed, for whoever asks later what has changed since: stamps that do not go back with the clock.

The time may go back: MongoDB's primary changes to a machine whose clock is behind (docs/decisions/0018). MongoDB's cluster time, by
which it orders its own writes, never does. A node hears it with every look at MongoDB's health, and

- gives no stamp below the last that it heard,
- gives out no cursor above what it had heard ``MARGIN_SECONDS`` ago, by its steady clock.

So a change that a reader has not seen yet gets a stamp above that reader's cursor, whichever node wrote it and whatever the clocks
did, as long as what its writer had last heard, and its write, are together no older than the margin.
"""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from typing import Final

from relay.wire.clock import lease_time, wall_ms, wall_ns

MARGIN_SECONDS: Final = 20.0
_MOST_HEARD: Final = 256


class Stamps:
    """What one process has heard of cluster time."""

    def __init__(self) -> None:
        self._last = 0
        # When (steady, s) which cluster time (ms) was heard; the first of them is as old as the margin.
        self._heard: deque[tuple[float, int]] = deque(maxlen=_MOST_HEARD)

    def hear(self, cluster_ms: int) -> None:
        """Cluster time has reached this many milliseconds since the epoch."""
        now = lease_time()
        # Of two routers one may know less.
        self._last = max(self._last, cluster_ms)
        self._heard.append((now, self._last))
        while len(self._heard) > 1 and self._heard[1][0] <= now - MARGIN_SECONDS:
            self._heard.popleft()

    def now(self) -> datetime:
        """The stamp of a change that is being written: the time, but never less than what was heard."""
        return datetime.fromtimestamp(max(wall_ns() / 1_000_000_000, self._last / 1000), UTC)

    def settled(self) -> int | None:
        """Everything stamped below this (ms) is stored by now, or never will be. None as long as nobody can tell: a clock that has
        just jumped ahead is not known to all yet, and who has just started cannot see that it jumped."""
        if not self._heard:
            return wall_ms() - round(MARGIN_SECONDS * 1000)
        oldest = lease_time() - MARGIN_SECONDS
        old = [heard for at, heard in self._heard if at <= oldest]
        # Stamps of that very millisecond are still being given.
        return old[-1] - 1 if old else None


STAMPS: Final = Stamps()
"""The process's: like the time it is asked for in too many places to be handed through."""


def stamp_now() -> datetime:
    """``STAMPS.now()``."""
    return STAMPS.now()
