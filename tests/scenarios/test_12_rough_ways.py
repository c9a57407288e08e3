"""12: ways that are bad: long, uneven, lossy, flapping, and ones that forget a connection without telling anybody."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from lab_rig import NOTICE_S, SLACK_S, RealSe, Site, site
from rig import until
from rough import RoughCable, judged
from traffic import ECHO, Traffic, echo_service, forwarded

from appliance.protocol.tunnel import STEADY_AFTER_S
from appliance.protocol.why import Step
from appliance.runtime.backoff import FLOOR_S


class Place(NamedTuple):
    """A controller and one SE over a rough cable, which carries traffic of a local program all the while."""

    at: Site
    se: RealSe
    cable: RoughCable
    traffic: Traffic


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """It is UP."""
    with (
        echo_service() as echo,
        site(tmp_path_factory.mktemp("rough"), cable=RoughCable, services={ECHO: f"127.0.0.1:{echo}"}) as found,
    ):
        se = found.se("se-1")
        port = forwarded(se)
        se.start()
        found.until_up(se)
        assert isinstance(found.ssh, RoughCable)
        traffic = Traffic(port)
        yield Place(found, se, found.ssh, traffic)
        traffic.close()


@pytest.fixture(autouse=True)
def smooth(place: Place) -> Iterator[None]:
    """Leaves a good cable to the next test."""
    yield
    at, se, cable, _ = place
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
def test_a_long_way_is_told_and_carries_all(place: Place, rtt_ms: int, jitter_ms: int) -> None:
    at, se, cable, traffic = place
    with judged(at, se, traffic=traffic, back_s=10.0, samples_apart_s=4.0 + 8 * rtt_ms / 1000):
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


def test_losses_that_tcp_mends_cost_no_link(place: Place) -> None:
    """One piece in four comes 0.3 s late, as after a lost packet: the watchdog's deadline is longer."""
    at, se, cable, traffic = place
    before = links(se)
    with judged(at, se, traffic=traffic, back_s=10.0):
        cable.stall_s, cable.stalls_of_a_hundred = 0.3, 25
        beats = at.controller.operator.se("se-1").last_heartbeat_at
        until(lambda: at.controller.operator.se("se-1").last_heartbeat_at > beats + 5.0, what="it holds")
        cable.stalls_of_a_hundred = 0
    assert links(se) == before


def test_losses_that_tcp_cannot_mend_in_time_are_an_outage(place: Place) -> None:
    """Every second piece comes too late for the watchdogs: the link is given up, and both sides say for what."""
    at, se, cable, traffic = place
    lost = "nothing heard|the connection broke|the SE came back"
    with judged(at, se, traffic=traffic, back_s=15.0, samples_apart_s=30.0, lost=lost):
        before = links(se)
        cable.stall_s, cable.stalls_of_a_hundred = NOTICE_S + SLACK_S, 50
        until(lambda: se.state == "DOWN", what="the SE notices", deadline_s=3 * NOTICE_S)
        told = until(lambda: se.failed(Step.LINK), what="the SE says why", deadline_s=NOTICE_S)
        assert re.search("silent|no log-in within|the link (?:ended|broke)|no SSH", told), told
        until(lambda: at.controller.state("se-1").startswith("DOWN"), what="the controller tells it")
        verdict = at.controller.operator.why("se-1").verdict
        assert verdict.startswith("stopped at link: "), verdict
        cable.stalls_of_a_hundred = 0
        cable.reset()
        until(lambda: links(se) > before, what="the SE is linked anew", deadline_s=10.0)


def test_a_nat_that_forgets_the_connection(place: Place) -> None:
    """Both ends wait for each other, nobody resets: the watchdogs notice, and the SE's next link is its own again."""
    at, se, cable, traffic = place
    with judged(at, se, traffic=traffic, back_s=10.0, lost="the SE came back from|nothing heard for"):
        before = links(se)
        cable.forget()
        until(lambda: links(se) > before, what="the SE notices, and is linked anew", deadline_s=NOTICE_S + 5.0)
    assert "the controller is silent: " in se.logged().rpartition("linked -> up")[0].rpartition("linked -> up")[2]
    assert at.events("se.clone") == []
    assert at.events("se.rolled-back") == []


def boots(at: Site, se: RealSe) -> None:
    """Starts an SE after a power cut; it is UP within 12 s."""
    se.start()
    began = time.monotonic()
    until(lambda: se.state == "UP", what="the SE is back", deadline_s=10.0)
    at.until_state(se, "UP OK", deadline_s=5.0)
    assert time.monotonic() - began < 12.0


def test_a_power_cut_leaves_half_a_connection_and_no_clone(place: Place) -> None:
    """The SE is gone without a word, its address still looks connected; it boots and comes back while the controller
    believes in the old link."""
    at, se, cable, traffic = place
    with judged(at, se, traffic=traffic, back_s=10.0, restarts=True, samples_apart_s=15.0, lost="nothing heard for"):
        cable.forget()
        se.kill()
        at.until_state(se, "DOWN HEARTBEAT_MISSED", deadline_s=NOTICE_S + SLACK_S)
        told = at.controller.operator.why("se-1").verdict
        assert re.search(r"stopped at link: nothing heard for [\d.]+ s, and a ping went unanswered", told)
        boots(at, se)
    assert at.events("se.clone") == []


def test_a_short_power_cut_leaves_half_a_connection(place: Place) -> None:
    """It is back before anybody noticed: the controller asks the old link, hears nothing, and lets the new one in."""
    at, se, cable, traffic = place
    lost = "the SE came back from|nothing heard for"
    with judged(at, se, traffic=traffic, back_s=10.0, restarts=True, samples_apart_s=15.0, lost=lost):
        cable.forget()
        se.kill()
        boots(at, se)
    assert at.events("se.clone") == []


def flap(at: Site, se: RealSe, cable: RoughCable, *, seconds: float) -> tuple[int, int]:
    """Refuses for a second and takes for a second; returns how many dials and links it took."""
    dials, before = se.logged().count("idle -> dialing"), links(se)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        cable.unplug()
        time.sleep(1.0)  # the rhythm of the flapping, not a wait for something
        cable.plug()
        time.sleep(1.0)
    return se.logged().count("idle -> dialing") - dials, links(se) - before


@pytest.mark.parametrize("seconds", [10.0, pytest.param(300.0, marks=pytest.mark.slow)])
def test_flapping_makes_no_storm_and_heals(place: Place, seconds: float) -> None:
    """Every two seconds for a while: the back-off isn't reset by links that live a second, and afterwards it ends."""
    at, se, cable, traffic = place
    with judged(at, se, traffic=traffic, back_s=10.0):
        dials, _ = flap(at, se, cable, seconds=seconds)
        # A refused dial takes no time: without a back-off there would be hundreds. The one of these tests ends at 1 s.
        assert dials <= 2.5 * seconds, "no storm"
        assert dials >= 1
        assert se.state in {"UP", "DOWN"}
        told = until(
            lambda: (verdict := at.controller.operator.why("se-1").verdict).endswith("(FLAPPING)") and verdict,
            what="it is told while the link is up",
        )
        assert "its link was lost" in told
    assert at.controller.operator.se("se-1").alarms == []


def redials(se: RealSe) -> list[float]:
    """How long the SE waited after each link that was lost or didn't come up, seconds, as its log tells."""
    waits, lost_at = [], 0.0
    for entry in map(json.loads, se.logged().rpartition("\n")[0].splitlines()):  # the last line may be half there
        at = datetime.fromisoformat(entry["time"]).timestamp()
        if " lost: " in entry["message"] or " did not come up: " in entry["message"]:
            lost_at = at
        elif "idle -> dialing" in entry["message"] and lost_at:
            waits.append(at - lost_at)
    return waits


@pytest.mark.slow
def test_the_back_off_outlives_short_links_and_starts_over_after_a_steady_one(tmp_path: Path) -> None:
    """After a link that lived a moment the delay is what it has grown to, after one that was steady the first again."""
    first_s, most_s = FLOOR_S, 4.0  # so that the first delay is the floor itself, and no draw can hide what it was
    with site(tmp_path) as at:
        se = at.se("se-1", settings={"redial_first_s": first_s, "redial_most_s": most_s}).start()
        at.until_up(se)

        def lose() -> float:
            """Resets the link and waits for the next one; returns the delay before it was dialled."""
            before = len(redials(se))
            at.ssh.reset()
            until(lambda: len(redials(se)) > before, what="the SE redials", deadline_s=most_s + 5.0)
            at.until_up(se, deadline_s=most_s + 5.0)
            return redials(se)[before]

        grown = [lose() for _ in range(7)]
        while max(grown) <= 1.0:  # drawn between nothing and 4 s by now: three in four are longer
            grown.append(lose())
            assert len(grown) < 20, f"links that lived a moment start it over: {grown}"
        up_since = time.monotonic()
        until(
            lambda: time.monotonic() - up_since > STEADY_AFTER_S, what="it is steady", deadline_s=STEADY_AFTER_S + 5.0
        )
        assert at.is_up(se)
        fresh = [lose() for _ in range(3)]
        assert all(wait < first_s * 2**n + 0.3 for n, wait in enumerate(fresh)), f"{grown}, then {fresh}"
