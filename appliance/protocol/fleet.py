"""Fleet state: what an operator sees of an SE. Derived when read, never stored.

`UP` means: link authenticated, hello confirmed, first heartbeat answered, reverse path verified. Each state has a
reason code, a sentence and the time since when it holds.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from appliance.protocol.enroll import SeStatus

RTT_LIMIT_S = 0.070
"""The source document's limit between a controller and an SE."""
RTT_CLEAR_S = 0.060
"""Below this a DEGRADED for RTT ends: hysteresis."""
SKEW_LIMIT_S = 60.0
SPOOL_LIMIT_BYTES = 1024 * 1024


class State(enum.StrEnum):
    """States of DESIGN section 8."""

    CREATING = "CREATING"
    PENDING = "PENDING"
    ENROLLED = "ENROLLED"
    UP = "UP"
    DEGRADED = "DEGRADED"
    DOWN = "DOWN"
    UPGRADING = "UPGRADING"
    QUARANTINED = "QUARANTINED"
    REVOKED = "REVOKED"


class Reason(enum.StrEnum):
    """Reason codes."""

    OK = "OK"
    AWAITS_APPROVAL = "AWAITS_APPROVAL"
    NO_LINK_YET = "NO_LINK_YET"
    COMING_UP = "COMING_UP"
    RTT_HIGH = "RTT_HIGH"
    REVERSE_DOWN = "REVERSE_DOWN"
    CLOCK_SKEW = "CLOCK_SKEW"
    SPOOL_GROWING = "SPOOL_GROWING"
    LINK_LOST = "LINK_LOST"
    HEARTBEAT_MISSED = "HEARTBEAT_MISSED"
    CONTROLLER_RESTARTED = "CONTROLLER_RESTARTED"
    CLOSED_BY_SE = "CLOSED_BY_SE"
    UNCONFINED = "UNCONFINED"
    PROTOCOL = "PROTOCOL"
    CLONE = "CLONE"
    ROLLED_BACK = "ROLLED_BACK"
    REVOKED = "REVOKED"
    REJECTED = "REJECTED"
    DELETED = "DELETED"


class LinkView(NamedTuple):
    """What is known of an SE's newest admitted link. Durations in seconds."""

    confirmed: bool
    heartbeats: int
    reverse_ok: bool | None
    """None until the check ran."""
    rtt_s: float | None
    """Minimum of the last minute, None until there were enough round trips for one."""
    skew_s: float
    """How far the SE's clock is ahead of ours, by the one of the last three heartbeats that came soonest."""
    spool_bytes: int
    reverse_error: str = ""
    rolled_back: bool = False
    """Admitted with an older ticket than the newest one known (see `protocol.tunnel.judge_newcomer`)."""
    open_doors: tuple[str, ...] = ()
    """What the SE's self-test was granted although it must not."""


class SeView(NamedTuple):
    """What the derivation needs."""

    status: SeStatus
    ever_confirmed: bool
    link: LinkView | None
    lost_reason: Reason = Reason.LINK_LOST
    lost_text: str = ""
    was_rtt_high: bool = False
    clone_of: str = ""
    """Where a second link with this SE's key is held in quarantine: the peer's address."""


class Derived(NamedTuple):
    """A state with its reason."""

    state: State
    reason: Reason
    text: str


_BY_STATUS = {
    SeStatus.PENDING: Derived(State.PENDING, Reason.AWAITS_APPROVAL, "an operator must approve this SE"),
    SeStatus.QUARANTINED: Derived(State.QUARANTINED, Reason.CLONE, "in quarantine as a suspected copy"),
    SeStatus.REJECTED: Derived(State.REVOKED, Reason.REJECTED, "an operator rejected this SE"),
    SeStatus.REVOKED: Derived(State.REVOKED, Reason.REVOKED, "an operator revoked this SE"),
    SeStatus.DELETED: Derived(State.REVOKED, Reason.DELETED, "an operator deleted this SE"),
}


def _derive_link(view: SeView, link: LinkView) -> Derived:
    if not link.confirmed or link.heartbeats == 0 or link.reverse_ok is None:
        waiting = (
            "hello"
            if not link.confirmed
            else "the first heartbeat"
            if link.heartbeats == 0
            else "the reverse path check"
        )
        state = State.DOWN if view.ever_confirmed and not link.confirmed else State.ENROLLED
        return Derived(state, Reason.COMING_UP, f"linked, waiting for {waiting}")
    if link.open_doors:
        return Derived(State.DEGRADED, Reason.UNCONFINED, unconfined(link.open_doors))
    if not link.reverse_ok:
        return Derived(State.DEGRADED, Reason.REVERSE_DOWN, f"the reverse path is down: {link.reverse_error}")
    if is_rtt_high(link.rtt_s, was_high=view.was_rtt_high):
        rtt_ms = (link.rtt_s or 0.0) * 1000
        return Derived(
            State.DEGRADED, Reason.RTT_HIGH, f"RTT {rtt_ms:.0f} ms, below {RTT_LIMIT_S * 1000:.0f} ms expected"
        )
    if abs(link.skew_s) > SKEW_LIMIT_S:
        return Derived(State.DEGRADED, Reason.CLOCK_SKEW, f"the SE's clock is off by {link.skew_s:+.0f} s")
    if link.spool_bytes > SPOOL_LIMIT_BYTES:
        return Derived(State.DEGRADED, Reason.SPOOL_GROWING, f"{link.spool_bytes} bytes of telemetry wait on the SE")
    if view.clone_of:
        return Derived(State.UP, Reason.CLONE, f"a copy of this SE was put in quarantine: {view.clone_of}")
    if link.rolled_back:
        return Derived(State.UP, Reason.ROLLED_BACK, "came back with older state: a restored snapshot or disk")
    return Derived(State.UP, Reason.OK, "link, heartbeat and reverse path work")


def unconfined(doors: Sequence[str]) -> str:
    """Says what an SE's self-test found open."""
    return f"this controller grants the SE's key what it must refuse: {', '.join(doors)}"


def is_rtt_high(rtt_s: float | None, *, was_high: bool) -> bool:
    """RTT with hysteresis: high above 70 ms, and until it falls below 60 ms again."""
    return rtt_s is not None and rtt_s > (RTT_CLEAR_S if was_high else RTT_LIMIT_S)


def derive(view: SeView) -> Derived:
    """Returns state, reason and a sentence for an SE as it stands."""
    if view.status in _BY_STATUS:
        return _BY_STATUS[view.status]
    if view.link is not None:
        return _derive_link(view, view.link)
    if view.clone_of:
        return Derived(State.QUARANTINED, Reason.CLONE, f"only a suspected copy is linked: {view.clone_of}")
    if not view.ever_confirmed:
        return Derived(State.ENROLLED, Reason.NO_LINK_YET, "enrolled, no link has come up yet")
    return Derived(State.DOWN, view.lost_reason, view.lost_text or "no link")


class SeSummary(msgspec.Struct, kw_only=True):
    """One line of the fleet, as the operator API and `--json` give it."""

    se_id: str
    name: str
    number: int
    address: str
    state: State
    reason: Reason
    text: str
    since: float
    """Seconds since 1970."""
    rtt_s: float | None
    cpu_pct: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    uptime_s: float | None
    """Of the host, by its boot time."""
    labels: dict[str, str]
    agent_version: str
    image_key_id: str
    enrolled_at: float
    source: str
    """Peer address of the link, or of the enrollment where there is no link."""
