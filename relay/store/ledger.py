"""The conservation ledger, per (message, device): accepted = acknowledged + expired + withdrawn + released + trimmed +
waiting.

Exact while the node lives. Of several nodes one accepts what another acknowledges, so ``waiting`` of a single one may be anything,
also negative: what waits is the sum over the nodes that live. The first node opens its account with what the store holds, the
accepted of former lives that are still waiting; one that joins others opens with nothing; and the balance of one that has left
or vanished is carried on by another (relay/jobs/books.py).
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
        self.mistrusted = False
        """What was booked may be wrong: a recount is due, and not noted yet."""
        if registry is not None:
            registry.register(self)

    def open(self, waiting: int) -> None:
        """Starts the account with what the store holds."""
        self._counts["accepted"] += waiting

    def carry(self, balance: int) -> None:
        """Books what other books held, or what these were wrong by: as accepted, or as acknowledged when it is negative. No counter
        ever goes down."""
        self._counts["accepted" if balance > 0 else "acknowledged"] += abs(balance)

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

    @property
    def turnover(self) -> int:
        """All that was ever booked: what changes whenever anything is."""
        return sum(self._counts.values())

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        counter = CounterMetricFamily(
            "relay_deliveries", "Deliveries (message and device) by what became of them.", labels=["outcome"]
        )
        for name in OUTCOMES:
            counter.add_metric([name], self._counts[name])
        yield counter
        yield GaugeMetricFamily(
            "relay_deliveries_waiting",
            "Deliveries that still wait, as a sum over all nodes.",
            value=self.waiting,
        )
