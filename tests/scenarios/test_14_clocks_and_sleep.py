"""14: wall clocks that jump by hours under running daemons, both ways, on either side; and an SE that sleeps."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator

import pytest
from lab_rig import NOTICE_S, SLACK_S, RealSe, Site
from rig import until
from rough import OtherClock, judged

HOUR_S = 3600.0


class Timed(Site):
    """A site whose controller and SE see clocks that a test moves."""

    clocks: dict[str, OtherClock]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Timed, RealSe]]:
    """A controller and one SE that is UP, each with a clock of its own."""
    root = tmp_path_factory.mktemp("clocks")
    clocks = {name: OtherClock(root / name) for name in ("controller", "SE")}
    at = Timed(root / "site")
    at.clocks = clocks
    try:
        at.controller.start(wrap=clocks["controller"].wrap)
        se = at.se("se-1").start(wrap=clocks["SE"].wrap)
        at.until_up(se)
        yield at, se
    finally:
        at.close()
        for clock in clocks.values():
            clock.close()


@pytest.mark.parametrize(
    ("whose", "hours"),
    [
        ("SE", 7),
        ("controller", -7),
        pytest.param("SE", -7, marks=pytest.mark.slow),
        pytest.param("controller", 7, marks=pytest.mark.slow),
    ],
)
def test_a_clock_that_jumps(place: tuple[Timed, RealSe], whose: str, hours: int) -> None:
    """No link is lost, no deadline fires early or late; the skew is told while it lasts, and nothing of it stays."""
    at, se = place
    links = se.logged().count("linked -> up")
    # What is measured meanwhile carries the wrong time, so only what comes after counts here.
    with judged(at, se, back_s=10.0, samples_apart_s=8 * HOUR_S):
        at.clocks[whose].jump(hours * HOUR_S)
        at.until_state(se, "DEGRADED CLOCK_SKEW", deadline_s=NOTICE_S)
        found = re.search(r"the SE's clock is off by ([+-]\d+) s", at.controller.operator.se("se-1").summary.text)
        ahead = hours if whose == "SE" else -hours
        assert found is not None
        assert abs(int(found[1]) - ahead * HOUR_S) < 60.0
        assert "CLOCK_SKEW" in at.controller.command("why", "se-1", check=False).stdout
        beats = at.controller.operator.se("se-1").last_heartbeat_at
        until(lambda: at.controller.operator.se("se-1").last_heartbeat_at > beats + 2.0, what="heartbeats go on")
        assert se.state == "UP"
        # A redial under the wrong clock: freshness comes from nonces and tickets, never from the time.
        at.ssh.reset()
        until(lambda: se.logged().count("linked -> up") == links + 1, what="the SE is linked anew")
        at.until_state(se, "DEGRADED CLOCK_SKEW", deadline_s=5.0)
        at.clocks[whose].jump(0.0)
        right_at = time.time()
    until(lambda: at.samples_without_gap(se, right_at, most_s=3.0), what="all telemetry since then arrives")
    assert se.logged().count("linked -> up") == links + 1


def test_an_se_that_slept_for_hours(place: tuple[Timed, RealSe]) -> None:
    """Suspended with its link up, resumed hours later with the time of day still that of going to sleep."""
    at, se = place
    with judged(at, se, back_s=10.0, samples_apart_s=8 * HOUR_S, lost="nothing heard for"):
        se.signal(signal.SIGSTOP)
        at.until_state(se, "DOWN HEARTBEAT_MISSED", deadline_s=NOTICE_S + SLACK_S)
        assert at.controller.operator.why("se-1").verdict.startswith("stopped at link: nothing heard for")
        at.clocks["SE"].jump(-7 * HOUR_S)
        se.signal(signal.SIGCONT)
        at.until_state(se, "DEGRADED CLOCK_SKEW", deadline_s=NOTICE_S + 3.0)
        assert "CLOCK_SKEW" in at.controller.command("why", "se-1", check=False).stdout
        at.clocks["SE"].jump(0.0)  # its time service comes round
        right_at = time.time()
    until(lambda: at.samples_without_gap(se, right_at, most_s=3.0), what="all telemetry since then arrives")
    assert at.events("se.clone") == []
