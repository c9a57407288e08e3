"""Who is let in, and who gets which slot."""

from __future__ import annotations

import itertools

import pytest

from appliance.controller.slots import BURST, FEW, HASTE, LATE_S, LOWEST_RATE_PER_S, TICK_S, Slots
from appliance.protocol.tunnel import MAX_SLOT_S, read_slot, slot_line


def late(slots: Slots) -> None:
    slots.tick(LATE_S * 2)


def test_a_few_are_always_let_in() -> None:
    slots = Slots()
    late(slots)
    assert [slots.enter(1.0) for _ in range(FEW)] == [0.0] * FEW
    assert slots.enter(1.0) > 0


def test_while_the_loop_is_on_time_more_are_let_in_a_burst_a_tick() -> None:
    slots = Slots()
    for _ in range(FEW):
        slots.enter(0.0)
    slots.tick(0.0)
    assert [slots.enter(1.0) for _ in range(BURST)] == [0.0] * BURST
    assert slots.enter(1.0) > 0
    slots.tick(0.0)
    assert slots.enter(1.0 + TICK_S) == 0.0


def test_slots_are_one_after_the_other_and_in_sight() -> None:
    slots = Slots()
    late(slots)
    for _ in range(FEW):
        slots.enter(5.0)
    given = [slots.enter(5.0) for _ in range(50_000)]
    assert slots.shed == len(given)
    assert all(0 < wait_s <= MAX_SLOT_S for wait_s in given)
    early = given[:1000]
    assert early == sorted(set(early))
    steps = {round(later - sooner, 9) for sooner, later in itertools.pairwise(early)}
    assert steps == {round(1 / (slots.rate_per_s * HASTE), 9)}


def test_who_leaves_makes_room() -> None:
    slots = Slots()
    late(slots)
    for _ in range(FEW):
        slots.enter(0.0)
    slots.leave()
    assert slots.enter(0.1) == 0.0


@pytest.mark.parametrize("per_tick", [1, 5, 20])
def test_the_rate_follows_what_is_finished(per_tick: int) -> None:
    slots = Slots()
    for _ in range(400):
        while slots.under_way < FEW + per_tick:
            slots.under_way += 1
        for _ in range(per_tick):
            slots.leave()
        slots.tick(0.0)
    assert slots.rate_per_s == pytest.approx(max(LOWEST_RATE_PER_S, per_tick / TICK_S), rel=0.05)


def test_an_idle_gateway_forgets_nothing_of_its_rate() -> None:
    slots = Slots()
    before = slots.rate_per_s
    for _ in range(100):
        slots.tick(0.0)
    assert slots.rate_per_s == before


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
