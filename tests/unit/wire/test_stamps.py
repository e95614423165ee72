"""Stamps of changes, and how far a cursor may go, whatever the clocks do."""

from __future__ import annotations

import random

import pytest

from relay.wire import stamps
from relay.wire.stamps import MARGIN_SECONDS, Stamps

START = 1_800_000_000_000
HOUR = 3_600_000
MARGIN = round(MARGIN_SECONDS * 1000)


class World:
    """MongoDB's primary, whose clock is ``off``, its cluster time, and nodes that look at it now and then. All in milliseconds."""

    def __init__(self) -> None:
        self.true = START
        self.off = 0
        self.cluster = START

    def passes(self, ms: int) -> None:
        self.true += ms
        # Every write of anybody: seconds, and never back.
        self.cluster = max(self.cluster, (self.true + self.off) // 1000 * 1000)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    found = World()
    monkeypatch.setattr(stamps, "lease_time", lambda: found.true / 1000)
    monkeypatch.setattr(stamps, "wall_ms", lambda: found.true + found.off)
    monkeypatch.setattr(stamps, "wall_ns", lambda: (found.true + found.off) * 1_000_000)
    return found


def ms(one: Stamps) -> int:
    return round(one.now().timestamp() * 1000)


def test_while_nothing_is_heard_stamps_are_the_time(world: World) -> None:
    node = Stamps()
    assert (ms(node), node.settled()) == (START, START - MARGIN)
    world.off = -HOUR
    assert (ms(node), node.settled()) == (START - HOUR, START - HOUR - MARGIN)


def test_a_stamp_is_the_time_and_never_less_than_what_was_heard(world: World) -> None:
    node = Stamps()
    node.hear(START - 1000)
    assert ms(node) == START
    world.off = -HOUR
    assert ms(node) == START - 1000
    node.hear(START - 5000)
    assert ms(node) == START - 1000, "of two routers one may know less"
    world.passes(HOUR + 500)
    assert ms(node) == START + 500, "the clock has caught up"


def test_a_node_that_has_just_started_knows_after_the_margin_how_far_cursors_may_go(world: World) -> None:
    node = Stamps()
    node.hear(START)
    world.passes(MARGIN - 1)
    node.hear(world.cluster)
    assert node.settled() is None
    world.passes(1)
    assert node.settled() == START - 1


def test_what_is_remembered_is_bounded(world: World) -> None:
    node = Stamps()
    for _ in range(2000):
        world.passes(10)
        node.hear(world.cluster)
    assert len(node._heard) <= stamps._MOST_HEARD


@pytest.mark.parametrize("seed", range(20))
def test_no_change_is_stamped_below_a_cursor_that_does_not_tell_it(world: World, seed: int) -> None:
    chance = random.Random(seed)
    nodes = [Stamps() for _ in range(3)]
    for node in nodes:
        node.hear(world.cluster)
    writes: list[tuple[int, int]] = []
    most = 0
    for _ in range(3000):
        world.passes(chance.randrange(500))
        if chance.random() < 0.01:
            # Another primary, or somebody sets its clock.
            world.off = chance.choice([-HOUR, -30_000, 0, 30_000, HOUR])
        for number, node in enumerate(nodes):
            # Each looks every two seconds, and sometimes late.
            if chance.random() < 0.2:
                node.hear(world.cluster)
            if chance.random() < 0.005:
                nodes[number] = Stamps()
                nodes[number].hear(world.cluster)
        # A write is decided now, and is in the store up to five seconds later.
        writes.append((ms(chance.choice(nodes)), world.true + chance.randrange(5000)))
        landed = [stamp for stamp, at in writes if at <= world.true]
        writes = [one for one in writes if one[1] > world.true]
        assert all(stamp >= most for stamp in landed), "whoever has that cursor is never told"
        most = max(most, chance.choice(nodes).settled() or 0)
