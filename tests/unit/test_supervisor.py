"""The supervisor's table: who ends, who is restarted, who takes all the others along."""

from __future__ import annotations

import itertools
import logging
import re
import threading

import pytest

from appliance.errors import TunnelError
from appliance.runtime.clock import SystemClock
from appliance.runtime.stop import StopToken
from appliance.runtime.supervisor import STEADY_AFTER_S, Supervisor


def until_stopped(token: StopToken) -> None:
    token.wait(None)


@pytest.fixture
def stop() -> StopToken:
    return StopToken()


@pytest.fixture(autouse=True)
def no_thread_stays() -> object:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_a_stop_reaches_all_services_and_run_returns(stop: StopToken) -> None:
    supervisor = Supervisor(stop, clock=SystemClock())
    supervisor.add("waits", until_stopped, critical=True)

    def stops(token: StopToken) -> None:
        stop.stop("enough")
        until_stopped(token)

    supervisor.add("stops", stops, critical=False)
    supervisor.run()
    assert stop.reason == "enough"


def test_run_returns_when_all_services_have_nothing_left_to_do(stop: StopToken) -> None:
    done = []
    supervisor = Supervisor(stop, clock=SystemClock())
    supervisor.add("once", lambda _: done.append(1), critical=True)
    supervisor.add("also once", lambda _: done.append(2), critical=False)
    supervisor.run()
    assert sorted(done) == [1, 2]
    assert not stop.stopped


def test_without_services_run_returns(stop: StopToken) -> None:
    Supervisor(stop, clock=SystemClock()).run()


def test_a_critical_failure_stops_the_others_and_is_raised(stop: StopToken, caplog: pytest.LogCaptureFixture) -> None:
    others: list[str] = []

    def fails(_: StopToken) -> None:
        raise TunnelError("no way")

    def other(token: StopToken) -> None:
        token.wait(None)
        others.append(token.reason)

    supervisor = Supervisor(stop, clock=SystemClock())
    supervisor.add("other", other, critical=False)
    supervisor.add("tunnel", fails, critical=True)
    with caplog.at_level(logging.INFO), pytest.raises(TunnelError, match="no way"):
        supervisor.run()
    assert others == ["critical service 'tunnel' failed: no way"]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == "critical service 'tunnel' failed: no way"
    assert not record.exc_info, "a known error needs no traceback"


def test_even_an_exit_in_a_thread_is_seen(stop: StopToken) -> None:
    def ends(_: StopToken) -> None:
        raise SystemExit(3)

    supervisor = Supervisor(stop, clock=SystemClock())
    supervisor.add("ends", ends, critical=False)
    with pytest.raises(SystemExit):
        supervisor.run()


def test_others_are_restarted_until_they_hold(stop: StopToken, caplog: pytest.LogCaptureFixture) -> None:
    tries = itertools.count(1)

    def third_time(token: StopToken) -> None:
        if next(tries) < 3:
            raise ValueError("not yet")
        stop.stop("held")
        until_stopped(token)

    supervisor = Supervisor(stop, clock=SystemClock())
    supervisor.add("telemetry", third_time, critical=False)
    with caplog.at_level(logging.INFO):
        supervisor.run()
    said = [record.getMessage() for record in caplog.records]
    assert sum("starts again in" in line for line in said) == 2
    assert all(record.exc_info for record in caplog.records if record.levelno == logging.WARNING)
    assert said[-1] == "service 'telemetry' ended: held"


class Years:
    """A clock on which every life is a long one."""

    def __init__(self) -> None:
        self._at = itertools.count(0.0, STEADY_AFTER_S + 1)

    def now(self) -> float:
        return 0.0

    def monotonic(self) -> float:
        return next(self._at)

    def synchronised(self) -> bool:
        return True


def test_a_long_life_resets_the_back_off(stop: StopToken, caplog: pytest.LogCaptureFixture) -> None:
    tries = itertools.count(1)

    def fails(_: StopToken) -> None:
        if next(tries) > 6:
            stop.stop("seen")
        raise TunnelError("again")

    supervisor = Supervisor(stop, clock=Years(), join_timeout_s=1e9)
    supervisor.add("telemetry", fails, critical=False)
    supervisor.run()
    waits = re.findall(r"starts again in ([0-9.]+) s", caplog.text)
    assert len(waits) == 6
    assert max(map(float, waits)) <= 0.5


def test_a_failure_while_stopping_is_no_failure(stop: StopToken, caplog: pytest.LogCaptureFixture) -> None:
    def fails_late(token: StopToken) -> None:
        stop.stop("now")
        token.wait(None)
        raise TunnelError("the socket was closed under me")

    supervisor = Supervisor(stop, clock=SystemClock())
    supervisor.add("tunnel", fails_late, critical=True)
    supervisor.run()
    assert "failed while it stopped" in caplog.text


def test_a_service_that_does_not_stop_is_named_and_left(stop: StopToken, caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    threads: list[threading.Thread] = []

    def deaf(_: StopToken) -> None:
        threads.append(threading.current_thread())
        stop.stop("now")
        release.wait()

    supervisor = Supervisor(stop, clock=SystemClock(), join_timeout_s=0.05)
    supervisor.add("deaf", deaf, critical=True)
    supervisor.run()
    assert "service 'deaf' didn't stop within 0.05 s" in caplog.text
    release.set()
    threads[0].join(10.0)


def test_the_tick_goes_on_while_services_run(stop: StopToken) -> None:
    ticks = itertools.count(1)

    def tick() -> None:
        if next(ticks) >= 3:
            stop.stop("ticked")

    supervisor = Supervisor(stop, clock=SystemClock(), tick=tick, tick_s=0.001)
    supervisor.add("waits", until_stopped, critical=True)
    supervisor.run()
    assert next(ticks) >= 4


def test_a_stopped_token_starts_nothing(stop: StopToken) -> None:
    stop.stop("before")
    started = []
    supervisor = Supervisor(stop, clock=SystemClock())
    supervisor.add("never", lambda _: started.append(1), critical=True)
    supervisor.run()
    assert not started
