"""The books: what was accepted is what ended and what still waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from relay.store.ledger import OUTCOMES, Ledger, Outcome

entries = st.lists(st.tuples(st.sampled_from(OUTCOMES), st.integers(0, 50)), max_size=40)


@given(opening=st.integers(0, 1000), booked=entries)
def test_accepted_is_what_ended_and_what_waits(opening: int, booked: list[tuple[Outcome, int]]) -> None:
    ledger = Ledger()
    ledger.open(opening)
    for outcome, deliveries in booked:
        ledger.add(outcome, deliveries)
    sums = {name: sum(count for outcome, count in booked if outcome == name) for name in OUTCOMES}
    sums["accepted"] += opening
    assert {name: ledger.count(name) for name in OUTCOMES} == sums
    assert ledger.waiting == sums["accepted"] - sum(sums[name] for name in OUTCOMES if name != "accepted")


def test_a_new_account_is_empty() -> None:
    ledger = Ledger()
    assert ledger.waiting == 0
    assert all(ledger.count(name) == 0 for name in OUTCOMES)


def test_the_books_are_open_on_the_metrics() -> None:
    registry = CollectorRegistry()
    ledger = Ledger(registry)
    ledger.open(2)
    ledger.add("accepted", 5)
    ledger.add("acknowledged", 3)
    ledger.add("expired", 1)
    value = registry.get_sample_value
    assert value("relay_deliveries_total", {"outcome": "accepted"}) == 7
    assert value("relay_deliveries_total", {"outcome": "acknowledged"}) == 3
    assert value("relay_deliveries_total", {"outcome": "expired"}) == 1
    assert value("relay_deliveries_total", {"outcome": "trimmed"}) == 0
    assert value("relay_deliveries_waiting") == 3


@given(balances=st.lists(st.integers(-50, 50), max_size=10))
def test_what_other_books_held_is_carried_on_and_no_counter_goes_down(balances: list[int]) -> None:
    ledger = Ledger()
    for balance in balances:
        before = {name: ledger.count(name) for name in OUTCOMES}
        waiting, turnover = ledger.waiting, ledger.turnover
        ledger.carry(balance)
        assert ledger.waiting == waiting + balance
        assert all(ledger.count(name) >= before[name] for name in OUTCOMES)
        assert (ledger.turnover > turnover) == (balance != 0)
