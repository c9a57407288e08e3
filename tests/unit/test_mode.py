"""The mode switch: its table, every cut, its refusals, and what it does to a daemon and to systemd."""

from __future__ import annotations

import itertools
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.cli.mode import shipped_units
from appliance.errors import ChildError, ModeError, StateMachineError
from appliance.paths import Paths
from appliance.runtime import child, mode, units
from appliance.runtime.clock import SystemClock
from appliance.runtime.mode import BareMachine, Event, Mode, ModeDocument, Phase, advance
from appliance.settings import Controller, Settings, Users
from appliance.storage.lock import RootLock, holder

CLOCK = SystemClock()


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


# The table.

_LEGAL = {
    (Phase.DONE, Event.WANT, True): Phase.WRITTEN,
    (Phase.DONE, Event.WANT, False): Phase.INTENT,
    (Phase.INTENT, Event.WANT, True): Phase.INTENT,
    (Phase.INTENT, Event.WANT, False): Phase.INTENT,
    (Phase.WRITTEN, Event.WANT, True): Phase.WRITTEN,
    (Phase.WRITTEN, Event.WANT, False): Phase.INTENT,
    (Phase.INTENT, Event.STOPPED, None): Phase.WRITTEN,
    (Phase.WRITTEN, Event.ENABLED, None): Phase.DONE,
}


@pytest.mark.parametrize(
    ("phase", "event", "same"),
    [(phase, event, same) for phase, event in itertools.product(Phase, Event) for same in (True, False, None)],
)
def test_every_pair_of_phase_and_event(phase: Phase, event: Event, same: bool | None) -> None:
    if (event is Event.WANT) is (same is None):
        return  # a target belongs to WANT and to nothing else
    document = ModeDocument(mode=Mode.SE, target=Mode.CONTROLLER, phase=phase)
    target = None if same is None else Mode.SE if same else Mode.NONE
    expected = _LEGAL.get((phase, event, same))
    if expected is None:
        with pytest.raises(StateMachineError, match="can't happen in phase"):
            advance(document, event, at=5.0, target=target)
        return
    after = advance(document, event, at=5.0, target=target)
    assert (after.phase, after.at) == (expected, 5.0)
    if event is Event.WANT:
        assert (after.mode, after.target) == (Mode.SE, target)
    else:
        assert after.target is Mode.CONTROLLER
        assert after.mode is (Mode.CONTROLLER if event is Event.STOPPED else Mode.SE)


def test_want_without_a_target_is_a_defect() -> None:
    with pytest.raises(StateMachineError):
        advance(ModeDocument(), Event.WANT, at=0.0)


# The driver, cut everywhere.


class Recorder:
    """A machine that keeps book: which role runs, and that a new one never starts beside the old one."""

    def __init__(self, running: Mode = Mode.NONE) -> None:
        self.running = running
        self.calls: list[str] = []

    def stop(self) -> list[str]:
        self.calls.append("stop")
        self.running = Mode.NONE
        return []

    def enable(self, role: Mode) -> list[str]:
        assert self.running in {Mode.NONE, role}, "two roles at once"
        self.calls.append(f"enable {role}")
        self.running = role
        return []


def change(paths: Paths, target: Mode, machine: mode.Machine, *, force: bool = False, enrolled: int = 0) -> list[str]:
    moves = mode.change(paths, target, machine, clock=CLOCK, force=force, count_enrolled=lambda: enrolled)
    return [move.step for move in moves]


def settled(paths: Paths, role: Mode) -> None:
    paths.state.mkdir(parents=True, exist_ok=True)
    mode.document_of(paths).save(ModeDocument(mode=role, target=role))


def test_a_machine_that_was_never_told_has_no_role(paths: Paths) -> None:
    assert mode.load(paths) == ModeDocument()
    assert mode.running_role(paths) is Mode.NONE


def test_five_steps_lead_to_another_role(paths: Paths) -> None:
    machine = Recorder()
    assert change(paths, Mode.SE, machine) == ["intent", "stop", "write", "enable", "done"]
    assert machine.calls == ["stop", "enable se"]
    found = mode.load(paths)
    assert (found.mode, found.target, found.phase) == (Mode.SE, Mode.SE, Phase.DONE)
    assert abs(found.at - time.time()) < 60
    assert paths.mode_file.stat().st_mode & 0o777 == 0o644
    assert mode.running_role(paths) is Mode.SE


def test_asking_for_what_holds_repairs_without_stopping(paths: Paths) -> None:
    machine = Recorder()
    change(paths, Mode.SE, machine)
    assert change(paths, Mode.SE, machine) == ["intent", "enable", "done"]
    assert machine.calls == ["stop", "enable se", "enable se"]


@pytest.mark.parametrize("cut", range(1, 6))
@pytest.mark.parametrize("then", [Mode.SE, Mode.CONTROLLER, Mode.NONE])
def test_a_cut_after_any_step_is_healed_by_asking_again(paths: Paths, cut: int, then: Mode) -> None:
    settled(paths, Mode.CONTROLLER)
    machine = Recorder(Mode.CONTROLLER)
    moves = mode.change(paths, Mode.SE, machine, clock=CLOCK, force=True, count_enrolled=lambda: 0)
    for _ in range(cut):
        next(moves)
    moves.close()
    # What a daemon that starts now would play is a whole role, the old or the new one.
    assert mode.running_role(paths) is (Mode.CONTROLLER if cut <= 2 else Mode.SE)
    change(paths, then, machine, force=True)
    found = mode.load(paths)
    assert (found.mode, found.phase, machine.running) == (then, Phase.DONE, then)


class Failing(Recorder):
    """A machine whose systemd refuses."""

    def enable(self, role: Mode) -> list[str]:
        raise ChildError(f"no {role}")


def test_a_failed_side_effect_leaves_a_change_that_can_be_finished(paths: Paths) -> None:
    with pytest.raises(ChildError):
        change(paths, Mode.SE, Failing())
    assert mode.load(paths).phase is Phase.WRITTEN
    assert change(paths, Mode.SE, Recorder()) == ["intent", "enable", "done"]


def test_while_it_changes_no_daemon_starts_in_the_old_role(paths: Paths) -> None:
    settled(paths, Mode.SE)
    moves = mode.change(paths, Mode.NONE, Recorder(Mode.SE), clock=CLOCK, force=False, count_enrolled=lambda: 0)
    next(moves)
    with pytest.raises(ModeError, match=f"changed from se to none by process {os.getpid()}"):
        mode.running_role(paths)
    moves.close()
    assert mode.running_role(paths) is Mode.SE


def test_two_changes_at_once_are_kept_apart(paths: Paths) -> None:
    moves = mode.change(paths, Mode.SE, Recorder(), clock=CLOCK, force=False, count_enrolled=lambda: 0)
    next(moves)
    with pytest.raises(ModeError, match=f"being changed by process {os.getpid()} already"):
        change(paths, Mode.NONE, Recorder())
    moves.close()


def test_state_of_the_role_that_was_left_is_untouched(paths: Paths) -> None:
    settled(paths, Mode.SE)
    paths.se_state.mkdir()
    (paths.se_state / "identity.json").write_bytes(b"key")
    change(paths, Mode.NONE, Recorder(Mode.SE))
    assert (paths.se_state / "identity.json").read_bytes() == b"key"


# Leaving the controller role.


@pytest.mark.parametrize(("enrolled", "text"), [(1, "1 SE is enrolled"), (12, "12 SEs are enrolled")])
def test_a_controller_with_ses_is_not_left(paths: Paths, enrolled: int, text: str) -> None:
    settled(paths, Mode.CONTROLLER)
    machine = Recorder(Mode.CONTROLLER)
    with pytest.raises(ModeError, match=text):
        change(paths, Mode.SE, machine, enrolled=enrolled)
    assert (mode.load(paths).mode, mode.load(paths).phase, machine.calls) == (Mode.CONTROLLER, Phase.DONE, [])


def test_unless_it_is_forced_or_empty_or_stays(paths: Paths) -> None:
    settled(paths, Mode.CONTROLLER)
    assert "done" in change(paths, Mode.CONTROLLER, Recorder(), enrolled=3)
    assert "done" in change(paths, Mode.NONE, Recorder(), enrolled=3, force=True)
    settled(paths, Mode.CONTROLLER)
    assert "done" in change(paths, Mode.SE, Recorder(), enrolled=0)


def test_a_lost_mode_file_does_not_open_that_door(paths: Paths) -> None:
    paths.controller_state.mkdir(parents=True)
    paths.store_file.write_bytes(b"")
    with pytest.raises(ModeError, match="2 SEs are enrolled"):
        change(paths, Mode.SE, Recorder(), enrolled=2)


# Stopping a real daemon.

_DAEMON = """
import signal, sys, time
from pathlib import Path
from appliance.storage.lock import RootLock
lock = RootLock(Path(sys.argv[1]))
lock.acquire()
def end(*_):
    if sys.argv[2] == "deaf":
        return
    print("draining", flush=True)
    lock.release()
    raise SystemExit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
while True:
    time.sleep(600)
"""


@pytest.fixture
def daemon(paths: Paths) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(kind: str = "polite") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _DAEMON, str(paths.lock), kind],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def bare(paths: Paths, said: list[str], *, timeout_s: float = 20.0) -> BareMachine:
    return BareMachine(paths, why="there is no systemd", progress=said.append, timeout_s=timeout_s)


def test_the_running_daemon_drains_and_its_lock_is_free(
    paths: Paths, daemon: Callable[[], subprocess.Popen[str]]
) -> None:
    process = daemon()
    not_done = bare(paths, []).stop()
    assert holder(paths.lock) is None
    assert process.stdout is not None
    assert process.stdout.read() == "draining\n"
    assert process.wait(10) == 0
    assert not_done == ["no systemd unit was disabled: there is no systemd"]


def test_without_a_daemon_there_is_nothing_to_stop(paths: Paths) -> None:
    bare(paths, []).stop()


def test_a_deaf_daemon_is_named_after_the_deadline(
    paths: Paths, daemon: Callable[[str], subprocess.Popen[str]]
) -> None:
    process = daemon("deaf")
    said: list[str] = []
    with pytest.raises(ModeError, match=rf"process {process.pid}\) didn't stop within 0.05 s"):
        bare(paths, said, timeout_s=0.05).stop()
    with pytest.raises(ModeError) as caught:
        bare(paths, said, timeout_s=1.5).stop()
    assert f"kill -KILL {process.pid}" in caught.value.hint
    assert said == [f"process {process.pid} drains and stops, 1 s so far"]


def test_a_frozen_daemon_is_named_too(paths: Paths, daemon: Callable[[], subprocess.Popen[str]]) -> None:
    process = daemon()
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(ModeError, match="didn't stop"):
        bare(paths, [], timeout_s=0.05).stop()


def test_a_daemon_of_another_user_is_left_with_advice(
    paths: Paths, daemon: Callable[[], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = daemon()

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    with pytest.raises(ModeError, match=rf"process {process.pid}\) runs as another user"):
        bare(paths, []).stop()


def test_a_daemon_that_is_gone_meanwhile_is_no_problem(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(mode, "holder", lambda _: gone.pid)
    bare(paths, []).stop()


def test_a_pid_that_is_somebody_else_s_by_now_is_not_signalled(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([os.getpid(), None])
    monkeypatch.setattr(mode, "holder", lambda _: next(answers))
    bare(paths, []).stop()


def test_who_restarts_the_daemon_is_told_to_stop(
    paths: Paths, daemon: Callable[[], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = daemon()
    answers = iter([process.pid, process.pid, 4711])
    monkeypatch.setattr(mode, "holder", lambda _: next(answers))
    with pytest.raises(ModeError, match=r"process 4711 took its place at once"):
        bare(paths, []).stop()


def test_a_bare_machine_says_what_it_did_not_do(paths: Paths) -> None:
    machine = bare(paths, [])
    assert machine.enable(Mode.NONE) == []
    assert machine.enable(Mode.SE) == [
        "no systemd unit was installed or enabled: there is no systemd",
        f"the daemon was not started: run `appliance --root {paths.root} run`",
    ]
    with RootLock(paths.lock):  # the daemon runs already
        assert machine.enable(Mode.SE) == ["no systemd unit was installed or enabled: there is no systemd"]
    appliance = BareMachine(Paths(Path("/")), why="x", progress=print)
    assert appliance.enable(Mode.SE)[1] == "the daemon was not started: run `appliance run`"


# systemd: the programs at the border are fakes in PATH.

_FAKE = """#!/bin/sh
if [ "$1" = is-active ]; then shift; for unit; do echo ${ACTIVE:-active}; done; exit; fi
echo "$(basename "$0") $*" >> "$CALLS"
sleep ${SLOW:-0}
exit ${FAIL:-0}
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("systemctl", "systemd-sysusers"):
        (directory / name).write_text(_FAKE)
        (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    (tmp_path / "calls").touch()
    return tmp_path / "calls"


_ME = pwd.getpwuid(os.geteuid()).pw_name
_SETTINGS = Settings(
    users=Users(se=_ME, controller=_ME + "x"),
    controller=Controller(ssh_listen="10.0.0.1:2022", enroll_listen="[::]:443", reverse_port=6000),
)


def systemd_machine(paths: Paths, settings: Settings = _SETTINGS) -> units.SystemdMachine:
    return units.SystemdMachine(paths, settings, units=shipped_units(), progress=lambda _: None, etc=paths.root / "etc")


def test_enabling_makes_users_directories_and_units(paths: Paths, calls: Path) -> None:
    assert "done" in change(paths, Mode.SE, systemd_machine(paths))
    assert calls.read_text().splitlines() == [
        f"systemd-sysusers {paths.root}/etc/sysusers.d/appliance.conf",
        "systemctl --no-ask-password daemon-reload",
        "systemctl --no-ask-password stop appliance-se.service appliance-console.path",
        "systemctl --no-ask-password enable --now appliance-se.service appliance-console.path",
    ]
    assert (paths.root / "etc/systemd/system/appliance-console.service").exists()
    unit = (paths.root / "etc/systemd/system/appliance-se.service").read_text()
    assert f"User={_ME}\n" in unit
    assert f"ExecStart={sys.executable} -m appliance run" in unit
    assert paths.se_state.stat().st_mode & 0o777 == 0o700
    assert paths.lock.stat().st_uid == os.geteuid()


_SOCKETS = "appliance-gateway.socket appliance-enroll.socket appliance-reverse.socket"


@pytest.mark.parametrize(
    ("active", "port", "is_stopped"), [("active", 22, False), ("inactive", 22, True), ("active", 2022, True)]
)
def test_what_runs_is_stopped_where_a_socket_is_closed_or_a_unit_changed(
    paths: Paths, calls: Path, monkeypatch: pytest.MonkeyPatch, active: str, port: int, is_stopped: bool
) -> None:
    def machine(port: int) -> units.SystemdMachine:
        listen = Controller(ssh_listen=f"0.0.0.0:{port}")
        return systemd_machine(paths, Settings(users=Users(se="nobody", controller=_ME), controller=listen))

    change(paths, Mode.CONTROLLER, machine(22))
    calls.write_text("")
    monkeypatch.setenv("ACTIVE", active)
    change(paths, Mode.CONTROLLER, machine(port))
    stopped = [line for line in calls.read_text().splitlines() if " stop " in line]
    units_of = f"{_SOCKETS} appliance-controller.service appliance-console.path"
    assert stopped == ([f"systemctl --no-ask-password stop {units_of}"] if is_stopped else [])


def test_a_role_that_runs_by_the_units_of_its_image_is_not_stopped(
    paths: Paths, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cloud-init asks for the role that first boot has set: the link that is up shall stay."""
    program, shipped = paths.root / "appliance", paths.root / "shipped"
    program.write_text("")
    shipped.mkdir(parents=True)
    monkeypatch.setattr(units, "PROGRAM", program)
    monkeypatch.setattr(units.child, "self_command", lambda: [str(program)])
    settings = Settings(users=Users(se=_ME))
    for name, text in shipped_units().items():
        (shipped / name).write_text(units.render(name, text, settings=settings, command=[str(program)]))
    machine = units.SystemdMachine(
        paths, settings, units=shipped_units(), progress=lambda _: None, etc=paths.root / "etc", shipped=shipped
    )
    change(paths, Mode.SE, machine)
    assert " stop " not in calls.read_text()
    assert not list((paths.root / "etc").rglob("*.service"))


def test_who_waits_for_systemd_is_told(paths: Paths, calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW", "0.1")
    monkeypatch.setattr(units, "_PROGRESS_S", 0.02)
    said: list[str] = []
    machine = units.SystemdMachine(
        paths, _SETTINGS, units=shipped_units(), progress=said.append, etc=paths.root / "etc"
    )
    change(paths, Mode.SE, machine)
    assert "systemd is at work, 0 s so far" in said


def test_leaving_disables_the_sockets_too(paths: Paths, calls: Path) -> None:
    same = Settings(users=Users(se="nobody", controller=_ME))
    machine = systemd_machine(paths, same)
    change(paths, Mode.CONTROLLER, machine)
    calls.write_text("")
    change(paths, Mode.NONE, machine)
    assert calls.read_text() == (
        "systemctl --no-ask-password disable --now appliance-gateway.socket appliance-enroll.socket "
        "appliance-reverse.socket appliance-controller.service appliance-console.path\n"
    )


def test_leaving_disables_what_an_image_has_enabled_too(paths: Paths, calls: Path) -> None:
    """First boot of our own system writes no unit: the image's own is enabled."""
    shipped = paths.root / "shipped"
    shipped.mkdir()
    (shipped / "appliance-se.service").write_text("")
    machine = units.SystemdMachine(
        paths, _SETTINGS, units={}, progress=lambda _: None, etc=paths.root / "etc", shipped=shipped
    )
    machine.stop()
    assert calls.read_text() == "systemctl --no-ask-password disable --now appliance-se.service\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_images_seed_is_given_to_the_se_who_destroys_its_key(paths: Paths, calls: Path) -> None:
    seed = paths.root / "etc/appliance/seed"
    seed.mkdir(parents=True, mode=0o700)
    (seed / "image-key.pem").write_text("x")
    change(paths, Mode.SE, systemd_machine(paths, Settings(users=Users(se="nobody", controller="other"))))
    nobody = pwd.getpwnam("nobody").pw_uid
    assert [place.stat().st_uid for place in (seed, seed / "image-key.pem")] == [nobody, nobody]


def test_a_missing_user_is_told(paths: Paths, calls: Path) -> None:
    settings = Settings(users=Users(se="no-such-user"))
    with pytest.raises(ModeError, match="there is no user 'no-such-user'"):
        change(paths, Mode.SE, systemd_machine(paths, settings))
    assert mode.load(paths).phase is Phase.WRITTEN


def test_a_refusing_systemd_is_told_with_the_command(
    paths: Paths, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(ChildError) as caught:
        change(paths, Mode.SE, systemd_machine(paths))
    assert "systemd-sysusers" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_made_is_given_to_the_role_s_user_but_nothing_beyond(paths: Paths, calls: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    settings = Settings(users=Users(se="nobody", controller="other"))
    sub = paths.se_state / "sub"
    sub.mkdir(parents=True)
    secret = paths.root / "secret"
    secret.write_text("x")
    (sub / "key").write_text("x")
    (sub / "link").symlink_to(secret)
    (sub / "hard").hardlink_to(secret)
    change(paths, Mode.SE, systemd_machine(paths, settings))
    owners = {file.name: file.lstat().st_uid for file in (paths.se_state, sub, sub / "key", paths.lock)}
    assert set(owners.values()) == {nobody.pw_uid}
    assert secret.stat().st_uid == 0
    assert (sub / "link").lstat().st_uid == 0


def test_units_follow_the_settings() -> None:
    shipped = shipped_units()
    of_roles = {unit for names in units.UNITS.values() for unit in names}
    assert set(shipped) == of_roles | {units.SYSUSERS, "appliance-console.service", "appliance-first-boot.service"}

    def render(name: str) -> str:
        return units.render(name, shipped[name], settings=_SETTINGS, command=["/opt/my app/100%$x"])

    assert "ListenStream=10.0.0.1:2022\n" in render("appliance-gateway.socket")
    assert "ListenStream=[::]:443\n" in render("appliance-enroll.socket")
    assert "ListenStream=0.0.0.0:6000\n" in render("appliance-reverse.socket")
    controller = render("appliance-controller.service")
    assert f"User={_ME}x\nGroup={_ME}x\n" in controller
    assert "ExecStart='/opt/my app/100%%$$x' run" in controller


def test_shipped_units_have_the_defaults_of_the_settings() -> None:
    shipped = shipped_units()
    for name, text in shipped.items():
        assert units.render(name, text, settings=Settings(), command=["/usr/bin/appliance"]) == text


def test_systemd_is_used_where_it_can_be(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    assert units.why_not_systemd(paths) == "this instance's root isn't /"
    slash = Paths(Path("/"))
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    assert units.why_not_systemd(slash) == "this machine wasn't booted with systemd"
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert units.why_not_systemd(slash) == "this takes root"
    found = units.machine_of(slash, Settings(), units={}, progress=print)
    assert isinstance(found, BareMachine)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    found = units.machine_of(slash, Settings(), units={}, progress=print)
    assert isinstance(found, units.SystemdMachine)
    assert found.enable(Mode.NONE) == []


# The command, in processes of its own, killed where it hurts.


def cli(paths: Paths, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*child.self_command(), "--root", str(paths.root), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )


def test_the_command_tells_what_it_did_not_do(paths: Paths) -> None:
    done = cli(paths, "mode", "set", "se")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("this machine's mode is se\n")
    assert "not done: the daemon was not started: run" in done.stdout
    assert cli(paths, "mode", "show").stdout == "se, no daemon runs\n"


def test_the_command_killed_while_it_waits_is_finished_by_repeating(
    paths: Paths, daemon: Callable[[str], subprocess.Popen[str]]
) -> None:
    settled(paths, Mode.SE)
    process = daemon("deaf")
    with subprocess.Popen(
        [*child.self_command(), "--root", str(paths.root), "mode", "set", "none"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as command:
        assert command.stderr is not None
        line = ""
        while "drains and stops" not in line:
            line = command.stderr.readline()
            assert line, "it ended by itself"
        command.kill()
    shown = cli(paths, "mode", "show")
    assert "a change to none was cut after intent; `appliance mode set none` finishes it" in shown.stdout
    assert f"its daemon runs (process {process.pid})" in shown.stdout
    process.kill()
    process.wait()
    assert cli(paths, "mode", "set", "none").returncode == 0
    assert mode.load(paths).phase is Phase.DONE


def test_a_broken_mode_file_is_set_aside_and_told(paths: Paths) -> None:
    settled(paths, Mode.SE)
    paths.mode_file.write_bytes(paths.mode_file.read_bytes()[:20])
    done = cli(paths, "mode", "set", "se")
    assert done.returncode == 4
    assert "was set aside as" in done.stderr
    assert cli(paths, "mode", "set", "se").returncode == 0


def test_the_root_lock_is_not_held_by_a_change(paths: Paths) -> None:
    change(paths, Mode.SE, Recorder())
    with RootLock(paths.lock):
        pass
