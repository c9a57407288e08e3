"""Token buckets: never more than the burst and the rate allow, for one source and for all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.controller.rate import MAX_SOURCES, Bucket, Rates, network_of

gaps = st.lists(st.floats(0, 5, allow_nan=False), min_size=1, max_size=150)
rates = st.floats(0.1, 50)
bursts = st.integers(1, 30)


@given(gaps=gaps, rate=rates, burst=bursts)
def test_a_bucket_gives_at_most_burst_and_rate(gaps: list[float], rate: float, burst: int) -> None:
    bucket, now = Bucket(burst, 0.0), 0.0
    taken: list[float] = []
    for gap in gaps:
        now += gap
        if bucket.take(now, rate_per_s=rate, burst=burst):
            taken.append(now)
    for first, begun in enumerate(taken):
        for last in range(first, len(taken)):
            allowed = burst + rate * (taken[last] - begun)
            assert last - first + 1 <= allowed + 1e-6


@given(gaps=gaps, rate=rates, burst=bursts)
def test_a_bucket_is_not_stingier_than_it_says(gaps: list[float], rate: float, burst: int) -> None:
    bucket, now, tokens = Bucket(burst, 0.0), 0.0, float(burst)
    for gap in gaps:
        now += gap
        tokens = min(burst, tokens + gap * rate)
        if abs(tokens - 1) < 1e-6:
            return  # too close to call in floating point
        took = bucket.take(now, rate_per_s=rate, burst=burst)
        assert took == (tokens >= 1)
        tokens -= took


def test_a_clock_that_stands_or_goes_back_gives_nothing() -> None:
    bucket = Bucket(1, 100.0)
    assert bucket.take(100.0, rate_per_s=10, burst=1)
    assert not bucket.take(100.0, rate_per_s=10, burst=1)
    assert not bucket.take(50.0, rate_per_s=10, burst=1)


@given(
    asks=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 0.5)), min_size=1, max_size=200),
    burst=bursts,
    source_burst=bursts,
)
def test_all_sources_together_stay_below_the_whole(
    asks: list[tuple[str, float]], burst: int, source_burst: int
) -> None:
    limit = Rates(rate_per_s=5, burst=burst, source_rate_per_s=3, source_burst=source_burst, now=0.0)
    now, passed = 0.0, dict.fromkeys("abc", 0)
    for source, gap in asks:
        now += gap
        passed[source] += limit.allow(source, now)
    assert sum(passed.values()) <= burst + 5 * now + 1e-6
    for count in passed.values():
        assert count <= source_burst + 3 * now + 1e-6


def test_one_source_can_not_drain_the_others() -> None:
    limit = Rates(rate_per_s=1, burst=100, source_rate_per_s=1, source_burst=10, now=0.0)
    assert sum(limit.allow("flood", 0.0) for _ in range(10_000)) == 10
    assert sum(limit.allow(f"vm-{number}", 0.0) for number in range(90)) == 90
    assert not limit.allow("vm-90", 0.0)


@pytest.mark.parametrize(
    ("source", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("no address: at all", "no address: at all"),
        ("", ""),
    ],
)
def test_an_ipv6_source_is_its_64(source: str, network: str) -> None:
    assert network_of(source) == network


def test_addresses_of_one_64_share_what_one_source_may_take() -> None:
    limit = Rates(rate_per_s=1, burst=1000, source_rate_per_s=1, source_burst=10, now=0.0)
    assert sum(limit.allow(f"2001:db8::{number:x}", 0.0) for number in range(100)) == 10
    assert limit.allow("2001:db8:0:1::1", 0.0), "another network"


def test_a_thousand_behind_one_address_pass_at_once() -> None:
    limit = Rates(rate_per_s=200, burst=1000, source_rate_per_s=100, source_burst=1000, now=0.0)
    assert all(limit.allow("nat", 0.0) for _ in range(1000))
    assert not limit.allow("nat", 0.0)


def test_sources_are_bounded_and_the_quietest_is_forgotten() -> None:
    limit = Rates(rate_per_s=1, burst=10**6, source_rate_per_s=0, source_burst=1, now=0.0)
    assert limit.allow("first", 0.0)
    for number in range(MAX_SOURCES - 1):
        assert limit.allow(str(number), 0.0)
    assert not limit.allow("first", 0.0)  # heard of: now the newest
    limit.allow("one more", 0.0)
    assert len(limit._sources) == MAX_SOURCES
    assert not limit.allow("first", 0.0)
    assert limit.allow("0", 0.0)
