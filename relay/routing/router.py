"""Hands out what was committed: messages to the devices that await them, receipts to senders, credit to connections.

Runs once for each committed group, without waiting: everything it puts into one outbox leaves as one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from relay.metrics import Metrics
from relay.routing.fanout import Fanout
from relay.routing.hub import Hub
from relay.routing.receipts import Receipts
from relay.store.endings import Settlement
from relay.wire.envelope import Envelope
from relay.wire.ids import head_id


class Router:
    """The way from the store to the connections of this node."""

    def __init__(self, hub: Hub, metrics: Metrics, receipts: Receipts) -> None:
        self._hub = hub
        self._receipts = receipts
        self._latency = metrics.delivery
        self.others: Callable[[], bool] = _nobody
        self.fanout = Fanout(self._deliver_to, lambda: self.others())
        metrics.watch_queue("fanout", lambda: self.fanout.waiting)

    def committed(self, envelopes: Sequence[Envelope]) -> None:
        """Delivers fresh messages to connected devices; the others find them when they connect."""
        for envelope in envelopes:
            if envelope.parts > 1:
                self.fanout.put(envelope)
            else:
                self._deliver(envelope)

    def _deliver(self, envelope: Envelope) -> None:
        serving = self._hub.serving
        for key in envelope.awaiting:
            for connection in serving(key):
                connection.delivery.push(envelope)

    def _deliver_to(self, key: str, envelopes: Sequence[Envelope]) -> None:
        for connection in self._hub.serving(key):
            for envelope in envelopes:
                connection.delivery.push(envelope)

    def found(self, keys: Iterable[str]) -> None:
        """Something waits for these that was not pushed."""
        for key in keys:
            for connection in self._hub.serving(key):
                connection.delivery.fall_behind()

    def settled(self, settlement: Settlement) -> None:
        """Gives credit back and tells senders that their messages arrived."""
        serving = self._hub.serving
        spreading = bool(self.fanout.waiting)
        for doc_id, key in settlement.released:
            if spreading:
                self.fanout.ended(head_id(doc_id), key)
            for connection in serving(key):
                connection.delivery.release(doc_id)
        observe = self._latency.observe
        add = self._receipts.add
        for item in settlement.acknowledged:
            observe(max(0, item.at - item.accepted_at) / 1000)
            add(item)


def _nobody() -> bool:
    return False
