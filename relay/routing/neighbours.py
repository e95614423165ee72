"""Which other nodes are dead: what they have left in Redis counts no more, though it is good for a while yet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from time import monotonic
from typing import Final

# Longer than a living node needs to say so once MongoDB answers it again.
_DOUBT_SECONDS: Final = 6.0
_BREAK_SECONDS: Final = 5.0
_MOST: Final = 1000


class Neighbours:
    """The nodes that somebody asked about. ``others`` tells which live, by MongoDB's clock; ``changed`` is called when one has
    died, or lives after all.

    A node is dead when it was missing from the living, without a break, for six seconds, which it is ten seconds after it last
    said that it lives. While the store does not answer nobody dies, and afterwards everybody has that long to speak up.
    """

    def __init__(self, others: Callable[[], Awaitable[Collection[str]]]) -> None:
        self._others = others
        self.changed: Callable[[], None] = _nothing
        # With the moment since when each is missing.
        self._asked: OrderedDict[str, float | None] = OrderedDict()
        self._dead: set[str] = set()
        self._looked = 0.0

    def is_dead(self, node: str) -> bool:
        """Whether this node is known to be dead. One that was never asked about is looked at from now on."""
        if node not in self._asked:
            self._asked[node] = None
            if len(self._asked) > _MOST:
                self._dead.discard(self._asked.popitem(last=False)[0])
        return node in self._dead

    async def run(self) -> None:
        """One look: a small query, when there is anybody to look for."""
        if not self._asked:
            return
        living = await self._others()
        now = monotonic()
        continues = now - self._looked < _BREAK_SECONDS
        self._looked = now
        before = frozenset(self._dead)
        for node, since in self._asked.items():
            if node in living:
                self._asked[node] = None
                self._dead.discard(node)
            elif since is None or not continues:
                self._asked[node] = now
            elif now - since >= _DOUBT_SECONDS:
                self._dead.add(node)
        if self._dead != before:
            self.changed()


def _nothing() -> None:
    return None
