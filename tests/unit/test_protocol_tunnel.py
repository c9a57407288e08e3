"""A link's state machine, the take-over table, the watchdog's arithmetic."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import StateMachineError
from appliance.protocol.tunnel import (
    DEADLINE_S,
    LARGE_FLEET,
    OLDEST_PROTOCOL_NUMBER,
    PROTOCOL_NUMBER,
    UNKNOWN_TICKET,
    LinkEvent,
    LinkState,
    Newcomer,
    Tickets,
    Watchdog,
    advance,
    agree,
    heartbeat_interval,
    is_current,
    judge_newcomer,
    parse_number,
    rotation_statement,
)

MOVES = {
    ("idle", "dial"): "dialing",
    ("dialing", "authenticated"): "greeting",
    ("dialing", "lost"): "idle",
    ("greeting", "confirmed"): "linked",
    ("greeting", "quarantined"): "quarantined",
    ("greeting", "lost"): "idle",
    ("linked", "answered"): "up",
    ("linked", "lost"): "idle",
    ("up", "answered"): "up",
    ("up", "lost"): "idle",
    ("quarantined", "answered"): "quarantined",
    ("quarantined", "lost"): "idle",
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(LinkState, LinkEvent)))
def test_every_pair_of_state_and_event_moves_or_is_refused(state: LinkState, event: LinkEvent) -> None:
    if (state.value, event.value) in MOVES:
        assert advance(state, event).value == MOVES[state.value, event.value]
    else:
        with pytest.raises(StateMachineError, match=f"'{event.value}' can't happen in state '{state.value}'"):
            advance(state, event)


@pytest.mark.parametrize("state", [state for state in LinkState if state is not LinkState.IDLE])
def test_every_link_can_be_lost(state: LinkState) -> None:
    assert advance(state, LinkEvent.LOST) is LinkState.IDLE


FIRST = Tickets()
"""Never said hello."""
OFFERED = Tickets(pending="p")
"""Its first hello was answered, the confirmation has not come."""
SETTLED = Tickets(current="c")
RENEWING = Tickets(current="c", pending="p")
RESTORED = Tickets(current="c", superseded="s")
"""Came back once with an older ticket; `s` was current then."""


@pytest.mark.parametrize(
    ("tickets", "ticket", "current"),
    [
        (FIRST, "", True),
        (FIRST, "x", False),
        (OFFERED, "", True),
        (OFFERED, "p", True),
        (OFFERED, "x", False),
        (SETTLED, "c", True),
        (SETTLED, "", False),
        (SETTLED, "x", False),
        (RENEWING, "c", True),
        (RENEWING, "p", True),
        (RENEWING, "", False),
        (RENEWING, "x", False),
        (RESTORED, "c", True),
        (RESTORED, "", False),
        (RESTORED, "x", False),
    ],
)
@pytest.mark.parametrize("answers", [True, False])
def test_the_take_over_table(tickets: Tickets, ticket: str, current: bool, answers: bool) -> None:
    assert is_current(tickets, ticket) is current
    verdict = judge_newcomer(tickets, ticket, older_link_answers=answers)
    if answers:
        assert verdict is Newcomer.QUARANTINE
    else:
        assert verdict is (Newcomer.ADMIT if current else Newcomer.ROLLED_BACK)


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("tickets", [RESTORED, Tickets(current="s", superseded="s")])
def test_the_ticket_that_was_current_before_a_roll_back_betrays_the_twin(tickets: Tickets, answers: bool) -> None:
    """Also while the restored SE has not confirmed its new ticket yet, so that both names hold the same one."""
    assert judge_newcomer(tickets, "s", older_link_answers=answers) is Newcomer.QUARANTINE


@pytest.mark.parametrize(("size", "interval_s"), [(0, 5.0), (LARGE_FLEET, 5.0), (LARGE_FLEET + 1, 10.0)])
def test_a_large_fleet_beats_half_as_often(size: int, interval_s: float) -> None:
    assert heartbeat_interval(size, 5.0) == interval_s


INTERVAL_S = 5.0
STEP_S = 0.01
"""How often the simulated driver looks; a driver that sleeps until `next_at` looks no less exactly."""


def watch(byte_times: list[float], *, until: float, interval_s: float = INTERVAL_S) -> tuple[float | None, list[float]]:
    """Drives a watchdog past `byte_times`. Returns when it called the peer dead (None: never), and all its pings."""
    watchdog = Watchdog(interval_s=interval_s, now=0.0)
    arrivals = sorted(byte_times)
    pings: list[float] = []
    for tick in range(int(until / STEP_S)):
        now = tick * STEP_S
        while arrivals and arrivals[0] <= now:
            watchdog.alive(arrivals.pop(0))
        if watchdog.is_dead(now):
            return now, pings
        if watchdog.should_ping(now):
            watchdog.pinged(now)
            pings.append(now)
    return None, pings


@given(st.lists(st.floats(min_value=0.0, max_value=20.0), max_size=12))
def test_a_frozen_peer_is_dead_at_the_latest_after_an_interval_and_two_deadlines(byte_times: list[float]) -> None:
    dead_at, _ = watch(byte_times, until=40.0)
    assert dead_at is not None
    froze_at = max((at for at in byte_times if at <= dead_at), default=0.0)
    assert dead_at <= froze_at + INTERVAL_S + 2 * DEADLINE_S + 3 * STEP_S


@given(st.lists(st.floats(min_value=0.0, max_value=20.0), max_size=12))
def test_a_peer_is_never_dead_before_two_deadlines_of_silence(byte_times: list[float]) -> None:
    dead_at, pings = watch(byte_times, until=40.0)
    assert dead_at is not None
    silent_since = max((at for at in byte_times if at <= dead_at), default=0.0)
    assert dead_at - silent_since >= 2 * DEADLINE_S - STEP_S
    assert dead_at - pings[-1] >= DEADLINE_S - STEP_S
    assert pings[-1] - pings[-2] >= DEADLINE_S - STEP_S


@given(st.lists(st.floats(min_value=0.05, max_value=2 * DEADLINE_S - 0.05), min_size=20, max_size=60))
def test_a_peer_is_never_dead_while_bytes_arrive(gaps: list[float]) -> None:
    byte_times = list(itertools.accumulate(gaps))
    dead_at, _ = watch(byte_times, until=byte_times[-1])
    assert dead_at is None


def test_pings_keep_the_interval_while_the_peer_answers() -> None:
    _, pings = watch([at + 0.02 for at in (0.0, 5.0, 10.0, 15.0)], until=19.0)
    assert pings == pytest.approx([0.0, 5.0, 10.0, 15.0], abs=2 * STEP_S)


def test_a_byte_from_before_the_ping_does_not_answer_it() -> None:
    watchdog = Watchdog(interval_s=INTERVAL_S, now=100.0)
    watchdog.pinged(100.0)
    watchdog.alive(99.9)
    assert watchdog.next_at() == 100.0 + DEADLINE_S
    watchdog.alive(100.0)
    assert watchdog.next_at() == 100.0 + INTERVAL_S
    watchdog.alive(50.0)
    assert watchdog.next_at() == 100.0 + INTERVAL_S


def test_it_looks_when_it_said_it_would() -> None:
    watchdog = Watchdog(interval_s=INTERVAL_S, deadline_s=1.0, now=0.0)
    assert watchdog.should_ping(0.0)
    watchdog.pinged(0.0)
    assert watchdog.next_at() == 1.0
    assert not watchdog.should_ping(0.9)
    assert watchdog.should_ping(1.0)
    assert not watchdog.is_dead(1.0)
    watchdog.pinged(1.0)
    assert not watchdog.should_ping(9.0)
    assert not watchdog.is_dead(1.9)
    assert watchdog.is_dead(2.0)


@pytest.mark.parametrize("ticket", ["", "c", "anything"])
def test_after_a_restore_the_first_ticket_that_comes_counts(ticket: str) -> None:
    """Every SE's is newer than the backup's: a fleet of false alarms otherwise."""
    unknown = Tickets(current=UNKNOWN_TICKET)
    assert is_current(unknown, ticket)
    assert judge_newcomer(unknown, ticket, older_link_answers=False) is Newcomer.ADMIT
    assert judge_newcomer(unknown, ticket, older_link_answers=True) is Newcomer.QUARANTINE


def test_the_proof_of_a_new_key_is_for_one_cluster_se_and_key() -> None:
    statements = {
        rotation_statement(*words) for words in (("c", "s", "k"), ("d", "s", "k"), ("c", "t", "k"), ("c", "s", "l"))
    }
    assert len(statements) == 4


@pytest.mark.parametrize(
    ("theirs", "spoken"),
    [
        (-1, None),
        (OLDEST_PROTOCOL_NUMBER - 1, None),
        (OLDEST_PROTOCOL_NUMBER, OLDEST_PROTOCOL_NUMBER),
        (PROTOCOL_NUMBER, PROTOCOL_NUMBER),
        (PROTOCOL_NUMBER + 1, PROTOCOL_NUMBER),
        (PROTOCOL_NUMBER + 2, None),
        (2**60, None),
    ],
)
def test_neighbouring_protocol_numbers_understand_each_other(theirs: int, spoken: int | None) -> None:
    assert agree(theirs) == spoken
    if spoken is not None:
        assert agree(spoken) == spoken, "the agent takes the answer"


def test_only_the_protocol_before_this_one_is_spoken() -> None:
    assert PROTOCOL_NUMBER - OLDEST_PROTOCOL_NUMBER == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [("", 1), ("1", 1), ("2", 2), ("007", 7), ("x", 0), ("-1", 0), ("1.0", 0), ("\u0662", 0), ("9" * 5000, 0)],
)
def test_a_number_in_a_header_is_read_or_counts_as_none(text: str, number: int) -> None:
    assert parse_number(text) == number
