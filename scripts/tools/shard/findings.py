"""What is not as it should be on a sharded cluster, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from models.messages import FATES, MESSAGES
from scripts.tools.shard import plan
from scripts.tools.shard.layout import LANE_ZONE, Cluster, Found, share

_SETUP: Final = "scripts/shard setup --apply"
_FEW: Final = 2
# Of an even share.
_LITTLE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Finding:
    """``wrong``: it needs somebody; otherwise it is good to know."""

    wrong: bool
    what: str
    do: str


def findings(cluster: Cluster) -> list[Finding]:
    """What there is to say, the worst first."""
    return sorted(_all(cluster), key=lambda one: not one.wrong)


def _all(cluster: Cluster) -> Iterator[Finding]:
    if cluster.problem is not None:
        yield Finding(True, cluster.problem, "look at the shards; numbers and indexes are missing here")
    todo = plan.setup(cluster)
    if todo.steps:
        more = len(todo.steps) - _FEW
        steps = "; ".join(step.text for step in todo.steps[:_FEW]) + (
            f"; and {more} more" if more > 0 else ""
        )
        yield Finding(True, f"setup is not complete: {steps}", _SETUP)
    for problem in todo.problems:
        what, _, do = problem.partition("; ")
        yield Finding(True, what, do)
    for found in cluster.collections:
        yield from _misplaced(cluster, found)
        if not found.balanced:
            yield Finding(
                False,
                f"the balancer leaves {found.wanted.name} alone",
                f"sh.enableBalancing('{found.wanted.namespace}') in mongosh, unless you want it so",
            )
    yield from _idle(cluster)
    for shard in cluster.shards:
        if shard.draining:
            yield Finding(
                False,
                f"{shard.name} is being removed",
                "the balancer must be on; run removeShard again until it says completed",
            )
    if cluster.balancer == "off":
        yield Finding(
            False,
            "the balancer is off: no range moves by itself, and no shard can be removed",
            "sh.startBalancer() in mongosh, unless you want it so",
        )


def _misplaced(cluster: Cluster, found: Found) -> Iterator[Finding]:
    mine = {shard.name for shard in cluster.takers}
    for zoned in found.zones:
        inside = cluster.in_zone(zoned.zone)
        if found.wanted.name == FATES and zoned.zone.startswith(LANE_ZONE) and inside & mine:
            # Its lane is setup's to place.
            continue
        away = {one.shard for one in found.owners(zoned.span)} - inside
        if away:
            yield Finding(
                True,
                f"{found.wanted.name} {zoned.span} belongs to zone {zoned.zone}, and is on {', '.join(sorted(away))}",
                "the balancer moves it when it is on; or scripts/shard move"
                if found.wanted.name == MESSAGES
                else "the balancer moves it when it is on",
            )
    jumbo = [one for one in found.ranges if one.jumbo]
    if jumbo:
        yield Finding(
            True,
            f"{len(jumbo)} ranges of {found.wanted.name} are too large for the balancer, the first {jumbo[0].span}",
            "split them (sh.splitFind() in mongosh); one conversation cannot be split",
        )


def _idle(cluster: Cluster) -> Iterator[Finding]:
    found = cluster.collection(MESSAGES)
    if not found.is_right or not found.documents:
        return
    parts = {
        shard.name: share(one.span for one in found.ranges if one.shard == shard.name)
        for shard in cluster.takers
    }
    little = [name for name, part in parts.items() if part < _LITTLE / len(parts)]
    if little:
        shares = ", ".join(f"{name} ({parts[name]:.1%})" for name in little)
        yield Finding(
            any(not parts[name] for name in little),
            f"few conversations lie on {shares}",
            "scripts/shard presplit evens it out, and says first what it would move; or leave it to the balancer, "
            "which moves data when there is much of it",
        )
