"""What is to be done, worked out from how the cluster is: nothing here touches it. What is as it should be makes no step.

``messages`` has no zones: they would keep the balancer from evening out what has become uneven. The zone of a lane holds that one
value alone, so that a shard that is added later never cuts into the zone of another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from models.messages import FATES, MESSAGES
from scripts.tools.shard.layout import (
    HIGHEST,
    LANE_ZONE,
    LOWEST,
    Cluster,
    Found,
    Range,
    Shard,
    Span,
    Wanted,
    alone,
    order,
    slices,
)
from scripts.tools.shard.router import Router, Say

_EVERYTHING = Span(LOWEST, HIGHEST)


@dataclass(frozen=True, slots=True)
class Step:
    """One change: what it is, for people, and how it is made; ``moves`` is what changes its shard. Doing it again changes
    nothing."""

    text: str
    do: Callable[[Router, Say], None]
    moves: Span | None = None


@dataclass(slots=True)
class Plan:
    """Steps in order, and what they cannot put right."""

    steps: list[Step] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, text: str, do: Callable[[Router, Say], None], moves: Span | None = None) -> None:
        """One more step."""
        self.steps.append(Step(text, do, moves))


def setup(cluster: Cluster) -> Plan:
    """From whatever there is to a cluster that is ready for the relay."""
    plan = Plan()
    if cluster.primary is None:
        plan.add(f"make database {cluster.database}", lambda router, _: router.create_database())
    for found in cluster.collections:
        if found.key is not None and not found.is_right:
            plan.problems.append(
                f"{found.wanted.namespace} is sharded by {', '.join(found.key)}, not by {found.wanted.field} alone; "
                "reshardCollection (MongoDB's manual) changes that"
            )
            continue
        _add_indexes(plan, found)
        if found.wanted.name == FATES:
            _add_zones(plan, cluster, found)
        if found.key is None:
            _add_sharding(plan, found)
        if found.wanted.name == FATES:
            _add_lanes(plan, cluster, found)
        elif found.wanted.spread:
            _add_spreading(plan, cluster, found)
    return plan


def presplit(cluster: Cluster, each: int) -> Plan:
    """``messages`` in equal ranges, ``each`` for every shard."""
    plan, found = Plan(), cluster.collection(MESSAGES)
    bounds = {order(one.span.low) for one in found.ranges}
    for part in slices(cluster.takers, 1):
        against = against_zone(cluster, found, part.span, part.shard)
        if against is not None:
            plan.problems.append(against)
            continue
        for piece in found.owners(part.span):
            if piece.shard != part.shard:
                _add_move(plan, found.wanted, piece, part.shard)
                bounds |= {order(piece.span.low), order(piece.span.high)}
    for part in slices(cluster.takers, each)[1:]:
        if order(part.span.low) not in bounds:
            _add_split(plan, found.wanted, part.span.low)
    return plan


def against_zone(cluster: Cluster, found: Found, span: Span, shard: str) -> str | None:
    """Why a span must not lie on a shard: the balancer would take it away again. None when it may."""
    for zoned in found.zones:
        common = zoned.span.common(span)
        if common is not None and shard not in cluster.in_zone(zoned.zone):
            return (
                f"{found.wanted.name} {common} belongs to zone {zoned.zone}, and {shard} is not in it: the balancer would move it "
                "away again. Change the zone first (sh.removeRangeFromZone() or sh.addShardToZone() in mongosh)"
            )
    return None


def lane_zone(shard: str) -> str:
    """The zone of a shard's lane."""
    return LANE_ZONE + shard


def _add_indexes(plan: Plan, found: Found) -> None:
    what, missing = found.wanted, found.without_indexes()
    if missing and found.held is not None:
        names = ", ".join(index.document["name"] for index in missing)
        plan.add(
            f"make {'index' if len(missing) == 1 else f'{len(missing)} indexes'} of {what.name}: {names}",
            lambda router, _: router.create_indexes(what, missing),
        )


def _add_sharding(plan: Plan, found: Found) -> None:
    what = found.wanted
    plan.add(f"shard {what.namespace} by {what.field}", lambda router, _: router.shard_collection(what))


def _add_zones(plan: Plan, cluster: Cluster, found: Found) -> None:
    what = found.wanted
    for shard in cluster.takers:
        lane, zone = shard.name, lane_zone(shard.name)
        there = next((zoned.zone for zoned in found.zones if zoned.span.holds(lane)), None)
        if there is None or there == zone:
            if there is None or zone not in shard.zones:
                _add_zone(plan, what, shard)
        elif cluster.in_zone(there) != {lane}:
            plan.problems.append(
                f"{what.name} of lane {lane} belong to zone {there}, which is not that shard's alone; "
                "take the range off it (sh.removeRangeFromZone() in mongosh), then run this again"
            )
    live = {shard.name for shard in cluster.takers}
    for zoned in found.zones:
        lane = zoned.zone.removeprefix(LANE_ZONE)
        if zoned.zone.startswith(LANE_ZONE) and zoned.span == alone(lane) and lane not in live:
            plan.add(
                f"take lane {lane} of {what.name} off zone {zoned.zone}",
                partial(_take_off, what, lane),
            )


def _add_zone(plan: Plan, what: Wanted, shard: Shard) -> None:
    zone = lane_zone(shard.name)

    def do(router: Router, _: Say) -> None:
        router.add_to_zone(shard.name, zone)
        router.zone(what, alone(shard.name), zone)

    plan.add(f"give lane {shard.name} of {what.name} to shard {shard.name}, by zone {zone}", do)


def _take_off(what: Wanted, lane: str, router: Router, _: Say) -> None:
    router.zone(what, alone(lane), None)


def _add_lanes(plan: Plan, cluster: Cluster, found: Found) -> None:
    if found.key is None and not found.documents:
        # An empty collection is laid out by its zones.
        return
    for shard in cluster.takers:
        span = alone(shard.name)
        away = [one for one in _owners(found, cluster, span) if one.shard != shard.name]
        if away and against_zone(cluster, found, span, shard.name) is None:
            _add_move(plan, found.wanted, Range(span, away[0].shard), shard.name)


def _add_spreading(plan: Plan, cluster: Cluster, found: Found) -> None:
    """An empty collection begins on every shard. One that an operator or a zone has laid out stays as it is."""
    ranges = _owners(found, cluster, _EVERYTHING)
    if (
        found.documents != 0
        or found.zones
        or {shard.name for shard in cluster.takers} <= {one.shard for one in ranges}
    ):
        return
    for part in slices(cluster.takers, 1):
        if any(one.shard != part.shard for one in _owners(found, cluster, part.span)):
            _add_move(plan, found.wanted, Range(part.span, ""), part.shard)


def _owners(found: Found, cluster: Cluster, span: Span) -> list[Range]:
    """Where a span lies, or will when the collection has been sharded: then all of it on the primary shard."""
    return found.owners(span) if found.key is not None else [Range(span, cluster.primary or "")]


def _add_move(plan: Plan, what: Wanted, piece: Range, shard: str) -> None:
    origin = f" from {piece.shard}" if piece.shard else ""
    lane = what.name == FATES and piece.span == alone(shard)
    text = f"lane {shard} of {what.name}" if lane else f"{what.name} {piece.span}"

    def do(router: Router, say: Say) -> None:
        router.place(what, piece.span, shard, say=say)

    plan.add(f"move {text}{origin} to {shard}", do, piece.span)


def _add_split(plan: Plan, what: Wanted, at: str) -> None:
    plan.add(f"split {what.name} at {at}", lambda router, _: router.split(what, at))
