"""Rate limits without Redis: what they count, what they tell, what they forget."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from limits import parse

from relay.security import rates
from relay.security.rates import MessageRates, Rates, _Windows
from relay.wire.errors import RelayError


async def refused(limits: Rates, name: str, key: str) -> RelayError | None:
    """The refusal, or None when it was allowed."""
    try:
        await limits.check(name, key)
    except RelayError as error:
        return error
    return None


async def test_one_more_than_the_rule_allows_is_refused_with_the_time_to_wait() -> None:
    limits = Rates({"search": "3/minute"}, redis_url=None)
    assert [await refused(limits, "search", "ann") for _ in range(3)] == [None, None, None]
    error = await refused(limits, "search", "ann")
    assert error is not None
    assert error.code == "rate_limited"
    assert error.status == 429
    assert error.retry_after is not None
    assert 0 < error.retry_after <= 60_000
    assert error.message == f"too many searches; try again in {-(-error.retry_after // 1000)} s"
    assert not limits.shared


async def test_keys_and_rules_are_counted_apart() -> None:
    limits = Rates({"search": "1/minute", "report": "1/minute"}, redis_url=None)
    assert await refused(limits, "search", "ann") is None
    assert await refused(limits, "search", "bob") is None
    assert await refused(limits, "report", "ann") is None
    assert await refused(limits, "search", "ann") is not None


async def test_a_rule_that_is_off_counts_nothing_and_an_unknown_one_is_a_mistake() -> None:
    limits = Rates({"search": "off"}, redis_url=None)
    for _ in range(100):
        await limits.check("search", "ann")
    with pytest.raises(KeyError):
        await limits.check("serach", "ann")


async def test_a_key_may_be_any_text() -> None:
    limits = Rates({"login_account": "1/minute"}, redis_url=None)
    for key in ("", "\0", "\ud800", "x" * 1_000_000, "a/b:{c}*"):
        assert await refused(limits, "login_account", key) is None
        assert await refused(limits, "login_account", key) is not None


def test_a_rule_that_is_none_is_refused_when_the_limits_are_made() -> None:
    with pytest.raises(ValueError, match="parse"):
        Rates({"search": "often"}, redis_url=None)


@pytest.mark.parametrize("rule", ["20/minute", "1000/10 seconds", "7/hour", "1/second"])
def test_whoever_waits_as_told_is_let_in_and_never_more_than_twice_the_limit_passes_in_its_time(
    rule: str,
) -> None:
    windows, limit = _Windows(1000), parse(rule)
    now, taken = 12_345.6, []
    for _ in range(3 * limit.amount):
        wait = windows.take(limit, "key", now)
        if wait:
            assert wait <= limit.get_expiry() + 0.001
            now += wait
            assert windows.take(limit, "key", now) == 0
        taken.append(now)
        now += limit.get_expiry() / limit.amount / 3
    most = max(bisect_left(taken, start + limit.get_expiry()) - number for number, start in enumerate(taken))
    assert limit.amount <= most <= 2 * limit.amount


def test_a_burst_at_the_end_of_a_window_is_not_repeated_at_the_start_of_the_next() -> None:
    windows, limit = _Windows(1000), parse("20/minute")
    assert sum(windows.take(limit, "key", 119.0) == 0 for _ in range(50)) == 20
    assert sum(windows.take(limit, "key", 121.0) == 0 for _ in range(50)) <= 1
    assert windows.take(limit, "key", 300.0) == 0


def test_counts_in_this_process_are_bounded_and_the_longest_untouched_go_first() -> None:
    windows, limit = _Windows(most=100), parse("2/hour")
    for number in range(1000):
        windows.take(limit, "kept", 1.0)
        windows.take(limit, str(number), 1.0)
    assert len(windows) == 100
    assert windows.take(limit, "kept", 1.0) > 0


async def test_many_keys_of_one_rule_do_not_have_another_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_MAX_KEYS", 100)
    limits = Rates({"login_account": "1/hour", "key_claim": "5/hour"}, redis_url=None)
    await limits.check("login_account", "ann")
    for number in range(1000):
        await limits.check("key_claim", f"made-up-{number}/phone")
    assert await refused(limits, "login_account", "ann") is not None


async def test_what_costs_more_is_refused_whole_and_counts_nothing_then() -> None:
    limits = Rates({"key_claim_caller": "10/minute"}, redis_url=None)
    await limits.check("key_claim_caller", "ann", 7)
    with pytest.raises(RelayError) as error:
        await limits.check("key_claim_caller", "ann", 4)
    assert 0 < (error.value.retry_after or 0) <= 120_000
    await limits.check("key_claim_caller", "ann", 3)
    assert await refused(limits, "key_claim_caller", "ann") is not None


@pytest.mark.parametrize("cost", [1, 3, 7])
def test_who_asks_for_much_is_let_in_when_told(cost: int) -> None:
    windows, limit = _Windows(1000), parse("10/minute")
    now = 1000.0
    for _ in range(20):
        while not windows.take(limit, "key", now, cost):
            pass
        now += windows.take(limit, "key", now, cost)
        assert windows.take(limit, "key", now, cost) == 0


def test_a_device_sends_its_burst_at_once_and_then_at_its_rate() -> None:
    buckets = MessageRates(500, 2000)
    assert sum(buckets.take("ann/phone", 100.0) == 0 for _ in range(3000)) == 2000
    now, sent, refusals = 100.0, 0, 0
    while now < 110:
        wait = buckets.take("ann/phone", now)
        sent, refusals = sent + (wait == 0), refusals + (wait > 0)
        now += wait
    assert 4500 <= sent <= 5000
    assert refusals <= 11


def test_a_refused_device_is_refused_until_the_time_it_was_told() -> None:
    buckets = MessageRates(500, 10)
    while not (wait := buckets.take("ann/phone", 100.0)):
        pass
    assert wait >= 1
    # Tokens have come back long before, but a message behind the refused one must not overtake it.
    assert buckets.take("ann/phone", 100.0 + wait / 2) == pytest.approx(wait / 2)
    assert buckets.take("ann/phone", 100.0 + wait) == 0


def test_devices_do_not_share_a_bucket() -> None:
    buckets = MessageRates(1, 1)
    assert buckets.take("ann/phone", 5.0) == 0
    assert buckets.take("ann/tablet", 5.0) == 0
    assert buckets.take("ann/phone", 5.0) > 0


def test_a_rate_below_one_a_second_tells_the_whole_wait() -> None:
    buckets = MessageRates(0.1, 1)
    assert buckets.take("ann/phone", 5.0) == 0
    assert buckets.take("ann/phone", 5.0) == pytest.approx(10)
    assert buckets.take("ann/phone", 15.0) == 0


def test_rate_zero_is_no_limit_and_remembers_nobody() -> None:
    buckets = MessageRates(0, 1)
    assert not any(buckets.take("ann/phone", 5.0) for _ in range(10_000))
    assert len(buckets) == 0


def test_buckets_that_are_full_again_are_forgotten() -> None:
    buckets = MessageRates(500, 2000)
    for number in range(100_000):
        buckets.take(f"user-{number}/phone", 100.0 + number / 1000)
    assert len(buckets) <= 10_001


def test_a_bucket_in_use_is_not_forgotten_with_the_others() -> None:
    buckets = MessageRates(10, 10_000)
    while not buckets.take("ann/phone", 100.0):
        pass
    for number in range(50_000):
        buckets.take(f"user-{number}/phone", 100.0 + number / 100_000)
    assert buckets.take("ann/phone", 100.9) > 0
    assert sum(buckets.take("ann/phone", 101.5) == 0 for _ in range(100)) <= 16


def test_buckets_that_stay_in_use_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_MIN_BUCKETS", 100)
    monkeypatch.setattr(rates, "_MAX_BUCKETS", 1000)
    buckets = MessageRates(0.001, 1)
    for number in range(10_000):
        buckets.take(f"user-{number}/phone", 100.0)
    assert 900 <= len(buckets) <= 1000
