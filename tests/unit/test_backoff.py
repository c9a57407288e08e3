"""Back-off: full jitter, a doubling ceiling, a floor."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from appliance.runtime.backoff import FLOOR_S, Backoff


def test_the_ceiling_doubles_up_to_the_most() -> None:
    backoff = Backoff(first_s=1.0, most_s=5.0, random=lambda: 0.5)
    assert [backoff.next_s() for _ in range(5)] == [0.5, 1.0, 2.0, 2.5, 2.5]


def test_reset_starts_over() -> None:
    backoff = Backoff(first_s=1.0, most_s=8.0, random=lambda: 0.5)
    backoff.next_s()
    backoff.next_s()
    backoff.reset()
    assert backoff.next_s() == 0.5


def test_it_never_spins() -> None:
    backoff = Backoff(random=lambda: 0.0)
    assert backoff.next_s() == FLOOR_S


def test_a_first_above_the_most_is_cut() -> None:
    assert Backoff(first_s=100.0, most_s=2.0, random=lambda: 0.5).next_s() == 1.0


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=2000))
def test_every_wait_lies_between_floor_and_most(draws: list[float]) -> None:
    rest = iter(draws)
    backoff = Backoff(first_s=0.5, most_s=30.0, random=lambda: next(rest))
    assert all(FLOOR_S <= backoff.next_s() <= 30.0 for _ in draws)
