"""Hands out what was committed: messages to the devices that await them, receipts to senders, credit to connections.

Runs once for each committed group, without waiting: everything it puts into one outbox leaves as one frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Final

from relay.metrics import Metrics
from relay.routing.bus import Alone, Bus
from relay.routing.fanout import Fanout
from relay.routing.hub import Hub
from relay.routing.receipts import Receipts
from relay.store.endings import Settlement
from relay.wire.envelope import WITHDRAWN, Envelope
from relay.wire.ids import document_id, head_id, user_of

_MOMENT: Final = 0.05


class Router:
    """The way from the store to the connections of this node, and over the bus to those of others."""

    def __init__(self, hub: Hub, metrics: Metrics, receipts: Receipts, bus: Bus | None = None) -> None:
        self._hub = hub
        self._bus: Bus = Alone() if bus is None else bus
        self._receipts = receipts
        self._latency = metrics.delivery
        self._handed_at = 0.0
        self.others: Callable[[], bool] = _nobody
        self.withdrawn: Callable[[str], None] = _nothing
        """Is told the id of a message that is being withdrawn at another node."""
        self.fanout = Fanout(self._deliver_to, lambda: self.others())
        metrics.watch_queue("fanout", lambda: self.fanout.waiting)

    def expected(self, envelopes: Iterable[Envelope]) -> None:
        """These are being committed: where they may have to be handed over is found out meanwhile."""
        if self._bus.tells:
            self._bus.expect(
                user_of(key)
                for envelope in envelopes
                if envelope.parts == 1
                for key in self._not_here(envelope)
            )

    def committed(self, envelopes: Sequence[Envelope]) -> None:
        """Delivers fresh messages to connected devices; the others find them when they connect."""
        tells = self._bus.tells
        for envelope in envelopes:
            if envelope.parts > 1:
                self.fanout.put(envelope)
            else:
                self._deliver(envelope)
            if tells:
                self._hand_over(envelope)

    def busy(self) -> bool:
        """Whether messages between few devices came within the last moment, from here or from another node."""
        return self.others() or monotonic() - self._handed_at < _MOMENT

    def handed(self, envelopes: Iterable[Envelope]) -> None:
        """Another node has committed these, for devices that are connected here."""
        self._handed_at = monotonic()
        for envelope in envelopes:
            if envelope.kind == WITHDRAWN and envelope.reply_to is not None:
                self.withdrawn(document_id(envelope.conversation, envelope.reply_to))
            if envelope.parts == 1:
                self._deliver(envelope)
            elif self.fanout.full:
                self.found(envelope.awaiting)
            else:
                self.fanout.put(envelope)

    def _deliver(self, envelope: Envelope) -> None:
        serving = self._hub.serving
        for key in envelope.awaiting:
            for connection in serving(key):
                connection.delivery.push(envelope)

    def _hand_over(self, envelope: Envelope) -> None:
        missing = self._not_here(envelope)
        if missing:
            self._bus.deliver(envelope, missing)

    def _not_here(self, envelope: Envelope) -> list[str]:
        serving = self._hub.serving
        return [key for key in envelope.awaiting if not key.endswith("/!") and not serving(key)]

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
        tells = self._bus.tells
        for doc_id, key in self.released(settlement.released):
            if tells and not key.endswith("/!"):
                self._bus.release(doc_id, key)
        observe = self._latency.observe
        add = self._receipts.add
        for item in settlement.acknowledged:
            observe(max(0, item.at - item.accepted_at) / 1000)
            add(item)

    def released(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """These documents (id and mailbox) are awaited no more. Returns those whose mailbox no connection here serves."""
        serving = self._hub.serving
        spreading = bool(self.fanout.waiting)
        missing = []
        for doc_id, key in pairs:
            if spreading:
                self.fanout.ended(head_id(doc_id), key)
            found = serving(key)
            for connection in found:
                connection.delivery.release(doc_id)
            if not found:
                missing.append((doc_id, key))
        return missing


def _nobody() -> bool:
    return False


def _nothing(_: str) -> None:
    return None
