"""What ``scripts/bench nodes`` can measure, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

RATES: Final = (300.0, 1000.0, 3000.0)


class Scenario(StrEnum):
    """What can be measured."""

    WORKERS = "workers"
    HOP = "hop"
    SHARDS = "shards"
    STORM = "storm"
    KILL = "kill"
    COSTS = "costs"
    IDLE = "idle"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for. ``rate`` is that of ``hop``, ``storm_rate`` of the others while devices come back; ``shards_rate`` makes the loop of
    ``shards`` open too. ``seconds`` and ``warmup`` are of each round; ``devices`` come back at once, in groups of
    ``group_devices``, to ``messages`` each, or only listen for ``idle_seconds``; ``rates`` are those of ``costs``, ``kept`` the messages
    that ``disk`` stores."""

    scenarios: Sequence[Scenario] = tuple(Scenario)
    pairs: int = 100
    window: int = 4
    size: int = 200
    rounds: int = 3
    seconds: float = 5
    warmup: float = 2
    rate: float = 1000
    shards_rate: float | None = None
    devices: int = 2000
    group_devices: int = 10
    messages: int = 5
    storm_rate: float = 300
    at_once: int = 2000
    calm: float = 8
    rates: Sequence[float] = RATES
    idle_seconds: float = 35
    kept: int = 100_000


def sizes(options: Options) -> list[int]:
    """Of the groups whose devices come back; one more in each sends."""
    return [options.group_devices + 1] * (options.devices // options.group_devices)
