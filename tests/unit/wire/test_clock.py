"""The order of messages."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from relay.wire.clock import MAX_AHEAD_MS, SEQ_BITS, SEQ_LIMIT, Clock, lease_time, wall_ms

CENTURY = 4_102_444_800_000
moments = st.integers(1, CENTURY)


@given(walls=st.lists(moments, min_size=1, max_size=50))
def test_the_clock_rises_strictly_even_when_the_wall_clock_steps_back(walls: list[int]) -> None:
    rest = iter(walls)
    clock = Clock(lambda: next(rest))
    made = [clock.next() for _ in walls]
    assert made == sorted(set(made))
    assert made[-1] >= max(walls) << SEQ_BITS


@given(wall=moments, count=st.integers(1, 3000))
def test_many_messages_in_one_millisecond_keep_their_order(wall: int, count: int) -> None:
    clock = Clock(lambda: wall)
    made = [clock.next() for _ in range(count)]
    assert made == list(range(made[0], made[0] + count))


@given(floors=st.lists(st.integers(0, SEQ_LIMIT - 1), max_size=20), wall=moments)
def test_a_floor_is_kept_and_does_not_move_the_clock(floors: list[int], wall: int) -> None:
    clock = Clock(lambda: wall)
    for number, floor in enumerate(floors):
        own = (wall << SEQ_BITS) + number
        assert clock.next(floor) == max(own, floor)
    assert clock.next() == (wall << SEQ_BITS) + len(floors)


def test_a_seq_fits_a_javascript_number_until_the_end_of_the_century() -> None:
    clock = Clock(lambda: CENTURY)
    assert clock.next() < SEQ_LIMIT
    assert int(float(clock.next())) < SEQ_LIMIT


def test_more_than_two_hours_ahead_is_too_far() -> None:
    clock = Clock(lambda: 1_000_000)
    edge = (1_000_000 + MAX_AHEAD_MS) << SEQ_BITS
    assert not clock.too_far_ahead(edge)
    assert clock.too_far_ahead(edge + 1)
    assert not clock.too_far_ahead(0)


def test_the_wall_clock_is_in_milliseconds() -> None:
    before = time.time()
    assert before * 1000 - 1 <= wall_ms() <= time.time() * 1000 + 1
    assert abs(Clock().now() - wall_ms()) < 1000


def test_a_lease_runs_out_in_the_sleep_of_the_machine() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= lease_time() <= time.clock_gettime(time.CLOCK_BOOTTIME)
