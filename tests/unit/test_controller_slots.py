"""Who is let in, who waits in line, and who gets which slot."""

from __future__ import annotations

import itertools

import pytest

from appliance.controller.slots import (
    BURST,
    COMING_UP_S,
    FEW,
    FIRST_RATE_PER_S,
    HASTE,
    LATE_S,
    LINE_S,
    LOWEST_RATE_PER_S,
    PATIENCE_S,
    TICK_S,
    Line,
    Slots,
)
from appliance.protocol.tunnel import MAX_SLOT_S, read_slot, slot_line


def enter(slots: Slots) -> bool:
    """One comes, and is let in or not."""
    if not slots.may_enter():
        return False
    slots.enter()
    return True


def test_a_few_are_always_let_in() -> None:
    slots = Slots()
    slots.tick(LATE_S * 2, 0)
    assert [enter(slots) for _ in range(FEW + 1)] == [True] * FEW + [False]


def test_while_the_loop_is_on_time_more_are_let_in_a_burst_a_tick() -> None:
    slots = Slots()
    for _ in range(FEW):
        slots.enter()
    slots.tick(0.0, 0)
    assert [enter(slots) for _ in range(BURST + 1)] == [True] * BURST + [False]
    slots.tick(0.0, 0)
    assert enter(slots)


def test_no_more_log_in_than_come_up_in_time() -> None:
    """A store that is slow, or SEs that are, show in no late loop. Strangers don't count: they'd keep SEs out."""
    slots = Slots()
    for _ in range(int(FIRST_RATE_PER_S * COMING_UP_S)):
        slots.enter()
        slots.logged_in()
    slots.tick(0.0, 0)
    assert not enter(slots)
    slots.leave(logged_in=True)
    assert enter(slots)
    strangers = Slots()
    for _ in range(10_000):
        strangers.enter()
    strangers.tick(0.0, 0)
    assert enter(strangers)


def test_slots_are_one_after_the_other_and_in_sight() -> None:
    slots = Slots()
    given = [slots.slot(5.0) for _ in range(50_000)]
    assert slots.shed == len(given)
    assert all(LINE_S / 2 < wait_s <= MAX_SLOT_S for wait_s in given)
    early = given[:1000]
    assert early == sorted(set(early))
    steps = {round(later - sooner, 9) for sooner, later in itertools.pairwise(early)}
    assert steps == {round(1 / (slots.rate_per_s * HASTE), 9)}


def test_who_leaves_makes_room() -> None:
    slots = Slots()
    slots.tick(LATE_S * 2, 0)
    for _ in range(FEW):
        slots.enter()
    slots.leave()
    assert enter(slots)


@pytest.mark.parametrize("per_tick", [0, 1, 5, 20])
def test_the_rate_follows_what_is_finished_while_somebody_waits(per_tick: int) -> None:
    slots = Slots()
    slots.leave()
    for _ in range(1000):
        slots.tick(0.0, 1)
        for _ in range(per_tick):
            slots.leave()
    assert slots.rate_per_s == pytest.approx(max(LOWEST_RATE_PER_S, per_tick / TICK_S), rel=0.05)
    assert slots.places == int(slots.rate_per_s * LINE_S)


def test_before_the_first_came_through_nothing_is_known_of_the_rate() -> None:
    slots = Slots()
    for _ in range(100):
        slots.tick(0.0, 500)
    assert slots.rate_per_s == FIRST_RATE_PER_S
    slots.leave()
    slots.tick(0.0, 500)
    assert slots.rate_per_s < FIRST_RATE_PER_S


def test_an_idle_gateway_forgets_nothing_of_its_rate() -> None:
    slots = Slots()
    slots.leave()
    slots.tick(0.0, 1)
    before = slots.rate_per_s
    for _ in range(100):
        slots.tick(0.0, 0)
    assert slots.rate_per_s == before


def test_a_line_is_first_come_first_served_and_goes_round_the_networks() -> None:
    line: Line[str] = Line()
    for name in ("a1", "a2", "a3", "b1", "a4", "c1", "b2"):
        line.append(name[0], name, 0.0)
    assert (len(line), line.of("a"), line.of("b"), line.of("x")) == (7, 4, 2, 0)
    assert [line.pop() for _ in range(7)] == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    assert not line
    with pytest.raises(IndexError, match="nobody"):
        line.pop()


def test_who_waited_too_long_is_taken_out() -> None:
    line: Line[str] = Line()
    for at, name in enumerate(("a1", "b1", "a2", "c1")):
        line.append(name[0], name, float(at))
    assert list(line.pop_late(PATIENCE_S)) == []
    assert list(line.pop_late(PATIENCE_S + 2.5)) == ["a1", "a2", "b1"]
    assert line.pop() == "c1"
    assert not line


@pytest.mark.parametrize("wait_s", [0.0, 0.001, 12.345, MAX_SLOT_S])
def test_a_slot_is_said_and_read(wait_s: float) -> None:
    assert read_slot(slot_line(wait_s)) == pytest.approx(wait_s)


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        (b"SSH-2.0-appliance\r\n", None),
        (b"appliance-slot: 1", None),
        (b"appliance-slot: -1 ms\r\n", None),
        (b"appliance-slot: 1e9 ms\r\n", None),
        (b"appliance-slot: 99999 ms\r\n", MAX_SLOT_S),
    ],
)
def test_what_is_no_slot_is_none_and_none_is_out_of_sight(received: bytes, expected: float | None) -> None:
    assert read_slot(received) == expected
