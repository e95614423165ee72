"""How many nodes, shards and Redis servers a load takes, and what each of them then does.

Nodes and shards depend on each other: with more nodes and more shards each group commit is smaller, and a message costs more.
So both are raised until they suffice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from scripts.tools.scaling_inputs import InputError, Inputs, Observed, Stage
from scripts.tools.scaling_lots import DAY, Groups, Traffic, groups, traffic

MESSAGES: Final = 1500
_ROUNDS: Final = 60
_SETTLING: Final = 6
_CLOSE: Final = 0.02
_MOST_BUSY: Final = 0.9
_US: Final = 1e-6


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
    told_all: float
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


@dataclass(frozen=True, slots=True)
class _Load:
    relay: float
    mongod: float
    redis: float
    publications: float
    told_all: float
    requests: float
    found: Groups


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
    by_cpu = load.mongod / (inputs["shard_cores"] * inputs["mongod_busy"])
    by_disk = sum(_disk(inputs, stage, known)[:2]) / inputs["shard_disk"]
    return max(1, math.ceil(max(by_cpu, by_disk)))


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
    requests = found.send_commits + found.ack_commits * inputs["ack_requests"]
    more = max(0.0, known.live - 1)
    arrivals = connected / inputs["session_seconds"]
    several = nodes > 1
    # Every node tells all others who has come and gone, once for each group of that.
    told = nodes * min(2 * arrivals / nodes, 1000 / inputs["redis_round_ms"]) if several else 0.0
    told_all = told * inputs["presence_told"]
    relay = _US * (
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
        + nodes * (inputs["relay_rest"] + told_all * inputs["relay_told"])
    )
    sharded = inputs["mongod_sharded"] if shards > 1 else 1.0
    sweeps = connected / inputs["sweep_devices"] / inputs["sweep_seconds"]
    mongod = _US * (
        rate
        * sharded
        * (inputs["mongod_message"] + more * inputs["mongod_delivery"] + requests * inputs["mongod_request"])
        + arrivals * (inputs["mongod_arrival"] + (shards - 1) * inputs["mongod_query"])
        + sweeps * shards * inputs["sweep_devices"] * inputs["sweep_key"]
    )
    redis = (
        _US
        * (
            rate * (found.publications * inputs["redis_publication"] + found.keys * inputs["redis_key"])
            + told_all * nodes * inputs["redis_told"]
            + connected * inputs["redis_idle"]
        )
        if several
        else 0.0
    )
    return _Load(relay, mongod, redis, rate * found.publications * several, told_all, requests, found)


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
    limits = {
        "relay CPU": (load.relay / inputs["relay_busy"], nodes),
        "connections of a node": (stage.connected / inputs["node_connections"], nodes),
        "MongoDB CPU": (load.mongod / (inputs["shard_cores"] * inputs["mongod_busy"]), shards),
        "MongoDB disk": ((messages + fates) / inputs["shard_disk"], shards),
        "connections to MongoDB": (connections / inputs["mongo_connections_most"], 1),
        "Redis CPU": (load.redis / inputs["redis_busy"], max(1, redis_count)),
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
        mongod_us=load.mongod / rate / _US,
        mongod_cores=load.mongod,
        redis_cores=load.redis,
        redis_memory=several * stage.connected * inputs["directory_bytes"],
        publications=load.publications,
        publications_each=load.publications / rate,
        told_all=load.told_all * nodes,
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
    here = inputs.changed({"group_messages": 0, "recipient_online": 1})
    stage, nodes = Stage("observed", 0, 0, observed.rate), int(observed.nodes)
    slow = observed.commit_ms / inputs["commit_ms"]
    load = _loaded(here, stage, traffic(here, MESSAGES), nodes, 1, slow)
    relay = load.relay - nodes * inputs["relay_rest"] * _US
    return replace(
        observed,
        requests=load.requests,
        publications=load.publications / observed.rate,
        relay=relay / observed.rate / _US,
        mongod=load.mongod / observed.rate / _US,
    )
