"""03: processes that end and come back: controller and SE killed, a copied disk, two daemons, another mode."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest
from lab_rig import SLACK_S, RealSe, Site, no_leak, site
from rig import until

from appliance.protocol.why import Step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, RealSe]]:
    """A controller and one SE that is UP."""
    with site(tmp_path_factory.mktemp("restarts")) as found:
        se = found.se("se-1").start()
        found.until_up(se)
        yield found, se


def test_a_killed_controller_comes_back_and_so_do_all_ses(place: tuple[Site, RealSe]) -> None:
    at, se = place
    second = at.se("se-2").start()
    at.until_up(second)
    numbers = {entry.name: entry.number for entry in at.controller.operator.ses()}
    audited = at.controller.operator.verify_audit().entries
    with no_leak(lambda: se.pid), no_leak(lambda: second.pid):
        for _ in range(2):
            at.controller.kill()
            for each in (se, second):
                until(lambda each=each: each.state == "DOWN", what="the SE notices", deadline_s=2.0 + SLACK_S)
            at.controller.start()
            for each in (se, second):
                at.until_up(each, deadline_s=10.0)
    assert {entry.name: entry.number for entry in at.controller.operator.ses()} == numbers
    assert at.events("se.clone") == at.events("se.rolled-back") == []
    verdict = at.controller.operator.verify_audit()
    assert verdict.intact
    assert verdict.entries >= audited
    assert at.uses() == 2
    second.stop()


def test_a_controller_that_is_away_says_so_on_the_se_and_is_asked_for_the_grant(place: tuple[Site, RealSe]) -> None:
    at, se = place
    se.stop()
    se.write_settings({"refresh_after_s": 1.0}, {})
    se.start()
    at.until_up(se)
    since = time.time()
    at.controller.kill()
    # The cables take connections and end them at once: what a load balancer without a server behind it does.
    until(lambda: se.failed(Step.LINK), what="the SE says why", deadline_s=5.0)
    until(lambda: "asking for the grant again" in se.logged(), what="the SE asks for its grant", deadline_s=10.0)
    at.enroll.unplug()
    at.ssh.unplug()
    until(lambda: "Connection refused" in se.failed(Step.LINK), what="the SE says why", deadline_s=5.0)
    at.controller.start()
    at.enroll.plug()
    at.ssh.plug()
    at.until_up(se, deadline_s=10.0)
    assert at.events("se.clone") == at.events("se.rolled-back") == []
    until(lambda: at.samples_without_gap(se, since, most_s=2.0), what="telemetry of that time arrives")


def test_a_reboot_of_the_se_is_no_clone_and_no_enrollment(place: tuple[Site, RealSe]) -> None:
    at, se = place
    before, uses = at.controller.operator.se("se-1"), at.uses()
    for _ in range(3):
        se.kill()
        at.until_state(se, "DOWN LINK_LOST", deadline_s=2.0 + SLACK_S)
        se.start()
        at.until_up(se, deadline_s=10.0)
    after = at.controller.operator.se("se-1")
    assert (after.summary.number, after.summary.se_id, after.thumbprint) == (
        before.summary.number, before.summary.se_id, before.thumbprint
    )  # fmt: skip
    assert after.alarms == []
    assert at.events("se.clone") == at.events("se.rolled-back") == []
    assert at.uses() == uses


def test_two_daemons_on_one_root(place: tuple[Site, RealSe]) -> None:
    at, se = place
    first = se.process
    se.start()
    assert se.wait() == 4
    se.process = first
    assert f"held by process {se.pid}" in se.logged()
    assert at.is_up(se), "the first one goes on"


@pytest.fixture
def copy(place: tuple[Site, RealSe]) -> Iterator[RealSe]:
    """One more SE, not started."""
    at, _ = place
    made = at.se(f"copy-{len(at.ses)}")
    yield made
    made.end()


@pytest.mark.parametrize("moved_on", [False, True], ids=["current ticket", "older ticket"])
def test_a_copied_state_directory_is_a_clone_and_the_first_stays_up(
    place: tuple[Site, RealSe], copy: RealSe, moved_on: bool
) -> None:
    at, se = place
    shutil.rmtree(copy.paths.se_state, ignore_errors=True)
    shutil.copytree(se.paths.se_state, copy.paths.se_state)
    if moved_on:
        links = se.logged().count("linked -> up")
        at.ssh.reset()
        until(lambda: se.logged().count("linked -> up") > links, what="the SE is linked anew", deadline_s=5.0)
    at.until_up(se)
    links = se.logged().count("linked -> up")
    process = at.controller.process
    assert process is not None
    with no_leak(lambda: se.pid), no_leak(lambda: process.pid):
        copy.start()
        until(lambda: copy.failed(Step.HELLO), what="the copy is told", deadline_s=10.0)
        assert "quarantine" in copy.why().verdict
        assert copy.state == "DOWN"
        # The first one stays up, with the alarm; both are named.
        at.until_state(se, "UP CLONE")
        detail = at.controller.operator.se("se-1")
        assert len(detail.alarms) == 1
        assert "in quarantine" in detail.alarms[0]
        assert "se-1" in at.events("se.clone")[-1]
        assert at.events("se.clone")[-1].count("127.0.0.1") == 2, "where both came from"
        shown = at.controller.command("why", "se-1", check=False)
        assert "CLONE" in shown.stdout
        assert "in quarantine" in shown.stdout
        assert any("se-1" in problem for problem in at.controller.operator.status().problems)
        assert se.state == "UP"
        assert se.logged().count("linked -> up") == links
        copy.stop()
        at.until_state(se, "UP OK")
    assert "se.clone" in [entry.action for entry in at.controller.operator.audit()]


def test_mode_set_while_the_daemon_runs(place: tuple[Site, RealSe]) -> None:
    """Leaving the role drains and stops the daemon; taking it up again finds everything as it was."""
    at, se = place
    number = at.controller.operator.se("se-1").summary.number
    process = se.process
    assert process is not None
    done = se.command("mode", "set", "none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert process.wait(10) == 0
    se.process = None
    at.until_state(se, "DOWN CLOSED_BY_SE", deadline_s=2.0 + SLACK_S)
    se.start()
    assert se.wait() != 0
    assert "this machine has no role" in se.logged()
    assert se.command("mode", "set", "se").returncode == 0
    se.start()
    at.until_up(se)
    assert at.controller.operator.se("se-1").summary.number == number
    assert at.events("se.rolled-back") == []


def test_mode_set_on_a_controller_with_ses_is_refused_and_changes_nothing(place: tuple[Site, RealSe]) -> None:
    at, se = place
    refused = at.controller.command("mode", "set", "none", check=False)
    assert refused.returncode != 0
    assert "--force" in refused.stderr
    assert at.is_up(se)
