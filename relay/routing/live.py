"""Everything that is told live and stored nowhere, in one place: receipts, read cursors, typing, presence.

Each is a class of its own that knows the connections of this node, and tells those of others over the bus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from relay.metrics import Metrics
from relay.routing.announcer import Announcer
from relay.routing.bus import Bus
from relay.routing.catching_up import CatchingUp
from relay.routing.hub import Connected, Hub
from relay.routing.presence import FRESH_SECONDS, LastSeen, Presence
from relay.routing.reads import Reads
from relay.routing.receipts import Receipts
from relay.routing.second_looks import SecondLooks
from relay.routing.typing import Typing
from relay.store.audience import Audiences
from relay.store.reading import ReadCursors
from relay.store.sights import Sights


@dataclass(frozen=True, slots=True)
class Live:
    """The live parts of one node."""

    receipts: Receipts
    reads: Reads
    catching_up: CatchingUp
    typing: Typing
    presence: Presence
    looks: SecondLooks

    @classmethod
    def of(
        cls,
        hub: Hub,
        metrics: Metrics,
        audiences: Audiences,
        last_seen: LastSeen,
        now: Callable[[], int],
        bus: Bus,
        *,
        max_frame: int,
        heartbeat: float,
        timeout: float,
    ) -> Self:
        """``now`` is the wall clock (ms); ``max_frame`` in bytes, ``heartbeat`` and ``timeout`` (of a database call) in
        seconds."""
        cursors = ReadCursors(timeout=timeout)
        reads = Announcer(hub, metrics, "read", bus)
        presence = Presence(
            Announcer(hub, metrics, "presence", bus),
            Sights(timeout=timeout),
            last_seen,
            fresh=heartbeat + FRESH_SECONDS,
            now=now,
        )
        metrics.watches.set_function(lambda: presence.watched)
        return cls(
            Receipts(Announcer(hub, metrics, "receipt", bus), max_frame=max_frame),
            Reads(cursors, audiences, reads),
            CatchingUp(cursors.since, cursors.since_for, reads),
            Typing(Announcer(hub, metrics, "typing", bus)),
            presence,
            SecondLooks(presence, bus),
        )

    def left(self, connection: Connected) -> None:
        """The connection has ended and is not registered any more."""
        self.catching_up.left(connection)
        self.typing.left(connection)
        self.presence.left(connection)

    async def close(self, seconds: float) -> None:
        """Before the sockets close: tells what is pending, and writes read cursors for at most so long."""
        self.receipts.close()
        self.typing.close()
        await self.catching_up.close()
        await self.presence.close()
        await self.reads.close(seconds)
