"""One clock for all nodes: MongoDB's, which they share (docs/decisions/0016).

Each answer of MongoDB that tells its time is a ``Reading``. From the last few a ``Timekeeper`` decides how far this machine's wall
clock is off, and steers the process's clock (``relay.wire.clock``) by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from relay.wire.clock import machine_ns, steady_ns, steer

READINGS: Final = 5
"""So many are kept; and so many in a row must tell another time than before until they are believed."""
_MS: Final = 1_000_000
# Clocks that NTP keeps are closer together than this: they are left alone.
_TOLERANCE: Final = 100 * _MS
_WARNING: Final = 2000 * _MS

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """MongoDB's clock, seen once: it is ``ahead`` of this machine's steady clock, give or take ``error``; both in nanoseconds."""

    ahead: int
    error: int

    @classmethod
    def of(cls, at: int, asked: int, answered: int) -> Reading:
        """From MongoDB's time in whole milliseconds, and ``steady_ns`` before it was asked and after its answer."""
        told = at * _MS + _MS // 2
        return cls(told - (asked + answered) // 2, (answered - asked + _MS) // 2)

    def agrees(self, other: Reading) -> bool:
        """Whether both may be right."""
        return abs(self.ahead - other.ahead) <= max(self.error + other.error, _TOLERANCE)


class Timekeeper:
    """Steers the process's clock. Between readings it runs on the machine's steady clock, so that a step of the wall clock is
    measured before it counts.

    While the wall clock agrees with MongoDB's the process follows it; otherwise MongoDB's. A clock of MongoDB's that jumps, as
    after a change of primary, is believed after ``READINGS`` in a row: one odd answer moves nothing. Without readings
    everything stays as it is.
    """

    def __init__(
        self, *, wall: Callable[[], int] = machine_ns, steady: Callable[[], int] = steady_ns
    ) -> None:
        self._wall = wall
        self._steady = steady
        self._recent: deque[Reading] = deque(maxlen=READINGS)
        self._believed: Reading | None = None
        self._corrects = False
        self._warned = False
        self.offset = 0.0
        """How far this machine's wall clock is ahead of MongoDB's, in seconds."""

    @property
    def problem(self) -> str | None:
        """What is wrong with this machine's clock, for people."""
        if not self._warned:
            return None
        way = "ahead of" if self.offset > 0 else "behind"
        return f"this machine's clock is {abs(self.offset):.0f} s {way} MongoDB's, which is used instead; set both by NTP"

    def take(self, *readings: Reading) -> None:
        """Goes by these readings, the oldest first, and the last ones before them."""
        self._recent.extend(readings)
        if not readings:
            return
        before, self._believed = self._believed, self._judged()
        ahead = self._believed.ahead
        if before is not None and abs(ahead - before.ahead) > _WARNING:
            log.warning(
                "MongoDB's clock has jumped, and the relay's with it; set all machines by NTP",
                seconds=round((ahead - before.ahead) / 1e9, 1),
            )
        own = self._own()
        off = own - ahead
        # What begins at one difference ends at a smaller one: no going to and fro on the edge.
        self._corrects = abs(off) > (
            _TOLERANCE // 2 if self._corrects else max(self._believed.error, _TOLERANCE)
        )
        steer(ahead if self._corrects else own)
        self.offset = off / 1e9
        self._tell()

    def _judged(self) -> Reading:
        """What is known of MongoDB's clock now."""
        known = self._believed
        agreeing = [one for one in self._recent if known is not None and one.agrees(known)]
        if known is None or not agreeing:
            middle = sorted(self._recent, key=lambda one: one.ahead)[len(self._recent) // 2]
            return min((one for one in self._recent if one.agrees(middle)), key=lambda one: one.error)
        best = min(agreeing, key=lambda one: one.error)
        # No further than the best of them demands: the time does not tremble with the network.
        return Reading(min(max(known.ahead, best.ahead - best.error), best.ahead + best.error), best.error)

    def _own(self) -> int:
        """How far the wall clock is ahead of the steady one: of several looks the one that nothing came between."""
        looks: list[tuple[int, int]] = []
        for _ in range(3):
            before = self._steady()
            wall = self._wall()
            after = self._steady()
            looks.append((after - before, wall - (before + after) // 2))
        return min(looks)[1]

    def _tell(self) -> None:
        far = self._corrects and abs(self.offset) * 1e9 > _WARNING
        if far and not self._warned:
            log.warning(
                "this machine's clock differs from MongoDB's, which is used instead; set both by NTP",
                ahead_seconds=round(self.offset, 1),
            )
        elif self._warned and not far:
            log.info("this machine's clock agrees with MongoDB's again")
        self._warned = far
