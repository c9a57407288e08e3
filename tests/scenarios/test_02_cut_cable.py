"""02: the way between the two breaks: in both directions, in one, by reset, for a while, under the link's carrier."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
from lab_rig import INTERVAL_S, NOTICE_S, SLACK_S, RealSe, Site, no_leak, resources, site
from rig import until

from appliance.protocol.why import Step

SAMPLES_APART_S = 2.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, RealSe]]:
    """A controller and one SE that is UP."""
    with site(tmp_path_factory.mktemp("cut")) as found:
        se = found.se("se-1", settings={"login_timeout_s": 6.0}).start()
        found.until_up(se)
        yield found, se


@pytest.fixture(autouse=True)
def mended(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leaves the way open for the next test."""
    yield
    if "place" in request.fixturenames:
        at, se = request.getfixturevalue("place")
        at.ssh.mend()
        at.until_up(se)


def controller_pid(at: Site) -> int:
    assert at.controller.process is not None
    return at.controller.process.pid


SILENT = "the controller is silent"
UNHEARD = r"stopped at link: nothing heard for [\d.]+ s, and a ping went unanswered \(HEARTBEAT_MISSED\)"
BLACK_HOLES = {
    # what is cut: what the SE says, what the controller says, and its verdict
    "both ways": (SILENT, {"DOWN HEARTBEAT_MISSED"}, UNHEARD),
    # Whoever notices hangs up, and that gets across where the other way is open.
    "towards the controller": (f"{SILENT}|the link ended", {"DOWN HEARTBEAT_MISSED"}, UNHEARD),
    "towards the SE": (SILENT, {"DOWN LINK_LOST"}, "stopped at link: the connection broke"),
}


@pytest.mark.parametrize("hole", BLACK_HOLES)
def test_a_black_hole_is_noticed_by_both_sides_and_nothing_is_lost(place: tuple[Site, RealSe], hole: str) -> None:
    at, se = place
    said_by_se, states, verdict = BLACK_HOLES[hole]
    since, key = time.time(), se.stored("identity.json")["key"]
    with no_leak(lambda: controller_pid(at)), no_leak(lambda: se.pid):
        at.ssh.cut(up=hole != "towards the SE", down=hole != "towards the controller")
        noticed = {"se": lambda: se.state == "DOWN", "controller": lambda: at.controller.state("se-1") in states}
        until(
            lambda: all(by() for by in noticed.values()), what=f"both notice, the controller as {states}",
            deadline_s=NOTICE_S + SLACK_S,
        )  # fmt: skip
        told = until(lambda: se.failed(Step.LINK), what="the SE says why")
        assert re.search(said_by_se, told), told
        assert re.search(said_by_se, se.why().verdict)
        told = at.controller.operator.why("se-1").verdict
        assert re.match(verdict, told), told
        at.ssh.mend()
        at.until_up(se, deadline_s=5.0)
        until(lambda: at.samples_without_gap(se, since, most_s=SAMPLES_APART_S), what="all telemetry arrives")
    assert at.controller.operator.se("se-1").alarms == []
    assert at.events("se.clone") == at.events("se.rolled-back") == []
    assert se.stored("identity.json")["key"] == key
    assert at.uses() == 1


def test_a_short_cut_costs_no_link(place: tuple[Site, RealSe]) -> None:
    at, se = place
    links, since = se.logged().count("linked -> up"), time.time()
    at.ssh.cut()
    time.sleep(INTERVAL_S)  # the length of the cut, not a wait for something
    at.ssh.mend()
    until(lambda: at.samples_without_gap(se, since, most_s=SAMPLES_APART_S), what="telemetry goes on")
    assert at.is_up(se)
    assert se.logged().count("linked -> up") == links


def test_a_reset_is_told_at_once_and_redialled(place: tuple[Site, RealSe]) -> None:
    at, se = place
    since = time.time()
    with no_leak(lambda: controller_pid(at)), no_leak(lambda: se.pid):
        for _ in range(5):
            links = se.logged().count("linked -> up")
            at.ssh.reset()
            until(lambda n=links: se.logged().count("linked -> up") > n, what="the SE redials", deadline_s=5.0)
            at.until_up(se, deadline_s=5.0)
            assert re.search("its link was lost .*: the connection broke", at.told_of_losses(se))
    changes = [text for text in at.events("se.state") if "DOWN (LINK_LOST)" in text]
    assert len(changes) >= 5
    at.ssh.unplug()
    try:
        until(
            lambda: "the connection broke" in at.controller.operator.why("se-1").verdict, what="the controller says why"
        )
        until(lambda: "Connection refused" in se.failed(Step.LINK), what="the SE says why it stays so")
    finally:
        at.ssh.plug()
    at.until_up(se, deadline_s=5.0)
    until(lambda: at.samples_without_gap(se, since, most_s=SAMPLES_APART_S), what="telemetry has no gap")


def test_a_link_that_takes_tcp_and_never_speaks(place: tuple[Site, RealSe]) -> None:
    """What a dead middle box does: each new connection is taken, none is answered. The SE keeps trying, holds no more
    than one connection, and says what it sees."""
    at, se = place
    with no_leak(lambda: controller_pid(at)), no_leak(lambda: se.pid):
        at.ssh.cut()
        at.ssh.reset()
        until(lambda: se.state == "DOWN", what="the SE notices", deadline_s=2.0 + SLACK_S)
        at.until_state(se, "DOWN LINK_LOST", deadline_s=2.0 + SLACK_S)
        began = resources(se.pid).descriptors
        told = until(
            lambda: "no log-in within" in se.failed(Step.LINK) and se.failed(Step.LINK),
            what="the SE gives the silent connection up", deadline_s=25.0,
        )  # fmt: skip
        assert "(TUNNEL-039)" in told
        assert "no log-in within" in se.why().verdict
        assert at.controller.operator.why("se-1").verdict.startswith("stopped at link: the connection broke")
        assert resources(se.pid).descriptors <= began + 2
        at.ssh.mend()
        at.until_up(se, deadline_s=25.0)


def test_a_controller_out_of_reach_and_back(place: tuple[Site, RealSe]) -> None:
    """Nobody answers for a while: the SE asks for its grant again too, and its links come back by themselves."""
    at, se = place
    se.write_settings({"refresh_after_s": 2.0}, {})
    se.stop()
    se.start()
    at.until_up(se)
    since = time.time()
    with no_leak(lambda: controller_pid(at)):
        at.ssh.unplug()
        until(lambda: "Connection refused" in se.failed(Step.LINK), what="the SE says why", deadline_s=5.0)
        # The enroll port is reached all the while: the refresh brings the grant, which changes nothing.
        until(lambda: se.logged().count("enrolled as SE number 1") >= 2, what="the SE asks for its grant again")
        at.until_state(se, "DOWN LINK_LOST", deadline_s=2.0 + SLACK_S)
        at.ssh.plug()
        at.until_up(se, deadline_s=5.0)
    assert at.uses() == 1
    until(lambda: at.samples_without_gap(se, since, most_s=SAMPLES_APART_S), what="all telemetry arrives")


needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"
)


@pytest.fixture
def namespace() -> Iterator[tuple[str, str, str]]:
    """A network namespace: its name, our end's device and our end's address; both ends on one veth pair."""
    name = f"se{os.getpid() % 10000}"
    device, address = f"v{name}", "198.18.77.1"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)

    ip("netns", "add", name)
    try:
        ip("link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{address}/30", "dev", device)
        ip("link", "set", device, "up")
        for words in (
            ("addr", "add", "198.18.77.2/30", "dev", "eth0"), ("link", "set", "eth0", "up"), ("link", "set", "lo", "up")
        ):  # fmt: skip
            ip("-n", name, *words)
        yield name, device, address
    finally:
        subprocess.run(["ip", "link", "del", device], check=False, capture_output=True, timeout=20)
        ip("netns", "del", name)


@needs_namespaces
def test_a_pulled_cable(namespace: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The real thing: an SE in a network namespace of its own, whose only cable is pulled and plugged again."""
    name, device, address = namespace

    def cable(state: str) -> None:
        subprocess.run(["ip", "link", "set", device, state], check=True, timeout=20)

    with site(tmp_path_factory.mktemp("pulled"), address=address) as at:
        se = at.se("se-1", prefix=["ip", "netns", "exec", name]).start()
        at.until_up(se)
        since = time.time()
        with no_leak(lambda: controller_pid(at)), no_leak(lambda: se.pid):
            cable("down")
            at.until_state(se, "DOWN HEARTBEAT_MISSED", deadline_s=NOTICE_S + SLACK_S)
            until(lambda: se.state == "DOWN", what="the SE notices", deadline_s=NOTICE_S + SLACK_S)
            cable("up")
            at.until_up(se, deadline_s=10.0)
        until(lambda: at.samples_without_gap(se, since, most_s=SAMPLES_APART_S), what="all telemetry arrives")
        assert at.controller.operator.se("se-1").alarms == []
