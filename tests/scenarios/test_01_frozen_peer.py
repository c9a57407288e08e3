"""01: a peer that stops running, but whose kernel keeps the connection open. SIGSTOP does exactly that."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator

import pytest
from lab_rig import NOTICE_S, SLACK_S, RealSe, Site, no_leak, site
from rig import until

from appliance.protocol.why import Step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, RealSe]]:
    """A controller and one SE that is UP."""
    with site(tmp_path_factory.mktemp("frozen")) as found:
        se = found.se("se-1").start()
        found.until_up(se)
        yield found, se


@contextlib.contextmanager
def frozen(stop: int, signal_to: RealSe | Site) -> Iterator[None]:
    """One side doesn't run."""
    send = signal_to.signal if isinstance(signal_to, RealSe) else signal_to.controller.signal
    send(stop)
    try:
        yield
    finally:
        send(signal.SIGCONT)


def test_a_frozen_se_is_told_down_and_comes_back_by_itself(place: tuple[Site, RealSe]) -> None:
    at, se = place
    controller_pid = at.controller.process.pid if at.controller.process else 0
    number = at.controller.operator.se("se-1").summary.number
    with no_leak(lambda: controller_pid), no_leak(lambda: se.pid):
        with frozen(signal.SIGSTOP, se):
            began = time.monotonic()
            at.until_state(se, "DOWN HEARTBEAT_MISSED", deadline_s=NOTICE_S + SLACK_S)
            assert time.monotonic() - began > 1.0, "a peer that was heard a moment ago isn't given up"
            chain = at.controller.operator.why("se-1")
            assert chain.verdict.startswith("stopped at link: nothing heard for")
            assert "(HEARTBEAT_MISSED)" in chain.verdict
            # What it last wrote of itself is UP: nobody on its console is to believe that.
            doctor = json.loads(se.command("doctor", "--json").stdout)
            (told,) = [finding for finding in doctor["findings"] if finding["check"] == "daemon"]
            assert (doctor["ok"], told["result"]) == (False, "fail")
            assert f"process {se.pid} is stopped" in told["text"]
            assert se.command("status", "--check").returncode == 1
        began = time.monotonic()
        at.until_up(se, deadline_s=5.0)
    detail = at.controller.operator.se("se-1")
    assert detail.summary.number == number
    assert detail.alarms == []
    assert at.events("se.clone") == at.events("se.rolled-back") == []
    assert at.controller.operator.why("se-1").verdict == "all steps happened"


def test_a_frozen_controller_is_noticed_by_the_se_which_comes_back(place: tuple[Site, RealSe]) -> None:
    at, se = place
    controller_pid = at.controller.process.pid if at.controller.process else 0
    thawed = 0.0
    with no_leak(lambda: controller_pid), no_leak(lambda: se.pid):
        with frozen(signal.SIGSTOP, at):
            until(lambda: se.state == "DOWN", what="the SE says DOWN", deadline_s=NOTICE_S + SLACK_S)
            told = until(lambda: se.failed(Step.LINK), what="the SE says why")
            assert "the controller is silent: two pings unanswered" in told
            assert "TUNNEL-039" in told
            # Its own console says the same, though nobody answers on the other side.
            assert "the controller is silent" in se.why().verdict
            doctor = json.loads(at.controller.command("doctor", "--json", check=False).stdout)
            told = [finding["text"] for finding in doctor["findings"] if finding["check"] == "daemon"]
            assert f"process {controller_pid} is stopped" in told[0]
            thawed = time.time()
        at.until_up(se, deadline_s=5.0)
    assert at.controller.operator.se("se-1").alarms == []
    assert not any("CLOCK_SKEW" in event.text for event in at.controller.operator.events()), "it was this side's freeze"
    # What was measured while nobody listened was kept and delivered.
    until(lambda: at.samples_without_gap(se, thawed - NOTICE_S, most_s=2.0), what="telemetry has no gap")
