"""One link: the minimum of its round trips over the last minute, and how it is closed."""

from __future__ import annotations

from typing import cast

import asyncssh
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance import settings
from appliance.controller.link import FEW, WINDOW_S, Link, Minimum
from appliance.protocol.fleet import LinkView, Reason

TERMS = settings.Controller()


def test_nothing_measured_is_none() -> None:
    assert Minimum().value is None
    assert Minimum().settled is None


@given(
    start=st.floats(0, 1e6),
    samples=st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.001, 10)), min_size=1, max_size=100),
)
def test_the_minimum_covers_half_a_minute_and_three_values_at_least(
    start: float, samples: list[tuple[float, float]]
) -> None:
    rtt, now, seen = Minimum(), start, []
    for gap, value in samples:
        now += gap
        rtt.add(value, now)
        seen.append((now, value))
        assert rtt.value is not None
        # Whatever is younger than one window counts, and the newest three.
        young = [value for at, value in seen if now - at < WINDOW_S - 1e-6]
        assert rtt.value <= min(*young, *(value for _, value in seen[-FEW:]), value)
        # What is older than two windows, each stretched by the value that ends it, doesn't.
        widest = 2 * (WINDOW_S + (FEW + 1) * max(gap for gap, _ in samples))
        assert rtt.value in [value for at, value in seen if now - at <= widest]
        assert rtt.settled == (rtt.value if len(seen) >= FEW else None)


def test_windows_by_example() -> None:
    rtt = Minimum()
    for value, at in ((0.010, 90.0), (0.050, 95.0), (0.050, 119.9)):
        rtt.add(value, at)
    assert rtt.value == 0.010
    rtt.add(0.060, 120.0)  # a new window; the one before still counts
    assert rtt.value == 0.010
    rtt.add(0.070, 149.9)
    rtt.add(0.080, 150.0)  # its third
    assert rtt.value == 0.010
    rtt.add(0.090, 150.1)  # the first window is forgotten, the second is "before"
    assert rtt.value == 0.060


def test_one_slow_round_trip_makes_no_minimum() -> None:
    rtt = Minimum()
    rtt.add(0.5, 0.0)
    assert (rtt.value, rtt.settled) == (0.5, None)
    rtt.add(0.001, 5.0)
    rtt.add(0.5, 300.0)
    assert rtt.settled == 0.001
    rtt.add(0.5, 600.0)  # as seldom as they come: the window before has the good one
    assert rtt.settled == 0.001


class Conn:
    def __init__(self) -> None:
        self.aborted = 0

    def abort(self) -> None:
        self.aborted += 1


def made() -> tuple[Link, Conn]:
    conn = Conn()
    return Link(
        cast("asyncssh.SSHServerConnection", conn), link_id=1, se_id="s", thumbprint="k", source="192.0.2.1",
        terms=TERMS, now=5.0,
    ), conn  # fmt: skip


def test_a_fresh_link_has_nothing_to_show() -> None:
    link, _ = made()
    assert link.view() == LinkView(
        confirmed=False, heartbeats=0, reverse_ok=None, rtt_s=None, skew_s=0.0, spool_bytes=0
    )
    assert link.last_seen == link.opened_at == 5.0


def test_the_view_follows_the_fields() -> None:
    link, _ = made()
    link.confirmed, link.heartbeats, link.reverse_ok, link.spool_bytes = True, 3, False, 10
    link.reverse_error, link.rolled_back = "refused", True
    for at in (10.0, 15.0, 20.0):
        link.rtt.add(0.02, at)
        link.lags.add(2.0)
    link.lags.add(70.0)  # held up on its way, which says nothing of its clock
    assert link.view() == LinkView(
        confirmed=True, heartbeats=3, reverse_ok=False, rtt_s=0.02, skew_s=-2.0, spool_bytes=10,
        reverse_error="refused", rolled_back=True,
    )  # fmt: skip


def test_the_first_reason_counts_and_every_close_cuts() -> None:
    link, conn = made()
    link.close(Reason.HEARTBEAT_MISSED, "silent")
    link.close(Reason.REVOKED, "later")
    assert (link.lost_reason, link.lost_text, conn.aborted) == (Reason.HEARTBEAT_MISSED, "silent", 2)


def test_who_is_refused_again_and_again_has_to_wait() -> None:
    link, _ = made()
    assert not any(link.was_refused(0.0) for _ in range(TERMS.refusal_burst))
    assert link.was_refused(0.0)
    later_s = 2 / TERMS.refusal_rate_per_s
    assert [link.was_refused(later_s) for _ in range(3)] == [False, False, True]


def test_a_misspelt_field_is_an_error() -> None:
    link, _ = made()
    with pytest.raises(AttributeError):
        link.confirmd = True  # type: ignore[attr-defined]
