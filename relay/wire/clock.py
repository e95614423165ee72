"""The order of messages: a hybrid logical clock.

A ``seq`` is ``milliseconds << 10 | counter``. A message gets the highest of the node's own strictly rising clock, the
sender's ``after`` + 1 and the connection's last + 1, so a reply never sorts before what its sender had received, even
when two nodes' wall clocks disagree. It stays below 2**53: JavaScript must hold it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

SEQ_BITS: Final = 10
SEQ_LIMIT: Final = 1 << 53
MAX_AHEAD_MS: Final = 2 * 60 * 60 * 1000
_LEASES: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def wall_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def lease_time() -> float:
    """Seconds that go on while the machine is suspended, unlike ``time.monotonic``: a lease runs out in its sleep, too
    (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime(_LEASES)


class Clock:
    """One per node. ``after`` never moves it: one hostile sender would otherwise shift everybody's order."""

    __slots__ = ("_last", "_now")

    def __init__(self, now: Callable[[], int] = wall_ms) -> None:
        self._now = now
        self._last = 0

    def now(self) -> int:
        """The wall clock, in milliseconds."""
        return self._now()

    def next(self, floor: int = 0) -> int:
        """A ``seq`` above every one this node's own clock has given, and at least ``floor``."""
        own = self._now() << SEQ_BITS
        if own <= self._last:
            own = self._last + 1
        self._last = own
        return own if own >= floor else floor

    def too_far_ahead(self, seq: int) -> bool:
        """Whether a sender's ``after`` lies more than two hours in the future."""
        return seq > (self._now() + MAX_AHEAD_MS) << SEQ_BITS
