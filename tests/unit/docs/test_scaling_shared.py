"""What more machines do not divide: against figures worked out by hand, and against the relay's own code."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from relay.routing import gathering, hints, quotas
from relay.routing.directory import Line
from relay.store import audience, peers
from scripts.tools.scaling_inputs import Inputs, Stage, load
from scripts.tools.scaling_lots import Traffic
from scripts.tools.scaling_model import plan
from scripts.tools.scaling_shared import Shared, missed, rounds, shared

pytestmark = pytest.mark.timeout(600)

TINY = Stage("tiny", devices=864_000, connected=6_000, messages=100)
# Each message to two devices, one of which is connected.
PLAIN = Traffic(deliveries=2, live=1, documents=1, kept_seconds=0, kept_names=0, recipients=[1])
# Round figures, so that what follows can be worked out on paper.
BY_HAND: Mapping[str, float] = {
    "session_seconds": 600,
    "mean_load": 1,
    "changes_day": 1,
    "read_share": 0,
    "watched_share": 0,
    "conversation_people": 1,
    "conversation_seconds": 5,
    "lease_seconds": 5,
    "roster_calls": 5,
    "control_ms": 0,
    "arrival_calls": 4,
    "node_calls": 3,
    "node_seconds": 2,
    "change_calls": 2,
    "drain_queries": 2,
    "quota_counts": 0,
    "probes": 1,
    "sweep_key": 2,
    "sweep_seconds": 30,
    "redis_told": 2,
    "mongod_read": 200,
    "mongod_request": 500,
    "mongod_row": 5,
    "mongod_arrival": 100,
    "mongod_query": 100,
    "redis_confirmation": 50,
}


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return load()


def tiny(inputs: Inputs, nodes: int = 10, shards: int = 1, **figures: float) -> Shared:
    changed = inputs.changed({**BY_HAND, **figures})
    return shared(changed, TINY, PLAIN, nodes=nodes, shards=shards, slow=1)


# Worked out by hand


def test_the_channel_of_all_nodes_hands_every_coming_and_going_to_every_node(inputs: Inputs) -> None:
    # 6,000 devices for ten minutes each: 10 come and 10 go a second, and 10 of 864,000 changes of a day; ten nodes hear each.
    found = tiny(inputs)
    assert found.told == pytest.approx(30)
    assert found.told_all == pytest.approx(300)
    assert found.channel == pytest.approx(300 * 2e-6)


def test_two_million_handed_out_a_second_are_four_cores_of_one_server(inputs: Inputs) -> None:
    stage = Stage("10 M", 10_000_000, 1_000_000, 100_000)
    found = shared(inputs.changed({"changes_day": 0}), stage, PLAIN, nodes=588, shards=25, slow=1)
    # 2 × 1,000,000 ÷ 600 s × 588 nodes.
    assert found.told_all == pytest.approx(1_960_000)
    assert found.channel == pytest.approx(3.92)


def test_a_change_is_confirmed_by_every_other_node(inputs: Inputs) -> None:
    found = tiny(inputs)
    assert found.confirmations == pytest.approx(10 * 9)
    assert found.redis == pytest.approx(90 * 50e-6)
    assert tiny(inputs, nodes=1).confirmations == 0


def test_the_primary_shard_carries_rosters_arrivals_changes_and_nodes(inputs: Inputs) -> None:
    # Half of 100 messages/s find no recipients: a lease lasts as long as the mean time between two messages.
    found = tiny(inputs)
    assert found.miss_share == pytest.approx(0.5)
    assert found.rounds == pytest.approx(50)
    # Rosters 50 × 5, arrivals 10 × 4, nodes 10 × 3, who lives for 10 changes; 10 × 2 durable writes.
    reads, durable = 250 + 40 + 30 + 10, 20
    assert found.calls == pytest.approx(reads + durable)
    # Three members of each conversation, each a membership and a device; ten nodes for each change, and for each node twice a second.
    rows = 50 * 3 * 2 + 10 * 10 + 10 * 10 / 2
    assert found.primary == pytest.approx((reads * 200 + durable * 500 + rows * 5 + 10 * 100) * 1e-6)


def test_what_all_shards_are_asked_is_not_less_for_each_when_there_are_more(inputs: Inputs) -> None:
    # 10 arrivals with two questions each, a probe of each node, and 6,000 devices swept in half a minute.
    by_hand = ((10 * 2 + 10) * 100 + 200 * 2) * 1e-6
    assert tiny(inputs, shards=2).each_shard == pytest.approx(by_hand)
    assert tiny(inputs, shards=200).each_shard == pytest.approx(by_hand)


def test_mailboxes_are_counted_as_often_as_nodes_send_to_them_until_their_time_is_used_up(
    inputs: Inputs,
) -> None:
    # 100 deliveries/s to who is away.
    assert tiny(inputs, quota_counts=50).counts == pytest.approx(100)
    assert tiny(inputs, quota_counts=4).counts == pytest.approx(40)
    assert tiny(inputs, quota_counts=50, quota_share=0, quota_seconds=86_400).counts == pytest.approx(10)


@pytest.mark.parametrize(
    ("rate", "asked", "each"), [(0.001, 0.001, 1.0), (10_000, 250, 40), (250, 250 / (1 + math.exp(-1)), 1.37)]
)
def test_what_comes_during_a_question_shares_the_next(rate: float, asked: float, each: float) -> None:
    found = rounds(rate, 0.004)
    assert found == pytest.approx(asked, rel=0.01)
    assert rate / found == pytest.approx(each, rel=0.01)


# How it grows


def test_recipients_are_known_less_often_with_more_nodes_and_more_often_with_longer_leases(
    inputs: Inputs,
) -> None:
    shares = [missed(inputs, nodes, 1.5) for nodes in (1, 2, 10, 100, 1000)]
    assert shares == sorted(shares)
    longer = [missed(inputs.changed({"lease_seconds": lease}), 100, 1.5) for lease in (5, 60, 300)]
    assert longer == sorted(longer, reverse=True)
    # Two people at a thousand nodes are hardly ever at the same one: each is alone with their lease.
    alone = missed(inputs.changed({"conversation_people": 1}), 1, 0.75)
    assert shares[-1] == pytest.approx(alone, rel=0.01)


def test_everything_shared_grows_with_the_nodes(inputs: Inputs) -> None:
    stage = inputs.stages[-1]
    found = [
        shared(inputs, stage, PLAIN, nodes=nodes, shards=20, slow=1) for nodes in (2, 20, 200, 600, 2000)
    ]
    for name in ("channel", "redis", "primary", "each_shard", "calls", "confirmations", "relay"):
        values = [getattr(one, name) for one in found]
        assert values == sorted(values), name
        assert values[-1] > values[0], name


# What the page claims


def test_a_million_devices_are_too_many_for_one_primary_shard_and_half_a_million_are_not(
    inputs: Inputs,
) -> None:
    assert plan(inputs, Stage("500 k", 500_000, 50_000, 5_000)).broken == []
    assert plan(inputs, Stage("1 M", 1_000_000, 100_000, 10_000)).broken == ["primary shard CPU"]


def test_one_channel_is_too_little_from_three_million_devices_on(inputs: Inputs) -> None:
    two, three = (plan(inputs, Stage("", size, size // 10, size / 100)) for size in (2_000_000, 3_000_000))
    assert "Redis, busiest channel" not in two.broken
    assert "Redis, busiest channel" in three.broken


def test_ten_million_are_carried_by_what_the_page_names_and_not_without_a_part_of_it(inputs: Inputs) -> None:
    last = inputs.stages[-1]
    (lever,) = (one for one in inputs.levers if one.carries)
    assert not lever.built
    assert plan(inputs.pulled(lever), last).broken == []
    for missing, broken in (
        (("all_channels", "presence_told"), ["Redis, busiest channel"]),
        (("lease_seconds",), ["primary shard CPU"]),
        (("control_shards", "control_spread"), ["primary shard CPU"]),
        (("quota_share", "quota_seconds"), ["what every shard is asked", "primary shard CPU"]),
    ):
        without = inputs.pulled(lever).changed({name: inputs[name] for name in missing})
        assert plan(without, last).broken == broken, missing


# What the relay does


def test_the_figures_of_the_relay_are_those_in_its_code(inputs: Inputs) -> None:
    assert inputs["lease_seconds"] == audience.LEASE_SECONDS
    assert inputs["quota_counts"] == pytest.approx(2 * quotas._ROUND_SECONDS / 0.003, rel=0.01)
    assert inputs["quota_seconds"] == quotas._FAR_BELOW_SECONDS
    assert inputs["node_seconds"] == peers.BEAT_SECONDS
    assert [
        inputs[name] for name in ("all_channels", "control_shards", "confirm_share", "presence_told")
    ] == [1] * 4


def test_one_channel_carries_who_came_and_went_and_that_of_a_node_what_is_for_its_devices() -> None:
    gathered = gathering.Gathered()
    gathered.seen["ann"] = 1
    gathered.for_all += [
        hints.Recheck(["ann"]),
        hints.Ended("ann/phone"),
        hints.Changed("here", 1, ["c"], []),
    ]
    gathered.released.append(("c m", "bob/phone"))
    gathered.told.append(hints.Told("receipt", "{}", ["bob"]))
    gathered.for_node.append(("there", hints.Confirmed("here", [1])))
    nodes, everybody = gathered.sort({"bob": [Line("phone", "there", 1, silent=False)]}, "here")
    assert {type(hint) for hint in everybody} == {hints.Seen, hints.Recheck, hints.Ended, hints.Changed}
    assert {type(hint) for hint in nodes["there"]} == {hints.Released, hints.Told, hints.Confirmed}
