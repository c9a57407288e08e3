"""`status`, `se` and `why` against an operator API on a real unix socket."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import operator_double as doubles
import pytest
from click.testing import CliRunner
from operator_double import OperatorDouble

from appliance.cli.root import group, main
from appliance.protocol.fleet import Reason, SeSummary, State
from appliance.protocol.operator import SeDetail
from appliance.protocol.telemetry import Point, Sample
from appliance.protocol.why import Chain, Link, Step, StepResult, verdict
from appliance.runtime.clock import SystemClock
from appliance.runtime.health import Health, HealthDocument

OK, FAILED, WAITING, UNSEEN = StepResult.OK, StepResult.FAILED, StepResult.WAITING, StepResult.UNSEEN


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Cli:
    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self._capsys = capsys

    def __call__(self, *args: str) -> Ran:
        code = main(["--root", str(self.root), *args])
        captured = self._capsys.readouterr()
        return Ran(code, captured.out, captured.err)


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tmp_path, capsys)


@pytest.fixture
def double(tmp_path: Path) -> Iterator[OperatorDouble]:
    with doubles.serve(tmp_path / "run/appliance/controller.sock") as served:
        served.answers["GET /v1/status"] = doubles.status_view()
        served.answers["GET /v1/ses"] = [doubles.summary(1), doubles.down(2), doubles.summary(3, rtt_s=0.05)]
        yield served


def row(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if name in line.split())


# status


def test_status_tells_states_problems_refusals_and_the_worst_first(double: OperatorDouble, cli: Cli) -> None:
    ran = cli("status")
    assert ran.code == 0
    for word in ("3 SEs", "2 UP", "1 DOWN", "SE se-3 is DOWN", "12  ENROLL-007  The image key was revoked"):
        assert word in ran.out
    assert ran.out.index("se-2") < ran.out.index("se-1")
    assert "HEARTBEAT_MISSED: no heartbeat for 9 s" in row(ran.out, "se-2")


def test_status_check_fails_on_problems_only(double: OperatorDouble, cli: Cli) -> None:
    assert cli("status", "--check").code == 1
    double.answers["GET /v1/status"] = doubles.status_view(problems=[], refusals={})
    assert cli("status", "--check").code == 0


def test_status_as_json_is_the_view(double: OperatorDouble, cli: Cli) -> None:
    ran = cli("status", "--json")
    assert list(json.loads(ran.out)) == list(type(doubles.status_view()).__struct_fields__)


def test_status_of_a_large_fleet_is_cut_and_says_so(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/ses"] = [doubles.summary(number) for number in range(1, 251)]
    assert "and 220 more; `appliance status --all`" in cli("status").out
    assert "se-250" in cli("status", "--all").out


def test_status_before_the_first_se_says_what_to_do(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/ses"] = []
    assert "image-key create" in cli("status").out


def test_no_daemon_is_one_error_with_its_exit_code(cli: Cli) -> None:
    ran = cli("status")
    assert ran.code == 5
    assert ran.out == ""
    assert "no controller runs here" in ran.err
    assert "hint:" in ran.err


# se list


def test_the_list_has_all_figures(double: OperatorDouble, cli: Cli) -> None:
    words = row(cli("se", "list").out, "se-1").split()
    for word in ("1", "UP", "127.1.0.1", "0.42", "3.4%", "0.4/2.0", "1d", "2h", "192.0.2.7", "site=berlin"):
        assert word in words


def test_the_list_is_filtered_and_sorted(double: OperatorDouble, cli: Cli) -> None:
    out = cli("se", "list", "--state", "down").out
    assert "se-2" in out
    assert "se-1" not in out
    out = cli("se", "list", "--sort", "rtt").out
    assert out.index("se-3") < out.index("se-1") < out.index("se-2")
    assert "no SE in that state" in cli("se", "list", "--state", "PENDING").out
    for order in ("number", "name", "state", "cpu", "memory", "uptime"):
        assert cli("se", "list", "--sort", order).code == 0


def test_the_list_as_json_keeps_the_order_of_the_protocol(double: OperatorDouble, cli: Cli) -> None:
    listed = json.loads(cli("se", "list", "--json").out)
    assert list(listed[0]) == list(SeSummary.__struct_fields__)
    assert json.loads(cli("se", "list", "--state", "QUARANTINED", "--json").out) == []


def test_names_cannot_drive_the_terminal(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/ses"] = [doubles.summary(1, name="\x1b]0;owned\x07[red]x", labels={"a": "\u202e"})]
    out = cli("se", "list").out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\\x1b]0;owned\\x07[red]x" in out


@pytest.mark.parametrize("width", [80, 200])
def test_on_a_terminal_the_table_fits_and_the_reasons_are_told(double: OperatorDouble, cli: Cli, width: int) -> None:
    lines = on_a_terminal(cli.root, width, "se", "list")
    assert all(len(line) <= width for line in lines), lines
    head = next(line for line in lines if "NAME" in line)
    for column in ("NAME", "STATE", "ADDRESS", "RTT", "CPU", "MEMORY", "UPTIME"):
        assert column in head
    assert ("LABELS" in head) == (width == 200)
    assert sum("no heartbeat for 9 s" in line for line in lines) == 1


def test_on_a_narrow_terminal_only_the_first_reasons_are_told(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/ses"] = [doubles.down(number) for number in range(1, 16)]
    lines = on_a_terminal(cli.root, 80, "se", "list")
    assert sum("HEARTBEAT_MISSED" in line for line in lines) == 10
    assert lines[-1] == "and 5 more"


def on_a_terminal(root: Path, width: int, *args: str) -> list[str]:
    """Runs the command line with a real pseudo-terminal as its stdout, without colours."""
    main_end, other_end = os.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "PYTHONUTF8": "1"}
    environment.pop("COLUMNS", None)
    with subprocess.Popen(
        [sys.executable, "-m", "appliance", "--root", str(root), *args],
        stdin=subprocess.DEVNULL,
        stdout=other_end,
        env=environment,
    ) as process:
        os.close(other_end)
        raw = bytearray()
        while True:
            try:
                chunk = os.read(main_end, 4096)
            except OSError:  # EIO: the other end was closed
                break
            raw += chunk
        process.wait(timeout=30)
    os.close(main_end)
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", raw.decode()).splitlines()


# se show, revoke, delete, telemetry


def test_show_tells_drift_and_alarms(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/ses/se-2"] = doubles.detail(
        doubles.down(2), drift=["macs was a, is b"], alarms=["a copy of this SE was put in quarantine: 198.51.100.7"]
    )
    out = cli("se", "show", "se-2").out
    for word in ("DOWN", "HEARTBEAT_MISSED", "macs was a, is b", "198.51.100.7", "SHA256:Xq0", "52:54:00:12:34:56"):
        assert word in out
    assert list(json.loads(cli("se", "show", "se-2", "--json").out)) == list(SeDetail.__struct_fields__)


def test_an_unknown_se_is_not_found(double: OperatorDouble, cli: Cli) -> None:
    ran = cli("se", "show", "nobody")
    assert ran.code == 10
    assert "NOTFOUND-001" in ran.err


def test_revoke_sends_the_reason(double: OperatorDouble, cli: Cli) -> None:
    double.answers["POST /v1/ses/2/revoke"] = doubles.detail(doubles.down(2, state=State.REVOKED))
    ran = cli("se", "revoke", "2", "--reason", "stolen")
    assert (ran.code, "SE 2 (se-2) is revoked" in ran.out) == (0, True)
    assert double.requests[-1].body == b'{"reason":"stolen"}'
    assert json.loads(cli("se", "revoke", "2", "--json").out)["summary"]["state"] == "REVOKED"


@pytest.fixture
def deletable(double: OperatorDouble) -> OperatorDouble:
    se = doubles.summary(2)
    double.answers["GET /v1/ses/se-2"] = doubles.detail(se)
    double.answers[f"POST /v1/ses/{se.se_id}/delete"] = doubles.detail(se)
    return double


def deletions(double: OperatorDouble) -> int:
    return sum(request.path.endswith("/delete") for request in double.requests)


def test_delete_without_a_terminal_wants_yes(deletable: OperatorDouble, cli: Cli) -> None:
    result = CliRunner().invoke(group, ["--root", str(cli.root), "se", "delete", "se-2"], input="y\n")
    assert result.exit_code != 0
    assert deletions(deletable) == 0


def test_delete_with_yes_asks_by_se_id(deletable: OperatorDouble, cli: Cli) -> None:
    ran = cli("se", "delete", "se-2", "--yes", "--reason", "gone")
    assert (ran.code, deletions(deletable)) == (0, 1)
    assert "is deleted" in ran.out
    assert json.loads(cli("se", "delete", "se-2", "--yes", "--json").out)["status"] == "enrolled"


@pytest.mark.parametrize(("said", "code", "deleted"), [("n\n", 1, 0), ("y\n", 0, 1)])
def test_delete_asks_first(
    deletable: OperatorDouble, cli: Cli, monkeypatch: pytest.MonkeyPatch, said: str, code: int, deleted: int
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(said))
    ran = cli("se", "delete", "se-2")
    assert (ran.code, deletions(deletable)) == (code, deleted)
    assert "Delete SE 2 (se-2), UP, for good?" in ran.err


def test_telemetry(double: OperatorDouble, cli: Cli) -> None:
    now = time.time()
    samples = [
        Sample(time=now - 20 + 10 * at, points=[Point("system.memory.usage", ("used",), 1024.0**3)]) for at in range(2)
    ]
    double.answers["GET /v1/ses/1/telemetry"] = samples
    out = cli("se", "telemetry", "1", "--since", "10m").out
    assert "2 samples" in out
    assert "1.0 GiB" in out
    assert abs(float(double.requests[-1].query["since"]) - (now - 600)) < 60
    assert len(json.loads(cli("se", "telemetry", "1", "--json").out)) == 2
    double.answers["GET /v1/ses/1/telemetry"] = []
    assert "no figures of the last 1h" in cli("se", "telemetry", "1").out
    assert cli("se", "telemetry", "1", "--since", "soon").code == 2


# why


def chain(subject: str, *links: Link) -> Chain:
    return Chain(subject=subject, side="controller", steps=list(links), verdict=verdict(list(links)))


def happened(upto: Step, *, at: float = 1000.0) -> list[Link]:
    steps = list(Step)
    return [Link(step=step, result=OK, at=at + 0.5 * number) for number, step in enumerate(steps[: steps.index(upto)])]


def test_why_of_an_se_that_is_up(double: OperatorDouble, cli: Cli) -> None:
    links = [*happened(Step.REVERSE), Link(step=Step.REVERSE, result=OK, at=1010.0, text="its sshd answers")]
    double.answers["GET /v1/why/se-1"] = chain("se-1", *links)
    double.answers["GET /v1/ses/se-1"] = doubles.detail(doubles.summary(1))
    ran = cli("why", "se-1")
    assert ran.code == 0
    marks = [line.split()[0] for line in ran.out.splitlines() if line.startswith("✓ ")]
    assert len(marks) == 10, "nine steps and the verdict"
    assert "+0.5s" in ran.out
    assert "all steps happened" in ran.out
    assert [step.value for step in Step] == sorted((step.value for step in Step), key=ran.out.index)


def test_why_of_an_se_whose_link_was_lost(double: OperatorDouble, cli: Cli) -> None:
    lost = Link(
        step=Step.LINK, result=FAILED, at=1100.0, text="no heartbeat", code="HEARTBEAT_MISSED", hint="look there"
    )
    double.answers["GET /v1/why/se-2"] = chain("se-2", *happened(Step.LINK), lost)
    double.answers["GET /v1/ses/se-2"] = doubles.detail(doubles.down(2), alarms=["twin"], drift=["moved"])
    ran = cli("why", "se-2")
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert any(line.startswith("✗  link") and "no heartbeat" in line for line in lines)
    assert sum("not reached" in line for line in lines) == 3
    assert lines[-2].startswith("✗  stopped at link")
    assert "HEARTBEAT_MISSED" in lines[-2]
    assert lines[-1] == "→  look there"
    assert "! twin" in ran.out
    assert "! moved" in ran.out


def test_why_of_an_se_that_is_linked_yet_degraded_is_not_well(double: OperatorDouble, cli: Cli) -> None:
    degraded = doubles.summary(1, state=State.DEGRADED, reason=Reason.RTT_HIGH, text="RTT 83 ms")
    double.answers["GET /v1/why/1"] = chain("se-1", *[Link(step=step, result=OK, at=1.0) for step in Step])
    double.answers["GET /v1/ses/1"] = doubles.detail(degraded)
    ran = cli("why", "1")
    assert ran.code == 1
    assert "RTT_HIGH: RTT 83 ms" in ran.out


def test_why_of_a_source_that_never_got_in(double: OperatorDouble, cli: Cli) -> None:
    refused = Link(step=Step.GRANT, result=FAILED, at=1100.0, text="The image key was revoked", code="ENROLL-007")
    boot = Link(step=Step.BOOT, result=UNSEEN)
    double.answers["GET /v1/why/192.0.2.9"] = chain("192.0.2.9", boot, *happened(Step.GRANT)[1:], refused)
    ran = cli("why", "192.0.2.9")
    assert ran.code == 1
    assert "known by its attempts only" in ran.out
    assert "only the SE sees it" in ran.out
    assert "stopped at grant" in ran.out
    document = json.loads(cli("why", "192.0.2.9", "--json").out)
    assert list(document) == list(Chain.__struct_fields__)
    assert document["verdict"] == "stopped at grant: The image key was revoked (ENROLL-007)"


def test_why_of_a_source_names_the_ses_from_there(double: OperatorDouble, cli: Cli) -> None:
    waiting = Link(step=Step.LINK, result=WAITING)
    double.answers["GET /v1/why/192.0.2.7"] = chain("192.0.2.7", *happened(Step.LINK), waiting)
    double.answers["GET /v1/ses"] = [doubles.summary(number) for number in range(1, 12)]
    ran = cli("why", "192.0.2.7")
    assert ran.code == 0
    assert "SEs linked from there:  se-1 UP" in ran.out
    assert "and 3 more" in ran.out
    double.answers["GET /v1/ses"] = [doubles.summary(1), doubles.down(2)]
    ran = cli("why", "192.0.2.7")
    assert ran.code == 1
    assert "se-2 DOWN" in ran.out
    failed = Link(step=Step.TLS, result=FAILED, text="unknown CA")
    double.answers["GET /v1/why/192.0.2.7"] = chain("192.0.2.7", failed)
    double.answers["GET /v1/ses"] = [doubles.summary(1)]
    assert cli("why", "192.0.2.7").code == 1


def test_why_of_a_gap_says_that_nothing_was_noted(double: OperatorDouble, cli: Cli) -> None:
    double.answers["GET /v1/why/1"] = chain(
        "1", Link(step=Step.NONCE, result=UNSEEN), Link(step=Step.BOOT, result=UNSEEN)
    )
    out = cli("why", "1").out
    assert out.count("not noted here") == 1
    assert out.count("only the SE sees it") == 1


def test_why_waits(double: OperatorDouble, cli: Cli) -> None:
    waiting = Link(step=Step.REVERSE, result=WAITING)
    double.answers["GET /v1/why/1"] = chain("se-1", *happened(Step.REVERSE), waiting)
    ran = cli("why", "1")
    assert ran.code == 1
    assert "…  waiting for reverse path" in ran.out


def test_why_of_nobody(double: OperatorDouble, cli: Cli) -> None:
    assert cli("why", "nobody").code == 10


# An SE's own console.


@pytest.fixture
def health(tmp_path: Path) -> Health:
    path = tmp_path / "run/appliance/health.json"
    path.parent.mkdir(parents=True)
    return Health(path, "se", SystemClock())


def rewrite(path: Path, **changes: Any) -> None:
    document = msgspec.json.decode(path.read_bytes(), type=HealthDocument)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(document, **changes)))


def test_an_se_that_is_up_tells_its_half(health: Health, cli: Cli) -> None:
    for step in list(Step)[:-1]:
        health.step(step, OK, f"did {step.value}")
    health.line("se", "UP", "linked to node 1", ["192.0.2.1:22"])
    ran = cli("why")
    assert ran.code == 0
    for word in ("this SE  UP", "linked to node 1", "did hello", "only the controller sees it", "all steps happened"):
        assert word in ran.out
    assert cli("status", "--check").code == 0
    assert json.loads(cli("status", "--json").out)["state"] == "UP"
    assert json.loads(cli("why", "--json").out)["side"] == "se"


def test_an_se_that_cannot_enroll_tells_where_it_stopped(health: Health, cli: Cli) -> None:
    health.step(Step.BOOT, OK)
    health.step(Step.TLS, FAILED, "the certificate is of another cluster", "TRUST-001", "check the seed's address")
    health.line("se", "ENROLLING", "again in 12 s", [])
    ran = cli("why", "se-1")
    assert ran.code == 1
    for word in ("knows of itself only", "another cluster", "stopped at tls", "TRUST-001", "check the seed's address"):
        assert word in ran.out
    assert cli("status", "--check").code == 1


def test_a_daemon_that_died_is_not_believed(health: Health, cli: Cli, tmp_path: Path) -> None:
    for step in list(Step)[:-1]:
        health.step(step, OK)
    health.line("se", "UP", "linked", [])
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    rewrite(tmp_path / "run/appliance/health.json", pid=gone.pid)
    ran = cli("why")
    assert ran.code == 1
    assert f"pid {gone.pid}) no longer runs" in ran.out
    assert "no longer runs" in json.loads(cli("why", "--json").out)["verdict"]


def test_a_daemon_that_stands_still_is_not_believed(health: Health, cli: Cli, tmp_path: Path) -> None:
    for step in list(Step)[:-1]:
        health.step(step, OK)
    health.line("se", "UP", "linked", [])
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stopped:
        try:
            rewrite(tmp_path / "run/appliance/health.json", pid=stopped.pid)
            assert cli("why").code == 0
            stopped.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
            why, status, check = cli("why"), cli("status", "--json"), cli("status", "--check")
        finally:
            stopped.kill()
    assert (why.code, check.code) == (1, 1)
    assert f"(process {stopped.pid}) is stopped" in why.out
    assert "all steps happened" not in why.out
    assert f"kill -CONT {stopped.pid}" in json.loads(status.out)["trouble"]


def test_a_controller_is_asked_for_a_subject(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "run/appliance/health.json"
    path.parent.mkdir(parents=True)
    Health(path, "controller", SystemClock()).line("controller", "ready", "3 links", ["controller.example"])
    ran = cli("why")
    assert ran.code == 0
    assert "this controller  ready" in ran.out
    assert "name an SE" in ran.out


def test_no_daemon_ever(cli: Cli) -> None:
    ran = cli("why")
    assert ran.code == 5
    assert "appliance mode show" in ran.err
