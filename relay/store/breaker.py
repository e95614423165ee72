"""A circuit breaker for the lane of one shard.

Short outages, such as elections, are waited out: what is under way is tried again until its deadline. When nothing has come through
for ``patience`` seconds the lane opens: what is queued and what comes is refused at once, but for one item a second that finds out
whether the store answers again. When nothing has come through for ``haste`` seconds, queues that are full are relieved: a full queue
keeps sockets from being read. A library's breaker guards single calls; this one has to see groups of which a part fails, and to empty
queues.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Final

_PROBE_SECONDS: Final = 1.0
# Failures that lie further apart are of two outages.
_APART_SECONDS: Final = 15.0


class Breaker:
    """Closed at first. ``opened`` is called when the lane opens, ``relieve`` whenever a group fails after ``haste`` seconds."""

    __slots__ = (
        "_failed_at",
        "_failing_since",
        "_haste",
        "_next",
        "_opened",
        "_patience",
        "_relieve",
        "is_open",
    )

    def __init__(
        self,
        *,
        patience: float = inf,
        haste: float = inf,
        opened: Callable[[], None] | None = None,
        relieve: Callable[[], None] | None = None,
    ) -> None:
        self.is_open = False
        self._patience = patience
        self._haste = haste
        self._opened = opened
        self._relieve = relieve
        self._failing_since: float | None = None
        self._failed_at = 0.0
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
        if self._failing_since is None or now - self._failed_at > _APART_SECONDS:
            self._failing_since = now
        self._failed_at = now
        lasting = now - self._failing_since
        if not self.is_open and lasting >= self._patience:
            self.is_open = True
            self._next = now
            if self._opened is not None:
                self._opened()
        if lasting >= self._haste and self._relieve is not None:
            self._relieve()

    def succeeded(self) -> None:
        """Something of a group came through, or the store answers again."""
        self._failing_since = None
        self.is_open = False
