"""Children: environment, deadlines, failures that can be pasted, daemons."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import ChildError
from appliance.runtime import child


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for(path: Path, *, timeout_s: float = 10.0) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.005)
    raise AssertionError(f"{path} wasn't written within {timeout_s} s")


def test_a_frozen_program_s_library_path_does_not_leak() -> None:
    env = {"LD_LIBRARY_PATH": "/opt/appliance", "PATH": "/bin", "_MEIPASS2": "x", "_PYI_ARCHIVE_FILE": "x"}
    assert child.clean_environment(env, frozen=True) == {"PATH": "/bin"}


def test_what_the_user_had_comes_back() -> None:
    env = {"LD_LIBRARY_PATH": "/opt/appliance", "LD_LIBRARY_PATH_ORIG": "/usr/local/lib", "PYTHONHOME": "/x"}
    assert child.clean_environment(env, frozen=True) == {"LD_LIBRARY_PATH": "/usr/local/lib"}


def test_unfrozen_the_user_s_own_settings_stay() -> None:
    env = {"LD_LIBRARY_PATH": "/usr/local/lib", "PYTHONPATH": "."}
    assert child.clean_environment(env, frozen=False) == env


def test_what_systemd_gave_this_process_stays_here() -> None:
    env = {"NOTIFY_SOCKET": "x", "LISTEN_FDS": "1", "LISTEN_PID": "1", "WATCHDOG_USEC": "1", "HOME": "/root"}
    assert child.clean_environment(env) == {"HOME": "/root"}


def test_self_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert child.self_command() == [sys.executable, "-m", "appliance"]
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert child.self_command() == [sys.executable]


def test_output_and_input() -> None:
    code = "import sys; print(sys.stdin.read().upper()); print('é', file=sys.stderr)"
    found = child.run(python(code), timeout_s=20.0, input="text")
    assert (found.returncode, found.stdout, found.stderr) == (0, "TEXT\n", "é\n")
    assert child.run(python("print(open(0,'rb').read())"), timeout_s=20.0, input=b"\xff").stdout == "b'\\xff'\n"


def test_without_input_stdin_is_empty(tmp_path: Path) -> None:
    found = child.run(python("import os,sys; print(repr(sys.stdin.read()), os.getcwd())"), timeout_s=20.0, cwd=tmp_path)
    assert found.stdout == f"'' {tmp_path}\n"


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert child.run(python(r"import sys; sys.stdout.buffer.write(b'\xff')"), timeout_s=20.0).stdout == "\ufffd"


def test_a_failure_shows_the_end_of_stderr_and_the_command_to_paste() -> None:
    with pytest.raises(ChildError) as caught:
        child.run(python("import sys; sys.exit('no ' + 'x' * 5000 + ' the end')"), timeout_s=20.0)
    assert "ended with exit code 1:\n" in caught.value.message
    assert caught.value.message.endswith("the end")
    assert len(caught.value.message) < 2200
    assert caught.value.hint.startswith(f"to see it yourself: {sys.executable} -c 'import sys;")


def test_an_exit_code_may_be_no_failure() -> None:
    assert child.run(python("raise SystemExit(3)"), timeout_s=20.0, check=False).returncode == 3


@pytest.mark.parametrize(("number", "text"), [(15, "was killed by SIGTERM"), (40, "was killed by signal 40")])
def test_a_signal_is_named(number: int, text: str) -> None:
    with pytest.raises(ChildError, match=text):
        child.run(python(f"import os; os.kill(os.getpid(), {number})"), timeout_s=20.0)


def test_a_deadline_ends_the_whole_family(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with pytest.raises(ChildError, match=r"didn't end within 2 s"):
        child.run(["sh", "-c", f"sleep 600 & echo $! > {file}; wait"], timeout_s=2.0)
    grandchild = int(wait_for(file))
    deadline = time.monotonic() + 10.0
    while _lives(grandchild) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _lives(grandchild)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_an_interrupt_ends_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupted(process: object, *_: object) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.Popen.communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        child.run(python("import time; time.sleep(600)"), timeout_s=600.0)
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_in_the_moment_of_the_start_ends_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The signal comes when the child lives and nobody holds its handle yet."""
    file = tmp_path / "pid"
    start = subprocess.Popen.__init__

    def slow(process: subprocess.Popen[bytes], *args: Any, **kwargs: Any) -> None:
        start(process, *args, **kwargs)
        wait_for(file)
        signal.raise_signal(number)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.Popen.__init__", slow)
    former = signal.signal(number, stop)
    try:
        for begin in (
            lambda args: child.run(args, timeout_s=600.0),
            lambda args: child.Daemon(args, log_path=tmp_path / "log"),
        ):
            file.unlink(missing_ok=True)
            with pytest.raises(KeyboardInterrupt):
                begin(["sh", "-c", f"echo $$ > {file}; exec sleep 600"])
            assert not _lives(int(file.read_text()))
            assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, former)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("qemu-img", "apt-get install qemu-utils"), ("no-such-thing", "install it, or put it on the PATH")],
)
def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ChildError) as caught:
        child.run([name, "info"], timeout_s=1.0)
    assert caught.value.hint == hint


def test_what_is_added_to_the_environment_reaches_the_child() -> None:
    code = "import os; print(os.environ['SOURCE_DATE_EPOCH'], 'PATH' in os.environ)"
    assert child.run(python(code), timeout_s=10.0, env={"SOURCE_DATE_EPOCH": "7"}).stdout == "7 True\n"


def test_packages_of_programs_are_known() -> None:
    assert child.package_of("mcopy") == "mtools"
    assert child.package_of("no-such-thing") == ""


def test_programs_in_sbin_are_found_without_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert child.find_program("sh") in {"/usr/bin/sh", "/bin/sh"}


def test_what_cannot_be_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match=r"couldn't be started: No such file or directory: .*gone"):
        child.run(python("pass"), timeout_s=1.0, cwd=tmp_path / "gone")
    script = tmp_path / "script"
    script.write_text("#!/nowhere/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(ChildError, match="couldn't be started"):
        child.run([str(script)], timeout_s=1.0)


def test_a_daemon_lives_in_its_context_and_logs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with child.Daemon(python("import time; print('here', flush=True); time.sleep(600)"), log_path=log) as daemon:
        assert wait_for(log) == "here\n"
        assert daemon.poll() is None
        assert os.getsid(daemon.pid) == daemon.pid
        assert daemon.wait(0.0) is None
    assert daemon.poll() == -signal.SIGTERM
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_daemon_gets_its_descriptors_and_environment(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    code = f"import os; os.write({writing}, os.environ['SAY'].encode())"
    try:
        with child.Daemon(python(code), log_path=tmp_path / "log", pass_fds=(writing,), env={"SAY": "hi"}) as daemon:
            assert daemon.wait(20.0) == 0
        assert os.read(reading, 10) == b"hi"
    finally:
        os.close(reading)
        os.close(writing)


def test_a_daemon_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import signal,time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    daemon = child.Daemon(python(code), log_path=log)
    wait_for(log)
    assert daemon.terminate(0.05) == -signal.SIGKILL


def test_terminating_what_has_ended_is_fine(tmp_path: Path) -> None:
    daemon = child.Daemon(python("pass"), log_path=tmp_path / "log")
    assert daemon.wait(20.0) == 0
    assert daemon.terminate(1.0) == 0


def test_a_detached_daemon_lives_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    daemon = child.Daemon(python("import time; print('on', flush=True); time.sleep(600)"), log_path=log)
    pid = daemon.detach()
    del daemon
    try:
        wait_for(log)
        assert _lives(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_daemon_that_cannot_be_started_leaks_nothing(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ChildError):
        child.Daemon(["no-such-thing"], log_path=tmp_path / "log")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
