"""A circuit breaker for the lane of one shard.

Short outages are waited out: what is under way is tried again until its deadline. When nothing has come through for ``patience``
seconds, or for ``haste`` seconds while the queue is full, the lane opens: what is queued and what comes is refused at once, but for
one item a second that finds out whether the store answers again. A library's breaker guards single calls; this one has to see
groups of which a part fails, and to empty a queue.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final

_PROBE_SECONDS: Final = 1.0


class Breaker:
    """``pressed`` tells whether the queue is full; ``opened`` is called when the lane opens. Closed at first."""

    __slots__ = ("_failing_since", "_haste", "_next", "_opened", "_patience", "_pressed", "is_open")

    def __init__(
        self,
        *,
        patience: float,
        haste: float,
        pressed: Callable[[], bool],
        opened: Callable[[], None],
    ) -> None:
        self.is_open = False
        self._patience = patience
        self._haste = haste
        self._pressed = pressed
        self._opened = opened
        self._failing_since: float | None = None
        self._next = 0.0

    def admits(self) -> bool:
        """Whether to try this item; while the lane is open that is one a second."""
        if not self.is_open:
            return True
        now = monotonic()
        if now < self._next:
            return False
        self._next = now + _PROBE_SECONDS
        return True

    def failed(self) -> None:
        """A group came to nothing: the store did not answer, or nothing of it is known."""
        now = monotonic()
        if self._failing_since is None:
            self._failing_since = now
        lasting = now - self._failing_since
        if not self.is_open and (lasting >= self._patience or (lasting >= self._haste and self._pressed())):
            self.is_open = True
            self._next = now
            self._opened()

    def succeeded(self) -> None:
        """Something of a group came through."""
        self._failing_since = None
        self.is_open = False
