"""What scripts/chat tells of receipts: a line for what arrived at about the same time, not one for each device."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

_GATHERING_SECONDS: Final = 0.5
_REMEMBERED: Final = 1000
_MOST_NAMED: Final = 10
_SHOWN: Final = 40


class Receipts:
    """Gathers receipts of own messages for half a second and has a line told: a person counts at their first device."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._reached: OrderedDict[str, set[str]] = OrderedDict()
        self._fresh: dict[str, list[str]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def typed(self, message: str, text: str) -> None:
        """A message was entered here."""
        self._texts[message] = text
        if len(self._texts) > _REMEMBERED:
            self._texts.popitem(last=False)

    def arrived(self, messages: Sequence[str], who: str) -> None:
        """One of this person's devices has these."""
        for message in messages:
            reached = self._reached.setdefault(message, set())
            if who not in reached:
                reached.add(who)
                self._fresh.setdefault(who, []).append(message)
        while len(self._reached) > _REMEMBERED:
            self._reached.popitem(last=False)
        if self._fresh and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_GATHERING_SECONDS, self._flush)

    def close(self) -> None:
        """Tells nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _flush(self) -> None:
        self._timer = None
        fresh, self._fresh = self._fresh, {}
        together: dict[tuple[str, ...], list[str]] = {}
        for who, messages in fresh.items():
            together.setdefault(tuple(messages), []).append(who)
        for found, people in together.items():
            more = len(people) - _MOST_NAMED
            whom = ", ".join(people[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
            self._tell(self._line(found, whom))

    def _line(self, messages: tuple[str, ...], whom: str) -> str:
        if len(messages) > 1:
            return f"{len(messages)} messages delivered to {whom}"
        text = self._texts.get(messages[0])
        if text is None:
            return f"an earlier message delivered to {whom}"
        if messages[0] == next(reversed(self._texts)):
            return f"delivered to {whom}"
        return f"delivered to {whom}: {text[:_SHOWN]}{'…' if len(text) > _SHOWN else ''}"
