"""How many nodes, shards and Redis servers a load takes, and what each of them then does.

Nodes and shards depend on each other: with more nodes and more shards each group commit is smaller, and a message costs more.
So both are raised until they suffice. What more of them do not divide (``scaling_shared``) is not planned for: it is a limit that
holds, or breaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from scripts.tools.scaling_inputs import InputError, Inputs, Observed, Stage
from scripts.tools.scaling_lots import DAY, Groups, Traffic, groups, traffic
from scripts.tools.scaling_shared import Shared, shared

MESSAGES: Final = 1500
_ROUNDS: Final = 60
_SETTLING: Final = 6
_CLOSE: Final = 0.02
_MOST_BUSY: Final = 0.9
# Of a shard's CPU for what every shard is asked.
_MOST_ASKED: Final = 0.75
_US: Final = 1e-6


UNDIVIDED: Final = ("Redis, busiest channel", "primary shard CPU", "what every shard is asked")
"""Limits that more machines do not move."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a stage takes. CPU in cores of the kind that was measured on, at the busiest; bytes; rates a second."""

    stage: Stage
    nodes: int
    shards: int
    redis: int
    deliveries: float
    send_group: float
    requests: float
    relay_us: float
    relay_cores: float
    mongod_us: float
    mongod_cores: float
    redis_cores: float
    redis_memory: float
    publications: float
    publications_each: float
    told: float
    told_all: float
    channel_cores: float
    control_calls: float
    control_cores: float
    each_shard_cores: float
    miss_share: float
    round_conversations: float
    confirmations: float
    node_connections: float
    node_memory: float
    mongo_connections: int
    device_network: float
    redis_network: float
    mongo_network: float
    kept_messages: float
    kept_disk: float
    kept_most_disk: float
    fates_disk: float
    oplog_disk: float

    limits: Mapping[str, tuple[float, int]]
    """Of each resource how many processes, replica sets, servers or machines are needed, and how many the stage has."""

    @property
    def broken(self) -> list[str]:
        """The limits that no number of machines keeps, the worst first."""
        over = {name: self.limits[name][0] / self.limits[name][1] for name in UNDIVIDED}
        return [name for name in sorted(over, key=lambda name: -over[name]) if over[name] > 1]


@dataclass(frozen=True, slots=True)
class _Load:
    relay: float
    mongod: float
    redis: float
    publications: float
    requests: float
    found: Groups
    shared: Shared


def plan(inputs: Inputs, stage: Stage) -> Plan:
    """Works a stage out. Raises InputError when no number of nodes suffices."""
    known = traffic(inputs, MESSAGES)
    nodes = shards = 1
    for _ in range(_ROUNDS):
        load = _load(inputs, stage, known, nodes, shards)
        wanted = (_nodes(inputs, stage, load), _shards(inputs, stage, known, load))
        if wanted[0] <= nodes and wanted[1] <= shards:
            return _plan(inputs, stage, known, load, nodes, shards)
        # With more of them a message costs more, so that no round goes too far.
        nodes, shards = max(nodes, wanted[0]), max(shards, wanted[1])
    raise InputError(f"{stage.name}: no number of nodes and shards suffices")


def _nodes(inputs: Inputs, stage: Stage, load: _Load) -> int:
    by_cpu = load.relay / inputs["relay_busy"]
    by_connections = stage.connected / inputs["node_connections"]
    # One more than needed may be missing without harm.
    spare = 0 if stage.connected <= inputs["node_connections"] and by_cpu <= 1 else 1
    return math.ceil(max(by_cpu, by_connections)) + spare


def _shards(inputs: Inputs, stage: Stage, known: Traffic, load: _Load) -> int:
    budget = _budget(inputs)
    # What every shard is asked leaves the less of each.
    left = max(budget - load.shared.each_shard, budget * (1 - _MOST_ASKED))
    by_cpu = load.mongod / left
    by_disk = sum(_disk(inputs, stage, known)[:2]) / inputs["shard_disk"]
    return max(1, math.ceil(max(by_cpu, by_disk)))


def _budget(inputs: Inputs) -> float:
    return inputs["shard_cores"] * inputs["mongod_busy"]


def _load(inputs: Inputs, stage: Stage, known: Traffic, nodes: int, shards: int) -> _Load:
    """A busy node takes longer for everything, and so its groups are larger, and it is less busy: both are brought together."""
    busy = 0.0
    for _ in range(_SETTLING):
        found = _loaded(inputs, stage, known, nodes, shards, 1 / (1 - busy))
        before, busy = busy, (busy + min(_MOST_BUSY, found.relay / nodes)) / 2
        if abs(busy - before) < _CLOSE:
            break
    return found


def _loaded(inputs: Inputs, stage: Stage, known: Traffic, nodes: int, shards: int, slow: float) -> _Load:
    rate, connected = stage.messages, stage.connected
    lanes = max(1, round(shards * inputs["lane_share"]))
    found = groups(inputs, known, rate=rate / nodes, nodes=nodes, lanes=lanes, slow=slow, count=MESSAGES)
    arrivals = connected / inputs["session_seconds"]
    several = nodes > 1
    # Who comes back acknowledges what has waited, all of one shard's together.
    drained = rate * (known.deliveries - known.live)
    drains = arrivals * lanes * (1 - (1 - 1 / lanes) ** (drained / arrivals)) if arrivals else 0.0
    acks = found.ack_commits + min(drains, drained) / rate
    requests = found.send_commits + acks * inputs["ack_requests"]
    more = max(0.0, known.deliveries - 1)
    beside = shared(inputs, stage, known, nodes=nodes, shards=shards, slow=slow)
    relay = beside.relay + _US * (
        rate
        * (
            inputs["relay_message"]
            + more * inputs["relay_delivery"]
            + requests * inputs["relay_request"]
            + several
            * (found.remote * inputs["relay_remote"] + found.publications * inputs["relay_publication"])
        )
        + arrivals * inputs["relay_arrival"]
        + connected * inputs["relay_idle"]
        + nodes * inputs["relay_rest"]
    )
    sharded = inputs["mongod_sharded"] if shards > 1 else 1.0
    mongod = beside.primary + _US * rate * sharded * (
        inputs["mongod_message"] + more * inputs["mongod_delivery"] + requests * inputs["mongod_request"]
    )
    redis = (
        beside.channel
        + beside.redis
        + _US
        * (
            rate * (found.publications * inputs["redis_publication"] + found.keys * inputs["redis_key"])
            + connected * inputs["redis_idle"]
        )
        if several
        else 0.0
    )
    return _Load(relay, mongod, redis, rate * found.publications * several, requests, found, beside)


def _disk(inputs: Inputs, stage: Stage, known: Traffic) -> tuple[float, float, float, float, float]:
    """Bytes of one replica: messages that wait, fates, oplog of a day, messages if nobody fetched any; and how many wait."""
    mean = stage.messages * inputs["mean_load"]
    kept = mean * known.kept_seconds
    more_names = mean * (known.kept_names - known.kept_seconds)
    messages = kept * inputs["message_disk"] + more_names * inputs["name_disk"]
    fates = mean * known.documents * inputs["fate_hours"] * 3600 * inputs["fate_disk"]
    oplog = mean * known.documents * inputs["oplog_bytes"] * inputs["oplog_hours"] * 3600
    each = (
        known.documents * inputs["message_disk"] + (known.deliveries - known.documents) * inputs["name_disk"]
    )
    most = mean * inputs["kept_days"] * DAY * each
    return messages, fates, oplog, most, kept


def _plan(inputs: Inputs, stage: Stage, known: Traffic, load: _Load, nodes: int, shards: int) -> Plan:
    rate = stage.messages
    found = load.found
    several = nodes > 1
    messages, fates, oplog, most, kept = _disk(inputs, stage, known)
    extra = max(0.0, known.live - 1)
    device = rate * (inputs["device_bytes"] + extra * inputs["device_bytes"] / 2) * inputs["transport"]
    redis = several * rate * found.copies * inputs["redis_copy"] * 2
    mongo = rate * (
        inputs["mongo_bytes"] + (inputs["replicas"] - 1) * inputs["oplog_bytes"] * known.documents
    )
    memory = inputs["node_base_mb"] * 1e6 + stage.connected / nodes * inputs["connection_kb"] * 1e3
    connections = nodes * int(inputs["mongo_pool"])
    redis_count = math.ceil(load.redis / inputs["redis_busy"]) if several else 0
    machines = math.ceil(nodes / inputs["machine_cores"])
    beside, budget = load.shared, _budget(inputs)
    control = min(inputs["control_shards"], shards)
    mongod_cores = load.mongod + shards * beside.each_shard
    limits = {
        "relay CPU": (load.relay / inputs["relay_busy"], nodes),
        "connections of a node": (stage.connected / inputs["node_connections"], nodes),
        "MongoDB CPU": (mongod_cores / budget, shards),
        "primary shard CPU": ((beside.primary / control + beside.each_shard) / budget, 1),
        "what every shard is asked": (beside.each_shard / (budget * _MOST_ASKED), 1),
        "MongoDB disk": ((messages + fates) / inputs["shard_disk"], shards),
        "connections to MongoDB": (connections / inputs["mongo_connections_most"], 1),
        "Redis CPU": (load.redis / inputs["redis_busy"], max(1, redis_count)),
        "Redis, busiest channel": (beside.channel / inputs["all_channels"] / inputs["redis_busy"], 1),
        "network of relays": ((device + redis + mongo) * 8 / (inputs["port_gbit"] * 1e9), machines),
    }
    return Plan(
        stage=stage,
        nodes=nodes,
        shards=shards,
        redis=redis_count,
        deliveries=rate * known.deliveries,
        send_group=1 / found.send_commits,
        requests=load.requests,
        relay_us=load.relay / rate / _US,
        relay_cores=load.relay,
        mongod_us=mongod_cores / rate / _US,
        mongod_cores=mongod_cores,
        redis_cores=load.redis,
        redis_memory=several * stage.connected * inputs["directory_bytes"],
        publications=load.publications,
        publications_each=load.publications / rate,
        told=beside.told,
        told_all=beside.told_all,
        channel_cores=beside.channel,
        control_calls=beside.calls,
        control_cores=beside.primary,
        each_shard_cores=beside.each_shard,
        miss_share=beside.miss_share,
        round_conversations=beside.conversations,
        confirmations=beside.confirmations,
        node_connections=stage.connected / nodes,
        node_memory=memory,
        mongo_connections=connections,
        device_network=device,
        redis_network=redis,
        mongo_network=mongo,
        kept_messages=kept,
        kept_disk=messages,
        kept_most_disk=most,
        fates_disk=fates,
        oplog_disk=oplog,
        limits=limits,
    )


def predicted(inputs: Inputs, observed: Observed) -> Observed:
    """What the model says of a load that was measured."""
    # The bench's hundred conversations are known but for twenty questions a second, which are in what was measured.
    here = inputs.changed(
        {"group_messages": 0, "recipient_online": 1, "conversation_seconds": 1e-6, "read_share": 0}
    )
    stage, nodes = Stage("observed", 0, 0, observed.rate), int(observed.nodes)
    slow = observed.commit_ms / inputs["commit_ms"]
    load = _loaded(here, stage, traffic(here, MESSAGES), nodes, 1, slow)
    relay = load.relay - nodes * inputs["relay_rest"] * _US
    return replace(
        observed,
        requests=load.requests,
        publications=load.publications / observed.rate,
        relay=relay / observed.rate / _US,
        mongod=(load.mongod + load.shared.each_shard) / observed.rate / _US,
    )
