"""Nodes go by MongoDB's clock: what a node makes of its answers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from relay.store import timekeeping
from relay.store.timekeeping import READINGS, Reading, Timekeeper
from relay.wire import clock as wire_clock
from relay.wire.clock import Clock, steady_ns, steer, utc_now, wall_ms, wall_ns, wall_seconds

MS = 1_000_000
SECOND = 1000 * MS
HOUR = 3600 * SECOND
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
START = 1_800_000_000 * SECOND


class World:
    """True time, which is MongoDB's unless ``mongodb`` says otherwise, and a machine whose wall clock is ``off``."""

    def __init__(self, *, off: int = 0) -> None:
        self.true = START
        self.booted = START - 12_345_678_901_234
        self.off = off
        self.mongodb = 0
        self.steered: int | None = None
        self.keeper = Timekeeper(wall=lambda: self.true + self.off, steady=self.steady)

    def steady(self) -> int:
        return self.true - self.booted

    def asks(self, there: int = MS, back: int = MS, *, odd: int = 0) -> Reading:
        """One question to MongoDB: so long on its way there and back. ``odd``: another server answers."""
        asked = self.steady()
        self.true += there
        told = (self.true + self.mongodb + odd) // MS
        self.true += back
        return Reading.of(told, asked, self.steady())

    def checks(self, times: int = 1, there: int = MS, back: int = MS, *, odd: int = 0) -> None:
        for _ in range(times):
            self.true += 2 * SECOND
            self.keeper.take(self.asks(there, back, odd=odd))

    @property
    def error(self) -> int:
        """How wrong the time is that this process tells, in nanoseconds."""
        assert self.steered is not None
        return self.steady() + self.steered - self.true


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> World:
    return made(monkeypatch)


def made(monkeypatch: pytest.MonkeyPatch, *, off: int = 0) -> World:
    world = World(off=off)
    monkeypatch.setattr(timekeeping, "steer", lambda ahead: setattr(world, "steered", ahead))
    return world


@pytest.mark.parametrize("off", [HOUR, -HOUR, 3 * SECOND, -300 * MS])
def test_a_machine_whose_clock_is_off_tells_mongodbs_time_from_its_first_readings(
    monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    world = made(monkeypatch, off=off)
    world.keeper.take(*(world.asks() for _ in range(READINGS)))
    assert abs(world.error) <= 2 * MS
    assert world.keeper.offset == pytest.approx(off / SECOND, abs=0.002)
    world.checks(10)
    assert abs(world.error) <= 2 * MS


def test_a_clock_that_ntp_keeps_is_left_alone(machine: World) -> None:
    machine.off = 40 * MS
    machine.checks(3)
    assert machine.error == 40 * MS
    machine.off = -60 * MS
    machine.checks()
    assert machine.error == -60 * MS
    assert machine.keeper.problem is None


def test_a_difference_that_the_network_may_have_made_is_none(machine: World) -> None:
    machine.off = 400 * MS
    machine.checks(READINGS, there=500 * MS, back=500 * MS)
    assert machine.error == 400 * MS
    # A quick answer says more.
    machine.checks()
    assert abs(machine.error) <= 2 * MS


def test_what_is_corrected_stays_so_while_answers_are_slow(machine: World) -> None:
    machine.off = 400 * MS
    machine.checks()
    machine.checks(3 * READINGS, there=900 * MS, back=MS)
    assert abs(machine.error) <= 2 * MS


def test_an_answer_that_was_long_on_its_way_back_moves_nothing(machine: World) -> None:
    machine.off = HOUR
    machine.checks()
    machine.checks(2, back=1500 * MS)
    assert abs(machine.error) <= 2 * MS


@pytest.mark.parametrize("off", [0, HOUR])
def test_one_odd_reading_moves_nothing(monkeypatch: pytest.MonkeyPatch, off: int) -> None:
    world = made(monkeypatch, off=off)
    world.checks(READINGS)
    for _ in range(20):
        world.checks(odd=HOUR)
        assert abs(world.error) <= 2 * MS
        world.checks(odd=-HOUR)
        assert abs(world.error) <= 2 * MS
        world.checks()


def test_of_the_first_readings_most_decide(machine: World) -> None:
    machine.off = HOUR
    machine.keeper.take(
        machine.asks(odd=-HOUR),
        machine.asks(),
        machine.asks(odd=HOUR),
        machine.asks(),
        machine.asks(odd=HOUR),
    )
    assert abs(machine.error) <= 2 * MS


def test_a_primary_with_another_clock_is_followed_after_a_few_readings_and_told_of(machine: World) -> None:
    machine.checks(READINGS)
    machine.mongodb = 30 * SECOND
    with capture_logs() as logs:
        machine.checks(READINGS - 1)
        assert machine.error == 0
        machine.checks()
    assert abs(machine.error - 30 * SECOND) <= 2 * MS
    assert [line["event"].split(",")[0] for line in logs] == [
        "MongoDB's clock has jumped",
        "this machine's clock differs from MongoDB's",
    ]
    assert machine.keeper.problem is not None and "30 s behind MongoDB's" in machine.keeper.problem


@pytest.mark.parametrize("off", [0, HOUR])
@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_a_step_of_the_wall_clock_never_shows(monkeypatch: pytest.MonkeyPatch, off: int, step: int) -> None:
    world = made(monkeypatch, off=off)
    world.checks(READINGS)
    world.off += step
    assert abs(world.error) <= 2 * MS, "before it was looked at"
    world.checks()
    assert abs(world.error) <= 2 * MS, "and after"
    assert world.keeper.offset == pytest.approx(world.off / SECOND, abs=0.002)


def test_what_is_wrong_is_told_once_and_taken_back_when_the_clock_is_set(machine: World) -> None:
    machine.off = -HOUR
    with capture_logs() as logs:
        machine.checks(5)
        told = str(machine.keeper.problem)
        assert "3600 s behind MongoDB's" in told and "NTP" in told
        machine.off = 10 * MS
        machine.checks(5)
    assert machine.keeper.problem is None
    assert machine.error == 10 * MS, "its own clock is good enough again"
    assert [(line["log_level"], line.get("ahead_seconds")) for line in logs] == [
        ("warning", -3600.0),
        ("info", None),
    ]


def test_a_difference_at_the_edge_does_not_go_to_and_fro(machine: World) -> None:
    errors = set()
    for n in range(50):
        machine.off = (95 if n % 2 else 105) * MS
        machine.checks()
        errors.add(abs(machine.error) <= 2 * MS)
    assert errors == {True}


def test_without_an_answer_everything_stays_as_it_is(machine: World) -> None:
    machine.keeper.take()
    assert machine.steered is None
    machine.off = HOUR
    machine.checks()
    machine.true += 24 * HOUR
    machine.keeper.take()
    assert abs(machine.error) <= 2 * MS
    assert machine.keeper.problem is not None


@given(
    off=st.integers(-2 * HOUR, 2 * HOUR),
    ways=st.lists(st.tuples(st.integers(0, 2 * SECOND), st.integers(0, 2 * SECOND)), min_size=1, max_size=30),
)
def test_the_time_is_right_within_what_the_best_answer_allows(off: int, ways: list[tuple[int, int]]) -> None:
    world = World(off=off)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timekeeping, "steer", lambda ahead: setattr(world, "steered", ahead))
        for n, (there, back) in enumerate(ways):
            world.checks(1, there, back)
            best = min(sum(way) for way in ways[max(0, n - READINGS + 1) : n + 1]) / 2
            # Once for what is believed, once for what is left alone.
            assert abs(world.error) <= 2 * max(best, 100 * MS) + 3 * MS


@given(steps=st.lists(st.integers(-2 * HOUR, 2 * HOUR), min_size=1, max_size=40))
def test_order_rises_whatever_the_correction_does(steps: list[int]) -> None:
    rest = iter([step for step in steps for _ in range(2)])
    clock = Clock(lambda: (START + next(rest)) // MS)
    made = [clock.next() for _ in range(2 * len(steps))]
    assert made == sorted(set(made))


@pytest.fixture
def alone() -> Iterator[None]:
    """What other tests' nodes steered the clock to is put back."""
    before = wire_clock._ahead
    yield
    steer(before)


def test_the_processs_clock_is_the_wall_clock_until_it_is_steered(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.wire.clock.time.time_ns", lambda: START)
    steer(None)
    assert (wall_ns(), wall_ms(), wall_seconds()) == (START, START // MS, START / SECOND)
    assert utc_now() == EPOCH + timedelta(seconds=START // SECOND)
    steer(START + HOUR - steady_ns())
    assert 0 <= wall_ns() - START - HOUR < 60 * SECOND
    assert 0 <= Clock().now() - (START + HOUR) // MS < 60_000
    assert (
        timedelta(0)
        <= utc_now() - (EPOCH + timedelta(seconds=(START + HOUR) // SECOND))
        < timedelta(minutes=1)
    )
