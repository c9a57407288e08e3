"""07: what happens between two steps: a crash after the store's commit, a revocation under a live link, sshd gone."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_rig import RealSe, Site, no_leak, resources, site
from rig import until

from appliance.pki.identity import Identity
from appliance.protocol.why import Step, StepResult

CRASH = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
from appliance.controller import records
from appliance.controller.store.sqlite import SqliteStore

commit = SqliteStore.txn

async def txn(store, compares, success, failure=()):
    result = await commit(store, compares, success, failure)
    if any(operation.key == records.NUMBER_NEXT for operation in success):
        os._exit(9)  # stored durably, and nobody was told
    return result

SqliteStore.txn = txn
sys.argv = ["appliance", *sys.argv[1:]]
runpy.run_module("appliance", run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, RealSe]]:
    """A controller and one SE that is UP."""
    with site(tmp_path_factory.mktemp("between")) as found:
        se = found.se("se-1", settings={"refresh_after_s": 1.0}).start()
        found.until_up(se)
        yield found, se


def test_a_controller_killed_between_grant_stored_and_grant_sent(place: tuple[Site, RealSe], tmp_path: Path) -> None:
    at, first = place
    uses = at.uses()
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    assert at.controller.stop() == 0
    at.controller.start(str(script))
    at.until_up(first)
    se = at.se("se-2").start()
    assert at.controller.wait() == 9
    until(lambda: "broke off at /v1/enroll" in se.logged(), what="the SE says that no answer came")
    before = se.stored("identity.json")
    assert before["grant"] is None
    at.controller.start()
    for each in (first, se):
        at.until_up(each)
    after = se.stored("identity.json")
    assert (after["se_id"], after["key"]) == (before["se_id"], before["key"])
    assert after["grant"]["number"] == 2, "the number that was stored, given out once"
    assert at.uses() == uses + 1, "counted once"
    granted = [entry for entry in at.controller.operator.audit() if entry.action == "enroll.granted"]
    assert [entry.subject for entry in granted].count(after["se_id"]) == 1
    assert at.controller.operator.verify_audit().intact
    se.stop()


def test_a_first_boot_while_whatever_answers_hangs_up(place: tuple[Site, RealSe]) -> None:
    """There is a load balancer and no controller behind it yet: each connection is taken, and reset at any moment."""
    at, first = place
    at.controller.kill()
    try:
        se = at.se("se-3", settings={"redial_most_s": 0.2}).start()
        until(lambda: se.logged().count("it will be tried again") >= 15, what="the SE tries again and again")
        # Now and then it hangs up so early that the connection itself is what fails.
        until(lambda: "no TLS with 127.0.0.1:" in se.failed(Step.TLS), what="the SE says why")
    finally:
        at.controller.start()
    for each in (first, se):
        at.until_up(each)
    se.stop()


def dial(at: Site, number: int = 1) -> bytes:
    """Asks for the SE's sshd over the reverse path; returns the first bytes that come, b"" where it is closed."""
    port = at.controller.bound["reverse_port"]
    with socket.create_connection((f"127.1.0.{number}", port), timeout=10) as sock:
        try:
            return sock.recv(8)
        except ConnectionError:
            return b""


def test_sshd_behind_the_reverse_path_goes_and_comes_back(place: tuple[Site, RealSe]) -> None:
    at, se = place
    assert dial(at) == b"SSH-2.0-"
    links = se.logged().count("linked -> up")
    process = at.controller.process
    assert process is not None
    with no_leak(lambda: se.pid), no_leak(lambda: process.pid):
        se.stop_sshd()
        assert dial(at) == b""
        at.until_state(se, "DEGRADED REVERSE_DOWN", deadline_s=5.0)
        chain = at.controller.operator.why("se-1")
        assert chain.verdict.startswith("stopped at reverse path: ")
        assert "(REVERSE_DOWN)" in chain.verdict
        assert "on the SE" in next(link.hint for link in chain.steps if link.step is Step.REVERSE)
        told = until(lambda: se.failed(Step.REVERSE), what="the SE names its sshd")
        assert "no sshd at 127.0.0.1:" in told
        assert "Connection refused" in told
        se.start_sshd()
        at.until_up(se, deadline_s=20.0)
        assert dial(at) == b"SSH-2.0-"
    half = {link.step: link.result for link in se.why().steps}
    assert half[Step.REVERSE] is StepResult.OK
    assert se.logged().count("linked -> up") == links, "the link itself lived through it"


def reached(at: Site, se: RealSe) -> subprocess.CompletedProcess[str]:
    """Runs `echo` on the SE over the reverse path with stock ssh, which asks the controller for the host key."""
    asks = f"{sys.executable} -m appliance --root {at.controller.root} se known-hosts %H"
    options = [
        f"KnownHostsCommand={asks}", "UserKnownHostsFile=/dev/null", "GlobalKnownHostsFile=/dev/null",
        "StrictHostKeyChecking=yes", "BatchMode=yes", "IdentitiesOnly=yes",
    ]  # fmt: skip
    line = [
        "ssh", "-F", "none", "-i", str(at.controller.paths.controller_state / "id_se"),
        "-p", str(at.controller.bound["reverse_port"]), *(word for option in options for word in ("-o", option)),
        f"{se.user}@{at.controller.operator.se(se.name).summary.address}", "echo", "reached",
    ]  # fmt: skip
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_ssh_asks_the_controller_for_an_ses_host_key(place: tuple[Site, RealSe]) -> None:
    """OpenSSH's KnownHostsCommand: the key that the SE enrolled with, no other, and none of an SE that is revoked."""
    at, se = place
    at.until_up(se)
    done = reached(at, se)
    assert (done.returncode, done.stdout) == (0, "reached\n"), done.stderr
    assert at.controller.command("se", "known-hosts", "[127.1.0.1]:5097").stdout.startswith("[127.1.0.1]:5097 ssh-")
    for text in ("127.1.0.9", "localhost", "10.0.0.1", "[127.1.0.1", "127.1.0.1 127.1.0.2"):
        nobody = at.controller.command("se", "known-hosts", text, check=False)
        assert nobody.returncode != 0, text
        assert not nobody.stdout, text
    # Another key behind the same address is not believed.
    key = at.layout.host_key(se.name)
    content = key.read_bytes()
    se.stop_sshd()
    try:
        key.write_bytes(Identity.create().openssh().reveal())
        se.start_sshd()
        done = reached(at, se)
        assert done.returncode == 255
        assert "HOST IDENTIFICATION HAS CHANGED" in done.stderr
    finally:
        se.stop_sshd()
        key.write_bytes(content)
        se.start_sshd()
    at.controller.operator.revoke_se("se-1", reason="test")
    revoked = at.controller.command("se", "known-hosts", "127.1.0.1", check=False)
    assert "is revoked" in revoked.stderr
    at.controller.operator.reinstate_se("se-1", reason="test")
    at.until_up(se)


def test_many_reverse_connections_leave_nothing_behind(place: tuple[Site, RealSe]) -> None:
    at, se = place
    process = at.controller.process
    assert process is not None
    dial(at)
    with no_leak(lambda: se.pid), no_leak(lambda: process.pid):
        for _ in range(50):
            assert dial(at) == b"SSH-2.0-"


def test_a_revoked_se_is_hung_up_on_and_keeps_its_identity(place: tuple[Site, RealSe]) -> None:
    at, se = place
    identity = (se.paths.se_state / "identity.json").read_bytes()
    began = time.monotonic()
    # Not by the command line: its own start is no part of the two seconds.
    at.controller.operator.revoke_se("se-1", reason="stolen from the rack")
    until(lambda: se.state == "DOWN", what="the SE notices", deadline_s=2.0 + began - time.monotonic() + 1.0)
    assert at.controller.state("se-1") == "REVOKED REVOKED"
    assert "stolen from the rack" in at.controller.operator.why("se-1").verdict
    assert dial(at) == b"", "nothing leads to it any more"
    told = until(lambda: "ENROLL-014" in (text := se.failed(Step.LINK)) and text, what="the SE says why")
    assert "revoked" in told
    assert "revoked" in se.why().verdict
    held = resources(se.pid)
    tried = se.logged().count("did not come up")
    until(lambda: se.logged().count("did not come up") > tried + 3, what="it goes on asking", deadline_s=20.0)
    until(lambda: resources(se.pid).threads <= held.threads + 1, what="no thread stays of a try")
    assert (se.paths.se_state / "identity.json").read_bytes() == identity
    # A restart changes nothing: it isn't a way to get in as another SE.
    se.stop()
    se.start()
    until(lambda: se.failed(Step.LINK), what="the SE says why")
    assert (se.paths.se_state / "identity.json").read_bytes() == identity
    assert [entry.name for entry in at.controller.operator.ses()].count("se-1") == 1


MISTAKES = """\
[log]
level = "loud"
[se]
redial_first_s = -1
seeed = "/x"
sshd_port = "twenty-two"
[controler]
x = 1
"""


@pytest.mark.parametrize("role", ["se", "controller"])
def test_a_settings_file_with_five_mistakes(place: tuple[Site, RealSe], role: str) -> None:
    at, se = place
    paths = se.paths if role == "se" else at.controller.paths
    content = paths.settings_file.read_text()
    paths.settings_file.write_text(MISTAKES)
    try:
        done = se.command("run") if role == "se" else at.controller.command("run", check=False)
    finally:
        paths.settings_file.write_text(content)
    assert done.returncode == 3, done.stderr
    assert "5 problems in the settings" in done.stderr
    for line, words in ((2, "loud"), (4, "-1"), (5, "did you mean 'seed'"), (6, "twenty-two"), (7, "'controller'")):
        assert any(f"settings.toml:{line}: " in told and words in told for told in done.stderr.splitlines()), words
    assert "Traceback" not in done.stderr
    assert Path(f"/proc/{se.pid}").exists(), "what runs already goes on"
