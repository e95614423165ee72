"""The parts of the scaling model that no formula gives: groups of one commit, nodes that a group of messages goes to, and how long
messages wait. Drawn by lot from a seed, so that every run draws the same.

Times in seconds, rates a second.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scripts.tools.scaling_inputs import Inputs

SEED: Final = 2026
DAY: Final = 86_400.0
_INLINE: Final = 64
_GROUP_MOST: Final = 500
_ACKS_MOST: Final = 2000
_ACKS_EAGER: Final = 250


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a message is on average. ``deliveries`` are its recipient devices, ``live`` those that are connected; ``documents`` are
    stored for it, ``kept_seconds`` is the sum of how long each of them is kept, and ``kept_names`` that of the names awaited in it."""

    deliveries: float
    live: float
    documents: float
    kept_seconds: float
    kept_names: float
    recipients: Sequence[int]


@dataclass(frozen=True, slots=True)
class Groups:
    """What one node does for a message, on average: group commits of messages and of acknowledgements, look-ups in the directory with
    so many keys, publications, and copies of messages that go to other nodes with so many deliveries."""

    send_commits: float
    ack_commits: float
    lookups: float
    keys: float
    publications: float
    copies: float
    remote: float


def traffic(inputs: Inputs, count: int) -> Traffic:
    """Draws so many messages."""
    lot = random.Random(SEED)
    deliveries = live = documents = 0
    seconds = names = 0.0
    recipients = []
    for _ in range(count):
        size = _recipients(lot, inputs)
        deliveries += size
        online = 0
        for start in range(0, size, _INLINE):
            part = min(_INLINE, size - start)
            documents += 1
            longest, waiting = 0.0, 0.0
            for _ in range(part):
                if lot.random() < inputs["recipient_online"]:
                    online += 1
                    continue
                wait = _wait(lot, inputs)
                longest = max(longest, wait)
                waiting += wait
            seconds += longest
            names += waiting
        live += online
        recipients.append(online)
    return Traffic(
        deliveries=deliveries / count,
        live=live / count,
        documents=documents / count,
        kept_seconds=seconds / count,
        kept_names=names / count,
        recipients=recipients,
    )


def _recipients(lot: random.Random, inputs: Inputs) -> int:
    if lot.random() >= inputs["group_messages"]:
        return 1
    drawn = lot.lognormvariate(0, inputs["group_sigma"]) * inputs["group_median"]
    return max(2, min(round(drawn), int(inputs["group_most"])))


def _wait(lot: random.Random, inputs: Inputs) -> float:
    longest = inputs["kept_days"] * DAY
    if lot.random() < inputs["never_fetched"]:
        return longest
    hours = lot.lognormvariate(0, inputs["away_sigma"]) * inputs["away_median_hours"]
    return min(longest, hours * 3600)


def groups(
    inputs: Inputs, known: Traffic, *, rate: float, nodes: int, lanes: int, slow: float, count: int
) -> Groups:
    """One node that stores ``rate`` messages a second in ``lanes``, for ``count`` messages; recipients are at any of ``nodes``. What it
    waits for takes ``slow`` times as long as on an idle one."""
    lot = random.Random(SEED + 1)
    times = _poisson(lot, rate, count)
    by_lane: list[list[int]] = [[] for _ in range(lanes)]
    for number in range(count):
        by_lane[int(lot.random() * lanes)].append(number)
    committed: list[tuple[float, list[int]]] = []
    for its in by_lane:
        committed += _commits(times, its, inputs["commit_ms"] / 1000 * slow, inputs["send_spacing_ms"] / 1000)
    targets = [
        [int(lot.random() * nodes) for _ in range(known.recipients[number % len(known.recipients)])]
        for number in range(count)
    ]
    lookups = keys = publications = copies = remote = 0
    for members in _gathers(committed, inputs["redis_round_ms"] / 1000 * slow):
        reached: set[int] = set()
        away = False
        for number in members:
            others = [node for node in targets[number] if node]
            # Whoever is connected here is not looked up; whoever is away is.
            absent = round(known.deliveries - known.live)
            keys += len(others) + absent
            away = away or bool(others) or absent > 0
            copies += len(set(others))
            remote += len(others)
            reached.update(others)
        lookups += away
        publications += len(reached)
    acks = max(1, round(count * known.live))
    receipts = _receipts(lot, inputs, rate * known.live, nodes, acks)
    return Groups(
        send_commits=len(committed) / count,
        ack_commits=_acks(lot, inputs, rate * known.live, lanes, acks) / count,
        lookups=lookups / count + receipts[0] / count,
        keys=keys / count + known.live,
        publications=publications / count + receipts[1] / count,
        copies=copies / count,
        remote=remote / count,
    )


def _poisson(lot: random.Random, rate: float, count: int) -> list[float]:
    now, times = 0.0, []
    for _ in range(count):
        now += lot.expovariate(rate)
        times.append(now)
    return times


def _commits(
    times: Sequence[float], its: Sequence[int], busy: float, spacing: float
) -> list[tuple[float, list[int]]]:
    """One lane, one commit under way: what comes meanwhile is the next group. When each is done, and what is in it."""
    done: list[tuple[float, list[int]]] = []
    free, place = 0.0, 0
    while place < len(its):
        begins = max(times[its[place]], free)
        group: list[int] = []
        while place < len(its) and times[its[place]] <= begins and len(group) < _GROUP_MOST:
            group.append(its[place])
            place += 1
        done.append((begins + busy, group))
        free = begins + max(busy, spacing)
    return done


def _gathers(committed: list[tuple[float, list[int]]], busy: float) -> list[list[int]]:
    """What a node tells others together: what was committed while the last was on its way."""
    found: list[list[int]] = []
    free, place = 0.0, 0
    committed = sorted(committed)
    while place < len(committed):
        begins = max(committed[place][0], free)
        members: list[int] = []
        while place < len(committed) and committed[place][0] <= begins:
            members += committed[place][1]
            place += 1
        found.append(members)
        free = begins + busy
    return found


def _acks(lot: random.Random, inputs: Inputs, rate: float, lanes: int, count: int) -> int:
    """Groups of acknowledgements: they start some time apart, unless many wait."""
    spacing = inputs["ack_spacing_ms"] / 1000
    by_lane: list[list[float]] = [[] for _ in range(lanes)]
    for moment in _poisson(lot, rate, count):
        by_lane[int(lot.random() * lanes)].append(moment)
    found = 0
    for times in by_lane:
        free, place = 0.0, 0
        while place < len(times):
            begins = max(times[place], free)
            many = place + _ACKS_EAGER
            if many < len(times):
                begins = min(begins, max(times[place], times[many]))
            taken = 0
            while place < len(times) and times[place] <= begins and taken < _ACKS_MOST:
                place += 1
                taken += 1
            found += 1
            free = begins + spacing
    return found


def _receipts(lot: random.Random, inputs: Inputs, rate: float, nodes: int, count: int) -> tuple[int, int]:
    """Receipts are gathered for a while: look-ups, and publications to the nodes of those whose messages arrived."""
    window = inputs["receipts_ms"] / 1000
    by_window: dict[int, set[int]] = {}
    for moment in _poisson(lot, rate, count):
        by_window.setdefault(int(moment / window), set()).add(int(lot.random() * nodes))
    return len(by_window), sum(len(reached - {0}) for reached in by_window.values())
