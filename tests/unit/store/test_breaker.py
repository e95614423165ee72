"""When a lane opens, what it lets through then, and when it closes."""

from __future__ import annotations

import pytest

from relay.store import breaker
from relay.store.breaker import Breaker


class Case:
    """A breaker with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.called: list[str] = []
        monkeypatch.setattr(breaker, "monotonic", lambda: self.now)
        self.breaker = Breaker(
            patience=10,
            haste=2,
            opened=lambda: self.called.append("opened"),
            relieve=lambda: self.called.append("relieved"),
        )

    def fails_for(self, seconds: float) -> None:
        self.breaker.failed()
        self.now += seconds
        self.breaker.failed()


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(monkeypatch)


def test_short_outages_are_waited_out(case: Case) -> None:
    case.fails_for(9.9)
    assert not case.breaker.is_open
    assert all(case.breaker.admits() for _ in range(100))


def test_it_opens_once_when_nothing_has_come_through_for_long(case: Case) -> None:
    case.fails_for(10)
    case.breaker.failed()
    assert case.breaker.is_open
    assert case.called.count("opened") == 1


def test_full_queues_are_relieved_at_every_failure_but_not_at_the_first_ones(case: Case) -> None:
    case.fails_for(1.9)
    assert case.called == []
    case.now += 0.1
    case.breaker.failed()
    case.breaker.failed()
    assert case.called == ["relieved", "relieved"]
    assert not case.breaker.is_open


def test_what_came_through_meanwhile_begins_the_count_anew(case: Case) -> None:
    case.fails_for(9)
    case.breaker.succeeded()
    case.fails_for(9)
    assert not case.breaker.is_open


def test_failures_long_ago_are_another_outage(case: Case) -> None:
    case.breaker.failed()
    case.now += 3600
    case.breaker.failed()
    assert not case.breaker.is_open


def test_an_open_lane_tries_one_at_once_and_then_one_a_second_until_one_comes_through(case: Case) -> None:
    case.fails_for(10)
    assert [case.breaker.admits() for _ in range(5)] == [True, False, False, False, False]
    case.now += 1
    assert [case.breaker.admits() for _ in range(3)] == [True, False, False]
    case.breaker.succeeded()
    assert all(case.breaker.admits() for _ in range(3))
