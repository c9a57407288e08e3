"""12: ways that are bad: long, uneven, lossy, flapping, and ones that forget a connection without telling anybody."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from lab_rig import NOTICE_S, SLACK_S, RealSe, Site, site
from rig import until
from rough import RoughCable, judged

from appliance.protocol.why import Step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, RealSe, RoughCable]]:
    """A controller and one SE that is UP, over a rough cable."""
    with site(tmp_path_factory.mktemp("rough"), cable=RoughCable) as found:
        se = found.se("se-1").start()
        found.until_up(se)
        assert isinstance(found.ssh, RoughCable)
        yield found, se, found.ssh


@pytest.fixture(autouse=True)
def smooth(place: tuple[Site, RealSe, RoughCable]) -> Iterator[None]:
    """Leaves a good cable to the next test."""
    yield
    at, se, cable = place
    cable.delay_s = cable.jitter_s = cable.stall_s = 0.0
    cable.stalls_of_a_hundred = 0
    cable.mend()
    at.until_up(se)


def links(se: RealSe) -> int:
    """How often its link came up."""
    return se.logged().count("linked -> up")


@pytest.mark.parametrize(
    ("rtt_ms", "jitter_ms"),
    [
        pytest.param(70, 0, marks=pytest.mark.slow),
        (300, 0),
        pytest.param(300, 200, marks=pytest.mark.slow),
        pytest.param(1000, 0, marks=pytest.mark.slow),
        pytest.param(1000, 500, marks=pytest.mark.slow),
    ],
)
def test_a_long_way_is_told_and_carries_all(
    place: tuple[Site, RealSe, RoughCable], rtt_ms: int, jitter_ms: int
) -> None:
    at, se, cable = place
    with judged(at, se, back_s=10.0, samples_apart_s=4.0 + 8 * rtt_ms / 1000):
        cable.delay_s, cable.jitter_s = rtt_ms / 2000, jitter_ms / 2000
        before = links(se)
        cable.reset()  # the RTT is the least of a minute: a fresh link shows the new one at once
        until(lambda: links(se) > before, what="a link comes up over it", deadline_s=5.0 + 20 * rtt_ms / 1000)
        at.until_state(se, "DEGRADED RTT_HIGH", deadline_s=5.0 + 20 * rtt_ms / 1000)
        assert "below 70 ms expected" in at.controller.operator.se("se-1").summary.text
        told = at.controller.command("why", "se-1", check=False).stdout
        assert "RTT_HIGH" in told
        assert se.state == "UP", "a long way is no outage"
        beats = at.controller.operator.se("se-1").last_heartbeat_at
        until(lambda: at.controller.operator.se("se-1").last_heartbeat_at > beats + 3.0, what="it holds")
        assert links(se) == before + 1
        cable.delay_s = cable.jitter_s = 0.0


def test_losses_that_tcp_mends_cost_no_link(place: tuple[Site, RealSe, RoughCable]) -> None:
    """One piece in four comes 0.3 s late, as after a lost packet: the watchdog's deadline is longer."""
    at, se, cable = place
    before = links(se)
    with judged(at, se, back_s=10.0):
        cable.stall_s, cable.stalls_of_a_hundred = 0.3, 25
        beats = at.controller.operator.se("se-1").last_heartbeat_at
        until(lambda: at.controller.operator.se("se-1").last_heartbeat_at > beats + 5.0, what="it holds")
        cable.stalls_of_a_hundred = 0
    assert links(se) == before


def test_a_nat_that_forgets_the_connection(place: tuple[Site, RealSe, RoughCable]) -> None:
    """Both ends wait for each other, nobody resets: the watchdogs notice, and the SE's next link is its own again."""
    at, se, cable = place
    with judged(at, se, back_s=10.0):
        before = links(se)
        cable.forget()
        until(lambda: se.state == "DOWN" or links(se) > before, what="the SE notices", deadline_s=NOTICE_S + SLACK_S)
        told = se.failed(Step.LINK)
        assert not told or "the controller is silent" in told
        until(lambda: links(se) > before, what="the SE is linked anew", deadline_s=5.0)
    assert at.events("se.clone") == []
    assert at.events("se.rolled-back") == []


def boots(at: Site, se: RealSe) -> None:
    """Starts an SE after a power cut; it is UP within 12 s."""
    se.start()
    began = time.monotonic()
    until(lambda: se.state == "UP", what="the SE is back", deadline_s=10.0)
    at.until_state(se, "UP OK", deadline_s=5.0)
    assert time.monotonic() - began < 12.0


def test_a_power_cut_leaves_half_a_connection_and_no_clone(place: tuple[Site, RealSe, RoughCable]) -> None:
    """The SE is gone without a word, its address still looks connected; it boots and comes back while the controller
    believes in the old link."""
    at, se, cable = place
    with judged(at, se, back_s=10.0, restarts=True, samples_apart_s=15.0):
        cable.forget()
        se.kill()
        at.until_state(se, "DOWN HEARTBEAT_MISSED", deadline_s=NOTICE_S + SLACK_S)
        told = at.controller.operator.why("se-1").verdict
        assert re.search(r"stopped at link: nothing heard for [\d.]+ s, and a ping went unanswered", told)
        boots(at, se)
    assert at.events("se.clone") == []


def test_a_short_power_cut_leaves_half_a_connection(place: tuple[Site, RealSe, RoughCable]) -> None:
    """It is back before anybody noticed: the controller asks the old link, hears nothing, and lets the new one in."""
    at, se, cable = place
    with judged(at, se, back_s=10.0, restarts=True, samples_apart_s=15.0):
        cable.forget()
        se.kill()
        boots(at, se)
    assert at.events("se.clone") == []


def flap(at: Site, se: RealSe, cable: RoughCable, *, seconds: float) -> tuple[int, int]:
    """Cuts and mends every second; returns how many dials and links it took."""
    dials, before = se.logged().count("idle -> dialing"), links(se)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        cable.cut()
        cable.reset()
        time.sleep(1.0)  # the rhythm of the flapping, not a wait for something
        cable.mend()
        time.sleep(1.0)
    return se.logged().count("idle -> dialing") - dials, links(se) - before


@pytest.mark.parametrize("seconds", [10.0, pytest.param(300.0, marks=pytest.mark.slow)])
def test_flapping_makes_no_storm_and_heals(place: tuple[Site, RealSe, RoughCable], seconds: float) -> None:
    """Every two seconds for a while: the back-off isn't reset by links that live a second, and afterwards it ends."""
    at, se, cable = place
    with judged(at, se, back_s=10.0):
        dials, _ = flap(at, se, cable, seconds=seconds)
        # With the short back-off of these tests, at most 1 s, half of it on average, and a try takes its time.
        assert dials <= 2.5 * seconds, "no storm"
        assert dials >= 1
        assert se.state in {"UP", "DOWN"}
        told = at.controller.operator.why("se-1")
        assert told.verdict.endswith("(FLAPPING)")
        assert "its link was lost" in told.verdict
    assert at.controller.operator.se("se-1").alarms == []
