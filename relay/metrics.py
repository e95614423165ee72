"""What the relay counts, for ``/metrics``. One object per node; nothing here is global, so tests can run several."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from relay.wire.limits import Limit

_LATENCY: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class DeliveryTimes(Collector):
    """From accepting a message to its acknowledgement by a device, live and drained. Observed for every message, so it
    counts without the library's lock; one thread observes and renders."""

    _BOUNDS: Final = (*_LATENCY, 60, 3600, 86400)

    def __init__(self) -> None:
        self._counts = [0] * (len(self._BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Notes one delivery."""
        self._counts[bisect_left(self._BOUNDS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        """For Prometheus."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._BOUNDS, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((_bound(bound), total))
        yield HistogramMetricFamily(
            "relay_delivery_seconds",
            "From accepting a message to its acknowledgement by a device.",
            buckets=buckets,
            sum_value=self._sum,
        )


def _bound(value: float) -> str:
    return "+Inf" if value == float("inf") else str(float(value))


class Metrics:
    """All metrics of one node, named as Prometheus names them (base units, ``_total`` for counters)."""

    def __init__(self, operations: Mapping[type, str] | None = None) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.connections = Gauge("relay_connections", "Authenticated WebSockets open now.", registry=r)
        self.behind = Gauge("relay_connections_behind", "Connections that drain a backlog now.", registry=r)
        self.closed = Counter("relay_closes_total", "WebSockets closed, by close code.", ["code"], registry=r)
        counter = Counter("relay_operations_total", "Operations taken, by name.", ["op"], registry=r)
        self.operations = {kind: counter.labels(name) for kind, name in (operations or {}).items()}
        self.errors = Counter("relay_errors_total", "Errors told to clients, by code.", ["code"], registry=r)
        reached = Counter("relay_limits_reached_total", "Limits reached, by name.", ["limit"], registry=r)
        self._limits = {limit: reached.labels(limit.value) for limit in Limit}
        self.batch = Histogram(
            "relay_commit_batch_size", "Items of one group commit.", ["queue"], buckets=_SIZES, registry=r
        )
        self.commit = Histogram(
            "relay_commit_seconds", "Duration of one group commit.", ["queue"], buckets=_LATENCY, registry=r
        )
        self.delivery = DeliveryTimes()
        r.register(self.delivery)
        self.retries = Counter(
            "relay_commit_retries_total",
            "Group commits tried again after an unknown outcome.",
            ["queue"],
            registry=r,
        )
        self.drains = Counter(
            "relay_drain_pages_total", "Pages read from the store for backlogs.", registry=r
        )
        self.poison = Counter(
            "relay_unreadable_documents_total", "Stored documents that could not be read.", registry=r
        )
        self.missed = Counter(
            "relay_missed_deliveries_total", "Deliveries found by the sweep, not pushed.", registry=r
        )
        self.healed = Counter(
            "relay_leftovers_removed_total", "Acknowledged leftovers the sweep removed.", registry=r
        )
        self.problems = Gauge(
            "relay_problem",
            "1 while this part is not as it should be, as /readyz says.",
            ["part"],
            registry=r,
        )
        self.clock_offset = Gauge(
            "relay_clock_offset_seconds",
            "How far this machine's clock is ahead of MongoDB's, which the relay goes by.",
            registry=r,
        )
        self.live = Counter(
            "relay_live_frames_total", "Live frames handed to sockets, by event.", ["event"], registry=r
        )
        self.live_dropped = Counter(
            "relay_live_frames_dropped_total",
            "Live frames that slow sockets went without, by event.",
            ["event"],
            registry=r,
        )
        self.bus_dropped = Counter(
            "relay_bus_dropped_total",
            "Hints to or from other nodes that were dropped: too many, too old, or Redis, or a part of it, did not answer.",
            registry=r,
        )
        self.watches = Gauge(
            "relay_presence_watches", "People watched, once for each connection that does.", registry=r
        )
        self._queue = Gauge(
            "relay_queue_items",
            "Items waiting for a group commit, or to be handed out.",
            ["queue"],
            registry=r,
        )
        self._queue_bytes = Gauge(
            "relay_queue_bytes", "Bytes waiting for a group commit.", ["queue"], registry=r
        )

    def reached(self, limit: Limit | None) -> None:
        """Counts that a limit was reached; None counts nothing."""
        if limit is not None:
            self._limits[limit].inc()

    def watch_queue(self, name: str, items: Callable[[], int], size: Callable[[], int] | None = None) -> None:
        """Reads a queue's depth at every scrape."""
        self._queue.labels(name).set_function(items)
        if size is not None:
            self._queue_bytes.labels(name).set_function(size)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
