"""What is told live and kept nowhere: to connections that have room for it, counted."""

from __future__ import annotations

from collections.abc import Iterable

from relay.metrics import Metrics
from relay.routing.bus import Alone, Bus, Event
from relay.routing.hub import Connected, Hub


class Announcer:
    """Puts the live frames of one kind into outboxes, here and over the bus at other nodes. They are a convenience: a slow
    socket goes without."""

    def __init__(self, hub: Hub, metrics: Metrics, event: Event, bus: Bus | None = None) -> None:
        self.hub = hub
        self.bus: Bus = Alone() if bus is None else bus
        self._event = event
        self._sent = metrics.live.labels(event)
        self._dropped = metrics.live_dropped.labels(event)

    def put(self, connection: Connected, frame: str) -> bool:
        """Tells one connection; False when its outbox is full."""
        if connection.outbox.full:
            self._dropped.inc()
            return False
        connection.outbox.put(frame)
        self._sent.inc()
        return True

    def tell(self, users: Iterable[str], frame: str, *, but: str | None = None) -> None:
        """Tells every connected device of these users, except the one with the device key ``but``."""
        wanted = list(users)
        self.tell_here(wanted, frame, but=but)
        if self.bus.tells:
            self.bus.tell(self._event, wanted, frame, but)

    def reaches(self, user: str) -> bool:
        """Whether a device of this user may be connected somewhere."""
        return self.bus.tells or bool(self.hub.of_user(user))

    def tell_here(self, users: Iterable[str], frame: str, *, but: str | None = None) -> None:
        """As ``tell``, the devices that are connected to this node."""
        for user in users:
            for connection in self.hub.of_user(user):
                if connection.key != but:
                    self.put(connection, frame)
