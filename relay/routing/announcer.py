"""What is told live and kept nowhere: to connections that have room for it, counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from relay.metrics import Metrics
from relay.routing.hub import Connected, Hub

Event = Literal["receipt", "read", "typing", "presence"]


class Announcer:
    """Puts the live frames of one kind into outboxes. They are a convenience: a slow socket goes without."""

    def __init__(self, hub: Hub, metrics: Metrics, event: Event) -> None:
        self.hub = hub
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
        for user in users:
            for connection in self.hub.of_user(user):
                if connection.key != but:
                    self.put(connection, frame)
