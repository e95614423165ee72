"""What a device tells the relay live: how far it has read, that its user types, whom it watches. Pure.

Read marks and the watch list are kept in memory and told again on the next connection; typing is of the moment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from relay.wire import codec

MOST_READS: Final = 10_000
_SEQ_LIMIT: Final = 1 << 53
_READ: Final = "read:"
_TYPING: Final = "typing:"
_WATCH: Final = "watch:"


class Wishes:
    """Makes the operations to send; nothing that the relay's ``features`` do not name. Keeps the read marks of at most
    ``MOST_READS`` conversations until they are confirmed; then those marked first are forgotten."""

    def __init__(self) -> None:
        self._features: frozenset[str] = frozenset()
        self._reads: dict[str, int] = {}
        self._asked: dict[str, tuple[str, int]] = {}
        self._watched: tuple[str, ...] = ()
        self._count = 0

    def connected(self, features: Collection[object]) -> list[str]:
        """A new connection to a relay with these features: what is to be told first."""
        self._features = frozenset(one for one in features if isinstance(one, str))
        self._asked.clear()
        found = [] if not self._watched else list(self._watch())
        return found + [text for conv in self._reads for text in self._read(conv)]

    def read(self, conv: str, up_to: int) -> list[str]:
        """The user has read so far. Raises ValueError for what is no ``seq``."""
        if type(up_to) is not int or not 0 <= up_to < _SEQ_LIMIT:
            raise ValueError("up_to must be the seq of a message")
        if up_to <= self._reads.get(conv, -1):
            return []
        self._reads.pop(conv, None)
        self._reads[conv] = up_to
        if len(self._reads) > MOST_READS:
            del self._reads[next(iter(self._reads))]
        return list(self._read(conv))

    def typing(self, conv: str, on: bool) -> list[str]:
        """The user types here, or has stopped."""
        return list(self._operation("typing", _TYPING, {"conv": conv, "on": on}))

    def watch(self, users: Sequence[str]) -> list[str]:
        """From now on these people are watched, and nobody else."""
        self._watched = tuple(users)
        return list(self._watch())

    def answered(self, frame: Mapping[str, Any]) -> bool:
        """Whether a ``done`` or ``error`` answers one of these operations."""
        ref = frame.get("ref")
        if not isinstance(ref, str) or not ref.startswith((_READ, _TYPING, _WATCH)):
            return False
        conv, up_to = self._asked.pop(ref, ("", -1))
        # What may succeed later is told again on the next connection.
        if self._reads.get(conv) == up_to and not frame.get("retry"):
            del self._reads[conv]
        return True

    def _read(self, conv: str) -> Iterator[str]:
        for text in self._operation("read", _READ, {"conv": conv, "upTo": self._reads[conv]}):
            self._asked[f"{_READ}{self._count}"] = (conv, self._reads[conv])
            yield text

    def _watch(self) -> Iterator[str]:
        return self._operation("presence", _WATCH, {"users": list(self._watched)})

    def _operation(self, name: str, prefix: str, fields: Mapping[str, object]) -> Iterator[str]:
        if name in self._features:
            self._count += 1
            yield codec.dumps({"t": name, **fields, "ref": f"{prefix}{self._count}"})
