"""The order of messages: a hybrid logical clock.

A ``seq`` is ``milliseconds << 10 | counter``. A message gets the highest of the node's own strictly rising clock, the
sender's ``after`` + 1 and the connection's last + 1, so a reply never sorts before what its sender had received, even
when two nodes' wall clocks disagree. It stays below 2**53: JavaScript must hold it.

What time it is (``wall_ms``, ``wall_seconds``, ``utc_now``) is this machine's word until ``steer`` says better: the relay's nodes go
by MongoDB's clock, which they share (docs/decisions/0016).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

SEQ_BITS: Final = 10
SEQ_LIMIT: Final = 1 << 53
MAX_AHEAD_MS: Final = 2 * 60 * 60 * 1000
_LEASES: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_ahead: int | None = None


def steer(ahead_ns: int | None) -> None:
    """From now on, in the whole process, the time is ``steady_ns()`` and ``ahead_ns`` more, whatever happens to this machine's
    wall clock. None: it is the wall clock's again."""
    global _ahead
    _ahead = ahead_ns


def wall_ns() -> int:
    """Nanoseconds since the epoch. It may step back."""
    ahead = _ahead
    return machine_ns() if ahead is None else time.clock_gettime_ns(_LEASES) + ahead


def machine_ns() -> int:
    """What this machine's wall clock says, right or wrong, in nanoseconds since the epoch."""
    return time.time_ns()


def wall_ms() -> int:
    """Milliseconds since the epoch."""
    return wall_ns() // 1_000_000


def wall_seconds() -> float:
    """Seconds since the epoch."""
    return wall_ns() / 1_000_000_000


def utc_now() -> datetime:
    """The time, with its zone."""
    return datetime.fromtimestamp(wall_seconds(), UTC)


def steady_ns() -> int:
    """``lease_time`` in nanoseconds."""
    return time.clock_gettime_ns(_LEASES)


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
