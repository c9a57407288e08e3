"""Events: ids grow by one, the log is bounded, and who waits is woken."""

from __future__ import annotations

import asyncio
import logging

import pytest
from controller_parts import run_jumping

from appliance.controller import events as module
from appliance.controller.events import MAX_EVENTS, Events
from appliance.protocol.operator import Event


def made() -> Events:
    return Events(lambda: 1000.0)


def emit(events: Events, count: int, kind: str = "se.state") -> None:
    for number in range(count):
        events.emit("tunnel", kind, f"s-{number}", f"text {number}")


BASE = 1000 << 20
"""Where ids begin at the second 1000."""


def ids(events: list[Event]) -> list[int]:
    return [event.id - BASE for event in events]


def test_ids_grow_by_one_and_after_gives_what_is_newer() -> None:
    events = made()
    emit(events, 5)
    assert ids(events.after(0)) == [1, 2, 3, 4, 5]
    assert ids(events.after(BASE + 3)) == [4, 5]
    assert events.after(BASE + 5) == []
    assert events.after(-7) == events.after(0)
    (last,) = events.after(BASE + 4)
    assert last == Event(id=BASE + 5, time=1000.0, stage="tunnel", kind="se.state", subject="s-4", text="text 4")


def test_a_follower_of_an_earlier_process_gets_all_of_this_one() -> None:
    """Whichever of the two had the higher ids: a clock may have been set back between them."""
    earlier, later = Events(lambda: 999.0), made()
    emit(earlier, 3)
    emit(later, 2)
    assert ids(later.after(earlier.after(0)[-1].id)) == [1, 2]
    assert len(earlier.after(later.after(0)[-1].id)) == 3
    assert later.after(0)[-1].id < 2**53, "it must survive being a number of JSON"


def test_the_log_is_bounded_and_counts_go_on() -> None:
    logging.getLogger(module.__name__).disabled = True
    try:
        events = made()
        emit(events, MAX_EVENTS + 7)
    finally:
        logging.getLogger(module.__name__).disabled = False
    kept = ids(events.after(0))
    assert (len(kept), kept[0], kept[-1]) == (MAX_EVENTS, 8, MAX_EVENTS + 7)
    assert events.counts["se.state"] == MAX_EVENTS + 7


def test_events_are_logged_with_their_stage(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made().emit("enroll", "enroll.granted", "s-1", "se-1 enrolled")
    (record,) = caplog.records
    assert record.getMessage() == "se-1 enrolled"
    assert (record.stage, record.kind, record.subject) == ("enroll", "enroll.granted", "s-1")  # type: ignore[attr-defined]


def test_a_percent_sign_in_a_text_is_only_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made().emit("enroll", "k", "s", "100 % of %s")
    assert caplog.records[0].getMessage() == "100 % of %s"


def test_waiting_ends_with_the_next_event_for_all_who_wait() -> None:
    async def go() -> None:
        events = made()
        emit(events, 2)
        loop = asyncio.get_running_loop()
        waiting = [asyncio.create_task(events.wait_after(BASE + 2, wait_s=60)) for _ in range(3)]
        await asyncio.sleep(30)
        assert not any(task.done() for task in waiting)
        emit(events, 1)
        assert [ids(found) for found in await asyncio.gather(*waiting)] == [[3]] * 3
        assert loop.time() == 1030.0

    run_jumping(go())


def test_waiting_is_bounded_and_what_is_there_is_given_at_once() -> None:
    async def go() -> None:
        events = made()
        loop = asyncio.get_running_loop()
        assert await events.wait_after(0, wait_s=60) == []
        assert loop.time() == 1060.0
        assert await events.wait_after(0, wait_s=0) == []
        emit(events, 1)
        assert ids(await events.wait_after(0, wait_s=60)) == [1]
        assert loop.time() == 1060.0
        # A follower of a process whose clock was ahead.
        assert ids(await events.wait_after(BASE + 500, wait_s=60)) == [1]
        assert loop.time() == 1060.0

    run_jumping(go())


def test_who_gives_up_waiting_leaves_nothing_behind() -> None:
    async def go() -> None:
        events = made()
        waiting = asyncio.create_task(events.wait_after(0, wait_s=60))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not events._arrived._waiters

    run_jumping(go())
