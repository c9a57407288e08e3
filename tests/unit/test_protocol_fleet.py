"""What an operator sees of an SE, derived from what is known."""

from __future__ import annotations

import pytest

from appliance.protocol.enroll import SeStatus
from appliance.protocol.fleet import (
    RTT_CLEAR_S,
    RTT_LIMIT_S,
    SKEW_LIMIT_S,
    SPOOL_LIMIT_BYTES,
    LinkView,
    Reason,
    SeView,
    State,
    derive,
    is_rtt_high,
)

GOOD = LinkView(confirmed=True, heartbeats=1, reverse_ok=True, rtt_s=0.001, skew_s=0.0, spool_bytes=0)


def view(link: LinkView | None, **change: object) -> SeView:
    return SeView(status=SeStatus.ENROLLED, ever_confirmed=True, link=link)._replace(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        (SeStatus.PENDING, State.PENDING, Reason.AWAITS_APPROVAL),
        (SeStatus.QUARANTINED, State.QUARANTINED, Reason.CLONE),
        (SeStatus.REJECTED, State.REVOKED, Reason.REJECTED),
        (SeStatus.REVOKED, State.REVOKED, Reason.REVOKED),
        (SeStatus.DELETED, State.REVOKED, Reason.DELETED),
    ],
)
@pytest.mark.parametrize("link", [None, GOOD])
def test_a_stored_status_outranks_the_link(
    status: SeStatus, state: State, reason: Reason, link: LinkView | None
) -> None:
    assert derive(view(link, status=status))[:2] == (state, reason)


@pytest.mark.parametrize(
    ("change", "state", "reason", "said"),
    [
        ({}, State.UP, Reason.OK, "work"),
        ({"rolled_back": True}, State.UP, Reason.ROLLED_BACK, "snapshot"),
        ({"confirmed": False}, State.DOWN, Reason.COMING_UP, "waiting for hello"),
        ({"heartbeats": 0}, State.ENROLLED, Reason.COMING_UP, "the first heartbeat"),
        ({"reverse_ok": None}, State.ENROLLED, Reason.COMING_UP, "the reverse path check"),
        ({"reverse_ok": False, "reverse_error": "refused"}, State.DEGRADED, Reason.REVERSE_DOWN, "refused"),
        ({"rtt_s": 0.0712}, State.DEGRADED, Reason.RTT_HIGH, "RTT 71 ms, below 70 ms expected"),
        ({"rtt_s": None}, State.UP, Reason.OK, "work"),
        ({"skew_s": SKEW_LIMIT_S + 1}, State.DEGRADED, Reason.CLOCK_SKEW, "+61 s"),
        ({"skew_s": -SKEW_LIMIT_S - 1}, State.DEGRADED, Reason.CLOCK_SKEW, "-61 s"),
        ({"skew_s": -SKEW_LIMIT_S}, State.UP, Reason.OK, "work"),
        ({"spool_bytes": SPOOL_LIMIT_BYTES + 1}, State.DEGRADED, Reason.SPOOL_GROWING, "1048577 bytes"),
        ({"open_doors": ("shell", "exec")}, State.DEGRADED, Reason.UNCONFINED, "shell, exec"),
        ({"spool_bytes": SPOOL_LIMIT_BYTES}, State.UP, Reason.OK, "work"),
    ],
)
def test_a_link_is_up_when_all_of_it_works(change: dict[str, object], state: State, reason: Reason, said: str) -> None:
    derived = derive(view(GOOD._replace(**change)))  # type: ignore[arg-type]
    assert derived[:2] == (state, reason)
    assert said in derived.text


def test_an_se_on_its_first_link_is_not_down() -> None:
    assert derive(view(GOOD._replace(confirmed=False), ever_confirmed=False)).state is State.ENROLLED


def test_a_copy_in_quarantine_is_told_beside_the_one_that_is_up() -> None:
    derived = derive(view(GOOD, clone_of="192.0.2.9"))
    assert derived[:2] == (State.UP, Reason.CLONE)
    assert "192.0.2.9" in derived.text


@pytest.mark.parametrize(
    ("change", "state", "reason"),
    [
        ({"clone_of": "192.0.2.9"}, State.QUARANTINED, Reason.CLONE),
        ({"ever_confirmed": False}, State.ENROLLED, Reason.NO_LINK_YET),
        ({}, State.DOWN, Reason.LINK_LOST),
        ({"lost_reason": Reason.HEARTBEAT_MISSED, "lost_text": "9 s"}, State.DOWN, Reason.HEARTBEAT_MISSED),
    ],
)
def test_without_a_link(change: dict[str, object], state: State, reason: Reason) -> None:
    derived = derive(view(None, **change))
    assert derived[:2] == (state, reason)
    assert derived.text


@pytest.mark.parametrize(
    ("rtt_s", "was_high", "high"),
    [
        (None, True, False),
        (RTT_LIMIT_S, False, False),
        (RTT_LIMIT_S + 0.001, False, True),
        (RTT_LIMIT_S - 0.001, True, True),
        (RTT_CLEAR_S, True, False),
        (RTT_CLEAR_S + 0.001, False, False),
    ],
)
def test_rtt_has_hysteresis(rtt_s: float | None, was_high: bool, high: bool) -> None:
    assert is_rtt_high(rtt_s, was_high=was_high) is high
