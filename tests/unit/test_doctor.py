"""The doctor: each check finds what it is for."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from appliance.cli import doctor, root
from appliance.cli.context import CliContext
from appliance.cli.doctor import Finding, Result
from appliance.paths import Paths
from appliance.runtime import mode
from appliance.runtime.clock import SystemClock
from appliance.runtime.health import Health
from appliance.runtime.mode import Mode, ModeDocument, Phase
from appliance.runtime.units import UNITS
from appliance.settings import Controller, Se, Settings
from appliance.storage.lock import RootLock


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = Paths(tmp_path)
    found.state.mkdir(parents=True)
    return found


def settle(paths: Paths, role: Mode, phase: Phase = Phase.DONE) -> None:
    mode.document_of(paths).save(ModeDocument(mode=role, target=role, phase=phase))


def only(findings: object) -> Finding:
    (found,) = findings  # type: ignore[misc]
    assert isinstance(found, Finding)
    return found


def test_a_machine_without_a_role_is_looked_at_without_failures_of_its_own(
    paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    root.main(["--root", str(paths.root), "doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    checks = {finding["check"] for finding in found["findings"]}
    assert checks >= {"settings", "mode", "permissions", "disk", "clock", "port", "sshd", "glibc", "systemd"}
    assert found["ok"] is all(finding["result"] != "fail" for finding in found["findings"])


def test_failures_end_with_one_and_are_printed_whole(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    paths.settings_file.parent.mkdir(parents=True)
    paths.settings_file.write_text("[se]\nmax_links = 0\n[log]\nlevel = 7\n")
    assert root.main(["--root", str(paths.root), "doctor"]) == 1
    out = capsys.readouterr().out
    assert "fail  settings" in out
    assert "se.max_links = 0: expected int >= 1" in out
    assert "\\n" not in out  # each problem is a line


def test_a_broken_mode_file_is_a_finding(paths: Paths) -> None:
    paths.mode_file.write_text("{")
    findings = doctor.examine(CliContext(paths=paths))
    assert [finding.result for finding in findings if finding.check == "mode"] == [Result.FAIL]


@pytest.mark.parametrize(
    ("document", "result"),
    [
        (ModeDocument(mode=Mode.SE, target=Mode.SE), Result.OK),
        (ModeDocument(), Result.WARN),
        (ModeDocument(mode=Mode.SE, target=Mode.NONE, phase=Phase.INTENT), Result.FAIL),
    ],
)
def test_the_mode(document: ModeDocument, result: Result) -> None:
    assert doctor.check_mode(document).result is result


def test_the_daemon(paths: Paths) -> None:
    assert list(doctor.check_daemon(paths, Mode.NONE)) == []
    assert only(doctor.check_daemon(paths, Mode.SE)).result is Result.WARN
    with RootLock(paths.lock):
        assert only(doctor.check_daemon(paths, Mode.SE)).text == f"process {os.getpid()}"
        paths.run.mkdir(parents=True)
        Health(paths.health_file, "se", SystemClock()).line("se", "UP", "OK", [])
        assert only(doctor.check_daemon(paths, Mode.SE)).text == f"process {os.getpid()}: UP OK"
        Health(paths.health_file, "se", SystemClock()).line("se", "ENROLLING", "nonce: refused", [])
        outside = only(doctor.check_daemon(paths, Mode.SE))
        assert (outside.result, outside.text) == (Result.WARN, f"process {os.getpid()}: ENROLLING nonce: refused")
        assert "appliance why" in outside.hint
        os.utime(paths.health_file, (0, 0))
        hangs = only(doctor.check_daemon(paths, Mode.SE))
        assert hangs.result is Result.FAIL
        assert "has not stirred" in hangs.text
    paths.lock.unlink()
    paths.lock.symlink_to("nowhere")
    assert only(doctor.check_daemon(paths, Mode.SE)).hint == "look as root"


def test_a_controller_that_does_not_answer(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ANSWER_S", 0.2)
    assert list(doctor.check_answers(paths, Mode.CONTROLLER)) == []  # it doesn't run, which is told elsewhere
    paths.run.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(paths.controller_socket))
        listener.listen()
        found = only(doctor.check_answers(paths, Mode.CONTROLLER))
    assert found.result is Result.FAIL
    assert "did not answer within 0.2 s" in found.text


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        ("root-ca.key", 0o600, ""),
        ("root-ca.key", 0o640, "others can read a secret"),
        ("identity.json", 0o604, "others can read a secret"),
        ("image-key.pem", 0o640, "others can read a secret"),
        ("id_se", 0o644, "others can read a secret"),
        ("id_se.pub", 0o644, ""),
        ("ssh_host_ed25519_key", 0o640, "others can read a secret"),
        ("root-ca.pem", 0o644, ""),
        ("trust.json", 0o664, "others can change it"),
    ],
)
def test_permissions(paths: Paths, name: str, bits: int, expected: str) -> None:
    paths.controller_state.mkdir(mode=0o700)
    file = paths.controller_state / name
    file.write_bytes(b"")
    file.chmod(bits)
    (paths.controller_state / "link").symlink_to(file)
    found = only(doctor.check_permissions(paths))
    if not expected:
        assert (found.result, found.text) == (Result.OK, "2 files and directories are as they should be")
        return
    assert found.result is Result.FAIL
    assert found.text == f"{file} has mode {bits:04o}: {expected}"
    assert found.hint.startswith("chmod ")


def test_a_directory_that_cannot_be_looked_at_is_told(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    paths.se_state.mkdir()

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "lstat", refuse)
    monkeypatch.setattr(Path, "exists", lambda path: path == paths.se_state)
    first, _ = doctor.check_permissions(paths)
    assert (first.result, first.hint) == (Result.WARN, "look as root")


@pytest.mark.parametrize(("reserve", "result"), [(0, Result.OK), (1 << 60, Result.FAIL)])
def test_disk(paths: Paths, reserve: int, result: Result) -> None:
    assert only(doctor.check_disk(paths, reserve)).result is result


def test_a_disk_that_fills_up_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 300

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    assert only(doctor.check_disk(Paths(tmp_path / "not/yet"), 100)).result is Result.WARN


@pytest.mark.parametrize(
    ("told", "role", "result", "words"),
    [
        (True, Mode.SE, Result.OK, "synchronised"),
        (False, Mode.NONE, Result.WARN, "not synchronised"),
        (False, Mode.SE, Result.WARN, "against the controller's time"),
        (False, Mode.CONTROLLER, Result.WARN, "SEs may take theirs"),
    ],
)
def test_clock(told: bool, role: Mode, result: Result, words: str) -> None:
    found = only(doctor.check_clock(SystemClock(synchronised=told), role))
    assert found.result is result
    assert words in found.text


def test_a_controller_without_a_cluster(paths: Paths) -> None:
    assert list(doctor.check_cluster(paths, Mode.SE)) == []
    assert only(doctor.check_cluster(paths, Mode.CONTROLLER)).result is Result.FAIL
    paths.cluster_file.parent.mkdir()
    paths.cluster_file.touch()
    assert list(doctor.check_cluster(paths, Mode.CONTROLLER)) == []


def test_ports_of_a_controller(paths: Paths) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        terms = Controller(
            ssh_listen=f"127.0.0.1:{port}", enroll_listen="127.0.0.1:0", reverse_port=0, metrics_listen="127.0.0.1:0"
        )
        first, *rest = doctor.check_ports(paths, Settings(controller=terms), Mode.CONTROLLER)
        assert first.result is Result.FAIL
        assert f"ssh port {port} is held by" in first.text
        assert f"(process {os.getpid()})" in first.text
        assert {finding.result for finding in rest} == {Result.OK}
        first, *_ = doctor.check_ports(paths, Settings(controller=terms), Mode.NONE)
        assert first.result is Result.WARN
        with RootLock(paths.lock):
            first, *_ = doctor.check_ports(paths, Settings(controller=terms), Mode.CONTROLLER)
            assert first.text == f"ssh port {port} is ours"


def test_a_free_port_is_free(paths: Paths) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    terms = Controller(ssh_listen=f"127.0.0.1:{port}")
    paths.lock.symlink_to("nowhere")
    first, *_ = doctor.check_ports(paths, Settings(controller=terms), Mode.CONTROLLER)
    assert first.text == f"ssh port {port} is free"


def test_the_sshd_of_an_se(paths: Paths) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = Settings(se=Se(sshd_port=port))
        assert only(doctor.check_ports(paths, settings, Mode.SE)).result is Result.OK
    assert only(doctor.check_ports(paths, settings, Mode.SE)).result is Result.FAIL


def test_the_ssh_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/usr/sbin/sshd")
    assert only(doctor.check_ssh_server(Mode.SE)) == Finding("sshd", Result.OK, "/usr/sbin/sshd")
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert only(doctor.check_ssh_server(Mode.SE)).result is Result.FAIL
    assert only(doctor.check_ssh_server(Mode.CONTROLLER)).result is Result.WARN


@pytest.mark.parametrize(
    ("text", "frozen", "result"),
    [
        ("glibc 2.36", False, Result.OK),
        ("glibc 2.35", True, Result.OK),
        ("glibc 2.31", False, Result.WARN),
        ("glibc 2.31", True, Result.FAIL),
        ("glibc", False, Result.WARN),
        ("glibc x.y", False, Result.WARN),
        ("", False, Result.WARN),
    ],
)
def test_glibc(monkeypatch: pytest.MonkeyPatch, text: str, frozen: bool, result: Result) -> None:
    monkeypatch.setattr(sys, "frozen", frozen, raising=False)
    assert only(doctor.check_glibc(text)).result is result


def test_a_root_too_deep_for_sockets() -> None:
    assert list(doctor.check_sockets(Paths(Path("/")))) == []
    assert only(doctor.check_sockets(Paths(Path("/" + "x" * 100)))).result is Result.WARN


_FAKE = '#!/bin/sh\ncase "$1" in is-enabled) echo $ENABLED;; is-active) echo $ACTIVE;; esac\n'


@pytest.mark.parametrize(
    ("enabled", "active", "result"),
    [("enabled", "active", Result.OK), ("enabled", "failed", Result.FAIL), ("", "", Result.FAIL)],
)
def test_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: str, active: str, result: Result) -> None:
    (tmp_path / "systemctl").write_text(_FAKE)
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("ENABLED", enabled)
    monkeypatch.setenv("ACTIVE", active)
    monkeypatch.setattr(doctor, "why_not_systemd", lambda _: "")
    found = list(doctor.check_systemd(Paths(Path("/")), Mode.SE))
    assert len(found) == len(UNITS[Mode.SE])
    assert {finding.result for finding in found} == {result}


def test_without_systemd_that_is_said(paths: Paths) -> None:
    assert only(doctor.check_systemd(paths, Mode.SE)).text == "not used: this instance's root isn't /"
