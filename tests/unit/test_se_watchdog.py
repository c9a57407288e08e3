"""The guard of a link, with short real times: it ends what is silent, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from appliance.runtime.clock import SystemClock
from appliance.se import watchdog
from appliance.se.watchdog import Guard

CLOCK = SystemClock()


class Line:
    """What is watched."""

    def __init__(self) -> None:
        self.received_at = CLOCK.monotonic()
        self.closed_at = 0.0

    def close(self) -> None:
        self.closed_at = self.closed_at or CLOCK.monotonic()


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def make(line: Line) -> Iterator[Callable[..., Guard]]:
    made: list[Guard] = []

    def one(*, login_s: float = 60.0, deadline_s: float = 0.2) -> Guard:
        made.append(Guard(line, CLOCK, login_deadline_s=login_s, deadline_s=deadline_s))
        made[-1].start()
        return made[-1]

    yield one
    for guard in made:
        guard.end()
        guard.join()


def test_log_in_has_one_deadline(line: Line, make: Callable[..., Guard]) -> None:
    guard = make(login_s=0.1)
    guard.join()
    assert line.closed_at
    assert "no log-in within 0.1 s" in guard.reason
    assert not guard.wait_due()


def test_a_silent_peer_is_dead_after_two_deadlines(line: Line, make: Callable[..., Guard]) -> None:
    guard = make()
    begun = time.monotonic()
    guard.greeted(0.1)
    assert guard.wait_due(), "the first ping at once"
    assert guard.wait_due(), "the second when the first one's deadline is over"
    assert not guard.wait_due()
    assert 0.35 <= line.closed_at - begun <= 1.0
    assert "silent" in guard.reason


def test_any_byte_is_life(line: Line, make: Callable[..., Guard]) -> None:
    guard = make()
    guard.greeted(0.05)
    for _ in range(12):
        assert guard.wait_due()
        line.received_at = CLOCK.monotonic()
        guard.answered(0.05)
    assert not line.closed_at


def test_pings_nobody_took_count(line: Line, make: Callable[..., Guard]) -> None:
    """The link's thread is stuck in a send: the guard goes on by itself."""
    guard = make()
    guard.greeted(0.1)
    guard.join()
    assert line.closed_at


def test_leaving_gives_a_moment_for_goodbye(
    line: Line, make: Callable[..., Guard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "GOODBYE_S", 0.2)
    guard = make()
    guard.greeted(60.0)
    assert guard.wait_due()
    begun = CLOCK.monotonic()
    guard.leave()
    assert not guard.wait_due()
    assert guard.is_leaving
    guard.join()
    assert 0.15 <= line.closed_at - begun <= 1.0


def test_leaving_before_the_greeting_is_at_once(line: Line, make: Callable[..., Guard]) -> None:
    guard = make()
    begun = CLOCK.monotonic()
    guard.leave()
    guard.join()
    assert line.closed_at - begun < 0.2


def test_a_lost_connection_ends_the_wait_at_once(line: Line, make: Callable[..., Guard]) -> None:
    guard = make()
    guard.greeted(60.0)
    assert guard.wait_due()
    lost = threading.Timer(0.05, guard.lost)
    lost.start()
    begun = CLOCK.monotonic()
    assert not guard.wait_due()
    assert CLOCK.monotonic() - begun < 5
    assert guard.reason == "", "the connection knows why it is over"
    lost.join()


def test_an_end_has_no_reason_of_the_guard(line: Line, make: Callable[..., Guard]) -> None:
    guard = make()
    guard.answered(1.0)
    guard.end()
    guard.join()
    assert guard.reason == ""
    assert line.closed_at


@pytest.mark.parametrize(("asked", "taken"), [(0.0, 0.05), (-1.0, 0.05), (1e9, 600.0), (float("inf"), 600.0)])
def test_intervals_are_bounded(asked: float, taken: float, make: Callable[..., Guard]) -> None:
    guard = make()
    guard.greeted(asked)
    assert guard._watchdog is not None
    assert guard._watchdog.interval_s == taken
