"""The connections of this node: the hub alone knows which device is connected where."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from time import monotonic
from typing import Final, Protocol

from relay.routing.delivery import Delivery
from relay.routing.outbox import Outbox
from relay.wire.clock import utc_now
from relay.wire.errors import Close
from relay.wire.ids import user_of

# Longer than a connection takes from reading its user to being registered.
_ENTERING_SECONDS: Final = 30.0
_MOST_REMEMBERED: Final = 10_000


class Connected(Protocol):
    """What the hub, the router and the jobs need of a connection. Times are of the event loop's clock, but ``issued`` and
    ``expires`` of its token, which are in seconds since the epoch."""

    heard: float
    pinged: bool
    issued: int
    expires: int
    session: str | None
    quiet: bool
    """Others shall not be told what it receives."""
    serial: int
    """Names this connection among those of its device."""

    @property
    def user(self) -> str:
        """The authenticated user."""

    @property
    def device(self) -> str:
        """The authenticated device."""

    @property
    def key(self) -> str:
        """The device key."""

    @property
    def delivery(self) -> Delivery:
        """Its deliveries."""

    @property
    def outbox(self) -> Outbox:
        """Its way out."""

    def shut(self, close: Close) -> None:
        """Closes it, without waiting."""

    def listen(self, now: float) -> None:
        """Updates ``heard`` from bytes that are not a frame yet."""

    async def ping(self) -> None:
        """Sends a protocol ping."""


class Hub:
    """At most one connection for each device; a second one takes over from the first."""

    def __init__(self) -> None:
        self._connections: dict[str, Connected] = {}
        self._of_user: dict[str, dict[str, Connected]] = {}
        self._empty: asyncio.Event | None = None
        # Whether they are, until when that is remembered, and when it changed.
        self._quiet: OrderedDict[str, tuple[bool, float, int]] = OrderedDict()
        # By device key the number of a connection that is replaced elsewhere and was not registered here then.
        self._replaced: OrderedDict[str, int] = OrderedDict()
        self.left: dict[str, float] = {}
        """Device keys that disconnected since somebody last took them, with when they were last heard, for `last seen`."""

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[Connected]:
        return iter(list(self._connections.values()))

    def add(self, connection: Connected) -> Connected | None:
        """Registers a connection and returns the one it replaces."""
        before = self._connections.get(connection.key)
        quiet, until, _ = self._quiet.get(connection.user, (False, 0.0, 0))
        if monotonic() < until:
            connection.quiet = quiet
        self._connections[connection.key] = connection
        self._of_user.setdefault(connection.user, {})[connection.key] = connection
        return before

    def set_quiet(self, user: str, quiet: bool, moment: int) -> None:
        """Whether others shall be told what this user receives has just changed, at ``moment`` (ms): for connections that are
        here, and for those that are about to be and may have read what was before. Nothing, when a later change is known."""
        if self._quiet.get(user, (False, 0.0, 0))[2] > moment:
            return
        for connection in self.of_user(user):
            connection.quiet = quiet
        self._quiet.pop(user, None)
        self._quiet[user] = (quiet, monotonic() + _ENTERING_SECONDS, moment)
        if len(self._quiet) > _MOST_REMEMBERED:
            self._quiet.popitem(last=False)

    def replace(self, key: str, serial: int) -> Connected | None:
        """Another node has a younger connection of this device than the one with this number. Returns that one, which is registered
        no more; or None, and remembers the number for when it is about to be."""
        connection = self._connections.get(key)
        if connection is not None and connection.serial == serial:
            self.remove(connection)
            return connection
        self._replaced.pop(key, None)
        self._replaced[key] = serial
        if len(self._replaced) > _MOST_REMEMBERED:
            self._replaced.popitem(last=False)
        return None

    def is_replaced(self, key: str, serial: int) -> bool:
        """Whether the connection with this number, which is about to be registered, is replaced already: here or elsewhere."""
        before = self._connections.get(key)
        elsewhere = self._replaced.pop(key, 0)
        return elsewhere >= serial or (before is not None and before.serial > serial)

    def remove(self, connection: Connected) -> None:
        """Forgets a connection, unless another one has taken its place."""
        if self._connections.get(connection.key) is not connection:
            return
        del self._connections[connection.key]
        self.left[connection.key] = connection.heard
        own = self._of_user.get(connection.user)
        if own is not None:
            own.pop(connection.key, None)
            if not own:
                del self._of_user[connection.user]
        if self._empty is not None and not self._connections:
            self._empty.set()

    def complete(self) -> None:
        """A part of the store answers again: connections look for what waits there."""
        for connection in self:
            connection.delivery.complete()

    async def empty(self) -> None:
        """Waits until the last connection has gone."""
        if self._connections:
            self._empty = asyncio.Event()
            await self._empty.wait()

    def get(self, key: str) -> Connected | None:
        """The connection of a device."""
        return self._connections.get(key)

    def serving(self, key: str) -> list[Connected]:
        """The connections that drain a mailbox: its device's, or for the placeholder of a user all of theirs."""
        one = self._connections.get(key)
        if one is not None:
            return [one]
        return self.of_user(user_of(key)) if key.endswith("/*") else []

    def of_user(self, user: str) -> list[Connected]:
        """All connections of a user's devices."""
        own = self._of_user.get(user)
        return list(own.values()) if own else []


def moments_of(heard: Mapping[str, float]) -> dict[str, datetime]:
    """The same by the wall clock."""
    now, loop = utc_now(), asyncio.get_running_loop().time()
    return {key: now - timedelta(seconds=max(0.0, loop - at)) for key, at in heard.items()}
