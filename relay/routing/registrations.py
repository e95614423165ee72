"""The connections of this node in the directory: entered as they come, renewed, taken away as they go.

Many connect at once: what is to be noted gathers while the last group is on its way.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from relay.redis_client import TROUBLE
from relay.routing.directory import KEPT_SECONDS, Directory, Entry, Outcome, Way
from relay.routing.hub import Connected, Hub
from relay.wire.ids import device_key

_AT_ONCE: Final = 500
_MOST_WAITING: Final = 20_000
_PAUSE_SECONDS: Final = 0.05

_Waiting = tuple[Entry, asyncio.Future[Outcome] | None]

log = structlog.get_logger(__name__)


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
        self._waiting: list[_Waiting] = []
        self._wake = asyncio.Event()
        # By device key, the number of a connection here that is not in the directory, because Redis did not answer when it came.
        self._unwritten: dict[str, int] = {}
        self._silent: dict[str, int] = {}
        # What could not be taken away: it would look connected until its line runs out.
        self._left: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    async def enter(self, user: str, device: str, serial: int) -> None:
        """Enters a connection that is about to be registered, or notes that it must be entered later."""
        key = device_key(user, device)
        self._unwritten[key] = serial
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
        except asyncio.CancelledError:
            # It was never registered: nobody else takes its line away.
            self.note(Entry("leave", user, device, serial))
            raise

    def note(self, entry: Entry) -> None:
        """Soon, or when connections are renewed, or, when that is too much to remember, its line runs out."""
        key = device_key(entry.user, entry.device)
        if entry.way == "leave":
            self._forget(self._unwritten, key, entry.serial)
        if entry.silent:
            self._silent[key] = entry.serial
        else:
            self._forget(self._silent, key, entry.serial)
        if self._works() and len(self._waiting) < _MOST_WAITING:
            self._waiting.append((entry, None))
            self._wake.set()
        else:
            self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        if entry.way == "leave" and len(self._left) < _MOST_WAITING:
            self._left[device_key(entry.user, entry.device)] = entry

    async def run(self) -> None:
        """Notes what gathers."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                group, self._waiting = self._waiting[:_AT_ONCE], self._waiting[_AT_ONCE:]
                try:
                    await self._note(group)
                except TROUBLE as error:
                    self._give_up(group, error)
                except Exception as error:
                    log.exception("devices were not noted in the directory")
                    self._give_up(group, error)

    async def _note(self, group: Sequence[_Waiting]) -> None:
        # Who waited for too long is connected already: a device that has moved on since must not be called back.
        entries = [
            entry._replace(way="late") if waiter is not None and waiter.done() else entry
            for entry, waiter in group
        ]
        async with asyncio.timeout(self._seconds):
            outcomes = await self._directory.note(entries)
        for entry, (_, waiter), outcome in zip(entries, group, outcomes, strict=True):
            if outcome is None:
                self._keep(entry)
                if waiter is not None and not waiter.done():
                    waiter.set_exception(TimeoutError())
                continue
            if entry.way in ("enter", "late"):
                self._forget(self._unwritten, device_key(entry.user, entry.device), entry.serial)
            self._noted(entry, outcome)
            if waiter is not None and not waiter.done():
                waiter.set_result(outcome)

    def _give_up(self, group: Sequence[_Waiting], error: Exception) -> None:
        """All that waits but who has left: written later it would say what is not true any more, and connections are renewed
        anyway."""
        self._fails(error)
        waiting, self._waiting = self._waiting, []
        for entry, waiter in (*group, *waiting):
            self._keep(entry)
            if waiter is not None and not waiter.done():
                waiter.set_exception(TimeoutError())

    @staticmethod
    def _forget(of: dict[str, int], key: str, serial: int) -> None:
        if of.get(key) == serial:
            del of[key]

    async def renew(self) -> None:
        """Renews the lines of all connections, over and over, spread over the time."""
        while True:
            await asyncio.sleep(KEPT_SECONDS / 3 * random.uniform(0.8, 1.0))
            await self.renew_all()

    async def renew_all(self) -> None:
        """Renews them now, enters those that could not be entered when they came, and takes away who has left meanwhile."""
        left, self._left = self._left, {}
        for entry in left.values():
            self.note(entry)
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
        late = self._unwritten.get(connection.key) == connection.serial
        silent = self._silent.get(connection.key) == connection.serial
        way: Way = "late" if late else "keep"
        return Entry(way, connection.user, connection.device, connection.serial, silent)
