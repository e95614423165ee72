"""What a relay says about itself on ``/metrics``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

_SECONDS: Final = 10.0
_OUTCOMES: Final = ("acknowledged", "expired", "withdrawn", "released", "trimmed")


class Commits(msgspec.Struct, frozen=True, kw_only=True):
    """Group commits of one queue: how many, their mean number of items and mean duration."""

    groups: int
    items: float
    ms: float


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading: samples by name and label values."""

    samples: Mapping[tuple[str, tuple[str, ...]], float]

    def of(self, name: str, *labels: str) -> float:
        """One sample; 0 when there is none."""
        return self.samples.get((name, labels), 0.0)

    @property
    def accepted(self) -> int:
        """Deliveries accepted so far."""
        return int(self.of("relay_deliveries_total", "accepted"))

    @property
    def waiting(self) -> int:
        """Deliveries that wait."""
        return int(self.of("relay_deliveries_waiting"))

    @property
    def ended(self) -> dict[str, int]:
        """Deliveries that came to an end, by outcome."""
        return {name: int(self.of("relay_deliveries_total", name)) for name in _OUTCOMES}

    def commits_since(self, before: Scrape) -> dict[str, Commits]:
        """The group commits since another reading, by queue."""
        found = {}
        for name, labels in self.samples:
            if name != "relay_commit_batch_size_count":
                continue

            def grown(part: str, labels: tuple[str, ...] = labels) -> float:
                return self.of(f"relay_commit_{part}", *labels) - before.of(f"relay_commit_{part}", *labels)

            groups = int(grown("batch_size_count"))
            if groups:
                found[labels[0]] = Commits(
                    groups=groups,
                    items=grown("batch_size_sum") / groups,
                    ms=grown("seconds_sum") / groups * 1000,
                )
        return found


async def scrape(http: aiohttp.ClientSession, url: str) -> Scrape:
    """Reads ``/metrics``. Raises aiohttp.ClientError and TimeoutError."""
    async with http.get(f"{url}/metrics", timeout=aiohttp.ClientTimeout(total=_SECONDS)) as answer:
        answer.raise_for_status()
        text = await answer.text()
    return Scrape(
        {
            (sample.name, tuple(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "le" not in sample.labels
        }
    )
