"""The conservation ledger, per (message, device): accepted = acknowledged + expired + withdrawn + released + trimmed +
waiting.

Exact while the node lives. At a start ``waiting`` is recounted from the store and opens the account: the accepted of
former lives that are still waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

Fate = Literal["delivered", "expired", "withdrawn", "released", "trimmed"]
Outcome = Literal["accepted", "acknowledged", "expired", "withdrawn", "released", "trimmed"]
OUTCOMES: Final[tuple[Outcome, ...]] = (
    "accepted",
    "acknowledged",
    "expired",
    "withdrawn",
    "released",
    "trimmed",
)


class Ledger(Collector):
    """Counts deliveries: one accepted message for three devices is three."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._counts: dict[Outcome, int] = dict.fromkeys(OUTCOMES, 0)
        if registry is not None:
            registry.register(self)

    def open(self, waiting: int) -> None:
        """Starts the account with what the store holds."""
        self._counts["accepted"] += waiting

    def add(self, outcome: Outcome, deliveries: int) -> None:
        """Books deliveries."""
        self._counts[outcome] += deliveries

    def count(self, outcome: Outcome) -> int:
        """How many deliveries came to this outcome."""
        return self._counts[outcome]

    @property
    def waiting(self) -> int:
        """Accepted and not yet come to any end."""
        return self._counts["accepted"] - sum(self._counts[name] for name in OUTCOMES[1:])

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        counter = CounterMetricFamily(
            "relay_deliveries", "Deliveries (message and device) by what became of them.", labels=["outcome"]
        )
        for name in OUTCOMES:
            counter.add_metric([name], self._counts[name])
        yield counter
        yield GaugeMetricFamily("relay_deliveries_waiting", "Deliveries that still wait.", value=self.waiting)
