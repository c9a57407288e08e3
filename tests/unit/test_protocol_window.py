"""How windows and queues follow a way."""

from __future__ import annotations

import itertools

import pytest

from appliance.protocol.window import (
    FADES,
    FLOOR_BYTES,
    LEAST_QUEUE_BYTES,
    MOST_BYTES,
    MOST_QUEUE_BYTES,
    PERIOD_S,
    QUEUED_S,
    RTT_MOST_S,
    SLACK_S,
    Pool,
    Rate,
    Window,
)

MBIT = 125_000


def carry(window: Window, *, bytes_per_s: float, rtt_s: float, rounds: int, now: float = 0.0) -> float:
    """A way that is so wide and so long, kept full as far as the window allows; returns the time afterwards."""
    for _ in range(rounds):
        count = round(min(window.size, bytes_per_s * rtt_s))
        now += max(rtt_s, count / bytes_per_s)
        window.took(count, now, rtt_s)
    return now


@pytest.mark.parametrize(
    ("bytes_per_s", "rtt_s"), [(10 * MBIT, 0.07), (100 * MBIT, 0.03), (1000 * MBIT, 0.07), (8 * MBIT, 0.3)]
)
def test_a_window_opens_until_the_way_is_full_and_leaves_a_short_queue(bytes_per_s: float, rtt_s: float) -> None:
    window = Window(Pool(MOST_BYTES), 0.0)
    carry(window, bytes_per_s=bytes_per_s, rtt_s=rtt_s, rounds=40)
    holds = bytes_per_s * rtt_s
    assert window.size >= holds, "the way is never idle"
    queue_s = (window.size - holds) / bytes_per_s
    assert queue_s == pytest.approx(rtt_s + SLACK_S, rel=0.01), "and what waits before it is no more than this"


def test_a_window_doubles_at_most_with_each_round_trip() -> None:
    """And it needs few of them: 64 KiB to 20 MB in a dozen."""
    window, now, rtt_s = Window(Pool(MOST_BYTES), 0.0), 0.0, 0.07
    sizes = [window.size]
    for _ in range(14):
        now = carry(window, bytes_per_s=300e6, rtt_s=rtt_s, rounds=1, now=now)
        sizes.append(window.size)
    assert all(later <= earlier * (2 + SLACK_S / rtt_s) + 1 for earlier, later in itertools.pairwise(sizes))
    assert sizes[-1] > 20e6


def test_a_window_has_a_floor_and_a_ceiling() -> None:
    slow = Window(Pool(MOST_BYTES), 0.0)
    carry(slow, bytes_per_s=1000, rtt_s=0.01, rounds=10)
    assert slow.size == FLOOR_BYTES
    fast = Window(Pool(10 * MOST_BYTES), 0.0)
    carry(fast, bytes_per_s=10e9, rtt_s=0.1, rounds=100)
    assert fast.size == MOST_BYTES


def test_a_way_that_got_narrower_gets_a_smaller_window_before_long() -> None:
    window = Window(Pool(MOST_BYTES), 0.0)
    now = carry(window, bytes_per_s=100e6, rtt_s=0.05, rounds=30)
    wide = window.size
    until = carry(window, bytes_per_s=1e6, rtt_s=0.05, rounds=120, now=now)
    assert wide > 10e6
    assert window.size < 300_000
    assert until - now < 7.0


def test_without_a_known_round_trip_it_stays() -> None:
    window = Window(Pool(MOST_BYTES), 0.0)
    for turn in range(1, 50):
        assert window.took(1_000_000, turn * 0.1, None) == FLOOR_BYTES


def test_a_peer_that_tells_an_absurd_round_trip_gains_little() -> None:
    window = Window(Pool(1 << 40), 0.0)
    window.took(100_000, RTT_MOST_S, float("inf"))
    assert window.size == pytest.approx(50_000 * (2 * RTT_MOST_S + SLACK_S), rel=0.01)


def test_a_reader_that_stops_makes_nothing_grow() -> None:
    window = Window(Pool(MOST_BYTES), 0.0)
    carry(window, bytes_per_s=10e6, rtt_s=0.05, rounds=20)
    before = window.size
    assert window.took(0, 3600.0, 0.05) <= before


def test_all_windows_share_a_pool_and_give_back() -> None:
    pool = Pool(1_000_000)
    first, second = Window(pool, 0.0), Window(pool, 0.0)
    carry(first, bytes_per_s=100e6, rtt_s=0.1, rounds=20)
    carry(second, bytes_per_s=100e6, rtt_s=0.1, rounds=20)
    assert first.size == FLOOR_BYTES + 1_000_000
    assert second.size == FLOOR_BYTES
    first.close()
    assert pool.taken_bytes == 0
    carry(second, bytes_per_s=100e6, rtt_s=0.1, rounds=20, now=2.0)
    assert second.size == FLOOR_BYTES + 1_000_000
    second.close()
    second.close()
    assert pool.taken_bytes == 0


def test_a_burst_after_a_stall_is_not_taken_for_speed() -> None:
    """The reader stood still for half a second: what waited comes at once, and says nothing of the way."""
    rate = Rate(0.0)
    now = 0.0
    for _ in range(100):
        now += 0.01
        rate.add(10_000, now)
    assert rate.per_s == pytest.approx(1e6)
    rate.add(10_000, now + 0.5)
    for _ in range(20):
        rate.add(24_500, now + 0.501)
    rate.add(10_000, now + 0.5 + PERIOD_S)
    assert rate.per_s < 1.1e6


def test_a_pause_fades_slowly() -> None:
    rate = Rate(0.0)
    rate.add(100_000, 0.1)
    best = rate.per_s
    assert not rate.add(10, 0.1 + PERIOD_S / 2), "too early to tell"
    assert rate.add(0, 1.0)
    assert rate.per_s == pytest.approx(best * FADES)


def test_what_may_wait_in_a_socket_follows_the_rate() -> None:
    rate = Rate(0.0)
    assert rate.queue_bytes == LEAST_QUEUE_BYTES
    rate.add(125_000, 0.1)
    assert rate.queue_bytes == 10 * MBIT * QUEUED_S
    rate.add(10**9, 0.2)
    assert rate.queue_bytes == MOST_QUEUE_BYTES
