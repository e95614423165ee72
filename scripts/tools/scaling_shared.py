"""The parts of the scaling model that more machines do not divide: one channel that all nodes hear, one shard with everything
that is not a message, queries that every shard answers, and nodes that tell and confirm each other.

CPU in cores, rates a second, unless a name says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from scripts.tools.scaling_inputs import Inputs, Stage
from scripts.tools.scaling_lots import DAY, Traffic

_US: Final = 1e-6
_PRESENCE_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Shared:
    """``channel`` is the CPU of Redis for the one channel, ``redis`` that for confirmations; ``primary`` that of MongoDB for all
    control collections, ``each_shard`` that of every single shard for what all of them are asked. ``told`` are publications on the
    channel, ``misses`` the recipients that are not known, of messages and read marks, ``rounds`` the questions for them, and
    ``calls`` those of the control collections."""

    relay: float
    redis: float
    channel: float
    primary: float
    each_shard: float
    told: float
    told_all: float
    miss_share: float
    misses: float
    rounds: float
    calls: float
    confirmations: float
    counts: float

    @property
    def conversations(self) -> float:
        """Whose recipients one question asks for."""
        return self.misses / self.rounds if self.rounds else 1.0


def shared(inputs: Inputs, stage: Stage, known: Traffic, *, nodes: int, shards: int, slow: float) -> Shared:
    """What a stage takes on so many nodes and shards. What a node waits for takes ``slow`` times as long as on an idle one."""
    rate, connected = stage.messages, stage.connected
    several = nodes > 1
    arrivals = connected / inputs["session_seconds"]
    wait = inputs["control_ms"] / 1000 * slow
    marks = rate * known.live * inputs["read_share"]
    miss_share = missed(inputs, nodes, (rate + marks) / rate)
    misses = (rate + marks) * miss_share
    asked = nodes * rounds(misses / nodes, wait)
    members = known.deliveries + 1
    writes = nodes * rounds(marks / nodes, inputs["mark_ms"] / 1000)
    changes = stage.devices * inputs["changes_day"] / DAY / inputs["mean_load"]
    came = nodes * rounds(arrivals / nodes, wait)
    seen = 2 * arrivals
    looks = nodes * rounds(seen * inputs["watched_share"], _PRESENCE_SECONDS)
    reads = (
        asked * inputs["roster_calls"]
        + writes
        + came * inputs["arrival_calls"]
        + looks * inputs["presence_calls"]
        + changes
    )
    jobs = nodes * inputs["node_calls"]
    durable = writes + changes * inputs["change_calls"]
    # Who changes something reads who lives, and so does every node every two seconds.
    rows = 2 * members * misses + several * nodes * (changes + nodes / inputs["node_seconds"])
    spread = inputs["control_spread"] if shards > 1 else 1.0
    primary = (
        spread
        * _US
        * (
            (reads + jobs) * inputs["mongod_read"]
            + durable * inputs["mongod_request"]
            + rows * inputs["mongod_row"]
            + arrivals * inputs["mongod_arrival"]
        )
    )
    away = rate * (known.deliveries - known.live)
    counters = max(1.0, nodes * inputs["quota_share"])
    counts = min(away, nodes * inputs["quota_counts"], counters * stage.devices / inputs["quota_seconds"])
    probes = nodes * inputs["probes"] if shards > 1 else 0.0
    each_shard = _US * (
        (arrivals * inputs["drain_queries"] + counts + probes) * inputs["mongod_query"]
        + connected / inputs["sweep_seconds"] * inputs["sweep_key"]
    )
    # Every node tells all others who has come and gone, and what has changed, once for each group of that.
    told = nodes * min((seen + changes) / nodes, 1000 / inputs["redis_round_ms"]) if several else 0.0
    told_all = told * inputs["presence_told"]
    confirmations = changes * (nodes - 1) * inputs["confirm_share"]
    relay = _US * (
        (reads + durable + counts + probes * shards + arrivals * inputs["drain_queries"])
        * inputs["relay_read"]
        + rows * inputs["relay_row"]
        + nodes * told_all * inputs["relay_told"]
        + confirmations * inputs["relay_confirmation"]
    )
    return Shared(
        relay=relay,
        redis=_US * confirmations * inputs["redis_confirmation"],
        channel=_US * told_all * nodes * inputs["redis_told"],
        primary=primary,
        each_shard=each_shard,
        told=told,
        told_all=told_all * nodes,
        miss_share=miss_share,
        misses=misses,
        rounds=asked,
        calls=reads + jobs + durable,
        confirmations=confirmations,
        counts=counts,
    )


def missed(inputs: Inputs, nodes: int, looked: float) -> float:
    """The share of questions for a conversation's recipients, ``looked`` for each message, that the node has no answer to. They come
    at random; an answer is good for a lease from the question that brought it."""
    elsewhere: float = (1 - 1 / nodes) ** inputs["conversation_people"]
    places = nodes * (1 - elsewhere)
    between = inputs["conversation_seconds"] * places / looked
    return 1 / (1 + inputs["lease_seconds"] / between)


def rounds(rate: float, seconds: float) -> float:
    """How many questions a second, each of which takes so long, when what comes meanwhile shares the next one."""
    if rate <= 0:
        return 0.0
    meanwhile = rate * seconds
    return rate / (meanwhile + math.exp(-meanwhile))
