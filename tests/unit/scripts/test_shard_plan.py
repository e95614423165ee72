"""What `scripts/shard` makes of a cluster that it has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from bson import MaxKey, MinKey

from models.messages import FATES, MESSAGES
from scripts.tools.shard import plan
from scripts.tools.shard.findings import findings
from scripts.tools.shard.layout import (
    HIGHEST,
    LOWEST,
    Cluster,
    Found,
    Held,
    Range,
    Shard,
    Span,
    Zoned,
    alone,
    share,
    slices,
    wanted,
)

MESSAGES_WANTED, FATES_WANTED = wanted("relay", 3600, 3600)


def shards(*names: str, draining: str = "") -> tuple[Shard, ...]:
    return tuple(Shard(name, f"{name}/host:1", (f"lane-{name}",), name == draining) for name in names)


def laid_out(ranges: Sequence[Range], *, documents: int = 0, zones: Sequence[Zoned] = ()) -> Found:
    """``messages``, sharded, with all indexes, and so many documents."""
    keys = frozenset(tuple(index.document["key"]) for index in MESSAGES_WANTED.indexes)
    owners = {one.shard for one in ranges}
    held = {name: Held(documents if name == min(owners) else 0, 0, 0) for name in owners}
    return Found(
        MESSAGES_WANTED,
        {"conversationId": 1},
        tuple(ranges),
        tuple(zones),
        held,
        dict.fromkeys(owners, keys),
    )


def cluster(messages: Found, there: Sequence[Shard], lanes: Sequence[str] | None = None) -> Cluster:
    """A cluster whose fates are as they should be for these lanes (all shards' unless named)."""
    keys = frozenset(tuple(index.document["key"]) for index in FATES_WANTED.indexes)
    names = [shard.name for shard in there] if lanes is None else lanes
    ranges, low = [], LOWEST
    for name in sorted(names):
        span = alone(name)
        ranges += [Range(Span(low, span.low), "s1"), Range(span, name)]
        low = span.high
    ranges.append(Range(Span(low, HIGHEST), "s1"))
    zones = tuple(Zoned(alone(name), f"lane-{name}") for name in names)
    fates = Found(FATES_WANTED, {"lane": 1}, tuple(ranges), zones, {}, {"s1": keys})
    return Cluster("relay", "6.0.5", "s1", tuple(there), "full", (messages, fates))


def texts(made: plan.Plan) -> list[str]:
    return [step.text for step in made.steps]


def test_a_cluster_that_is_set_up_makes_no_step_and_no_finding() -> None:
    there = shards("s1", "s2")
    found = cluster(laid_out(slices(there, 1), documents=5), there)
    assert plan.setup(found) == plan.Plan()
    assert plan.presplit(found, 1) == plan.Plan()
    assert findings(found) == []


def test_slices_are_even_and_those_of_a_shard_lie_side_by_side() -> None:
    there = shards("s1", "s2", "s3")
    assert [(one.span.low, one.shard) for one in slices(there, 2)] == [
        (MinKey(), "s1"),
        ("2aaa", "s1"),
        ("5555", "s2"),
        ("8", "s2"),
        ("aaaa", "s3"),
        ("d555", "s3"),
    ]
    assert share(one.span for one in slices(there, 2)) == 1
    assert share([Span("4", "8-"), Span("c", MaxKey())]) == 0.5


@pytest.mark.parametrize(
    ("span", "text"),
    [
        (Span(LOWEST, HIGHEST), "everything"),
        (Span(LOWEST, "8"), "below 8"),
        (Span("4", "8"), "from 4 below 8"),
        (Span("8", HIGHEST), "from 8"),
        (alone("s1"), "s1 alone"),
        (Span("s1\0", "s2"), "after s1 below s2"),
        (Span("4", "8\0"), "from 4 up to 8"),
    ],
)
def test_a_span_reads_well(span: Span, text: str) -> None:
    assert str(span) == text


def test_a_shard_s_lane_sorts_into_its_zone_alone() -> None:
    for name in ("s1", "s10", "s1-a", "s1 b", "S1", "shard-0001"):
        assert [
            other for other in ("s1", "s10", "s1-a", "s1 b", "S1", "shard-0001") if alone(name).holds(other)
        ] == [name]


def test_only_what_is_elsewhere_moves() -> None:
    there = shards("s1", "s2", "s3")
    found = cluster(laid_out(slices(there[:2], 1), documents=9), there)
    assert texts(plan.presplit(found, 1)) == [
        "move messages from 5555 below 8 from s1 to s2",
        "move messages from aaaa from s2 to s3",
    ]
    # They are told, and left to the operator: there are messages.
    assert plan.setup(found) == plan.Plan()
    assert [one.what for one in findings(found)] == ["few conversations lie on s3 (0.0%)"]


def test_a_new_shard_of_an_empty_cluster_gets_its_part_from_setup() -> None:
    there = shards("s1", "s2", "s3")
    found = cluster(laid_out(slices(there[:2], 1)), there)
    assert texts(plan.setup(found)) == [
        "move messages from 5555 below aaaa to s2",
        "move messages from aaaa to s3",
    ]


def test_an_empty_cluster_that_an_operator_has_laid_out_stays_as_it_is() -> None:
    there = shards("s1", "s2")
    ranges = [Range(Span(LOWEST, "1"), "s2"), Range(Span("1", HIGHEST), "s1")]
    assert plan.setup(cluster(laid_out(ranges), there)) == plan.Plan()
    zoned = [Zoned(Span(LOWEST, HIGHEST), "lane-s1")]
    one = [Range(Span(LOWEST, HIGHEST), "s1")]
    assert plan.setup(cluster(laid_out(one, zones=zoned), there)) == plan.Plan()


def test_a_shard_that_is_being_removed_gets_nothing_and_loses_its_lane() -> None:
    there = shards("s1", "s2", "s3", draining="s2")
    found = cluster(laid_out(slices(there, 1), documents=9), there)
    assert texts(plan.setup(found)) == ["take lane s2 of fates off zone lane-s2"]
    assert not any("to s2" in text for text in texts(plan.presplit(found, 2)))


def test_a_shard_that_is_to_be_removed_loses_its_lane_first() -> None:
    """MongoDB removes no shard that is the only one of a zone."""
    there = shards("s1", "s2")
    found = cluster(laid_out(slices(there, 1), documents=9), there)
    left = replace(found, leaving=frozenset({"s2"}))
    assert texts(plan.setup(left)) == ["take lane s2 of fates off zone lane-s2"]


def test_a_lane_in_a_zone_of_several_shards_is_a_problem_not_a_step() -> None:
    there = (Shard("s1", "", ("both",), False), Shard("s2", "", ("both", "lane-s2"), False))
    found = cluster(laid_out(slices(there, 1)), there)
    fates = replace(
        found.collection(FATES), zones=(Zoned(alone("s1"), "both"), Zoned(alone("s2"), "lane-s2"))
    )
    made = plan.setup(replace(found, collections=(found.collection(MESSAGES), fates)))
    assert made.steps == []
    assert len(made.problems) == 1
    assert "lane s1 belong to zone both" in made.problems[0]


def test_a_range_against_its_zone_is_not_presplit_and_is_found() -> None:
    there = shards("s1", "s2")
    zones = [Zoned(Span("9", "a"), "lane-s1")]
    found = cluster(laid_out(slices(there, 1), zones=zones), there)
    assert texts(plan.presplit(found, 2)) == ["split messages at 4", "split messages at c"]
    (problem,) = plan.presplit(found, 2).problems
    assert problem.startswith("messages from 9 below a belongs to zone lane-s1, and s2 is not in it")
    assert [one.what for one in findings(found)] == [
        "messages from 9 below a belongs to zone lane-s1, and is on s2"
    ]


def test_numbers_that_are_missing_plan_nothing_that_hangs_on_them() -> None:
    there = shards("s1", "s2")
    blind = replace(laid_out([Range(Span(LOWEST, HIGHEST), "s1")]), held=None, indexes={})
    found = replace(cluster(blind, there), problem="not every shard answers")
    assert plan.setup(found) == plan.Plan()
    assert [one.what for one in findings(found)] == ["not every shard answers"]
