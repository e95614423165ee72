"""The connections of this node in the directory: entered as they come, renewed, taken away as they go.

Many connect at once: what is to be noted gathers while the last group is on its way.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

from relay.redis_client import TROUBLE
from relay.routing.directory import KEPT_SECONDS, Directory, Entry, Outcome
from relay.routing.hub import Connected, Hub
from relay.wire.ids import device_key

_AT_ONCE: Final = 500
_MOST_WAITING: Final = 20_000
_PAUSE_SECONDS: Final = 0.05


class Registrations:
    """``works`` says whether Redis answers, ``fails`` is told when it does not, ``noted`` of every outcome. ``seconds``: the
    longest that one group may take."""

    def __init__(
        self,
        directory: Directory,
        hub: Hub,
        *,
        seconds: float,
        works: Callable[[], bool],
        fails: Callable[[BaseException], None],
        noted: Callable[[Entry, Outcome], None],
    ) -> None:
        self._directory = directory
        self._hub = hub
        self._seconds = seconds
        self._works = works
        self._fails = fails
        self._noted = noted
        self._waiting: list[tuple[Entry, asyncio.Future[Outcome] | None]] = []
        self._wake = asyncio.Event()
        # Devices whose connection here is not in the directory, because Redis did not answer when they came.
        self._unwritten: set[str] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    async def enter(self, user: str, device: str, serial: int) -> None:
        """Enters a connection that is about to be registered, or notes that it must be entered later."""
        key = device_key(user, device)
        self._unwritten.add(key)
        if not self._works() or len(self._waiting) >= _MOST_WAITING:
            return
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((Entry("enter", user, device, serial), outcome))
        self._wake.set()
        try:
            async with asyncio.timeout(self._seconds):
                await outcome
        except TimeoutError:
            return
        self._unwritten.discard(key)

    def note(self, entry: Entry) -> None:
        """Soon. What is dropped here is put right when connections are renewed, or runs out."""
        if entry.way == "leave" and self._hub.get(device_key(entry.user, entry.device)) is None:
            self._unwritten.discard(device_key(entry.user, entry.device))
        if self._works() and len(self._waiting) < _MOST_WAITING:
            self._waiting.append((entry, None))
            self._wake.set()

    async def run(self) -> None:
        """Notes what gathers."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                group, self._waiting = self._waiting[:_AT_ONCE], self._waiting[_AT_ONCE:]
                try:
                    async with asyncio.timeout(self._seconds):
                        outcomes = await self._directory.note([entry for entry, _ in group])
                except TROUBLE as error:
                    self._fails(error)
                    for _, waiter in group:
                        if waiter is not None and not waiter.done():
                            waiter.set_exception(TimeoutError())
                    continue
                for (entry, waiter), outcome in zip(group, outcomes, strict=True):
                    self._noted(entry, outcome)
                    if waiter is not None and not waiter.done():
                        waiter.set_result(outcome)

    async def renew(self) -> None:
        """Renews the lines of all connections, over and over, spread over the time."""
        while True:
            await asyncio.sleep(KEPT_SECONDS / 3 * random.uniform(0.8, 1.0))
            await self.renew_all()

    async def renew_all(self) -> None:
        """Renews them now, and enters those that could not be entered when they came."""
        for number, connection in enumerate(self._hub):
            if self._hub.get(connection.key) is connection:
                self.note(self._entry(connection))
            if number % _AT_ONCE == _AT_ONCE - 1:
                # Slower than they are written: devices that come now must not wait for all of these.
                await asyncio.sleep(_PAUSE_SECONDS)
            if not self._works():
                return

    def close(self) -> None:
        """Nobody who waits is answered any more."""
        for _, waiter in self._waiting:
            if waiter is not None:
                waiter.cancel()

    def _entry(self, connection: Connected) -> Entry:
        late = connection.key in self._unwritten
        self._unwritten.discard(connection.key)
        return Entry("late" if late else "keep", connection.user, connection.device, connection.serial)
