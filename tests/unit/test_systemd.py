"""What passes between a daemon and systemd, and the units that are shipped."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from appliance.errors import SettingsError
from appliance.runtime import systemd

UNITS = Path(__file__).parents[2] / "appliance/cli/units"


def test_without_a_manager_nothing_happens() -> None:
    assert systemd.notify("READY=1", environ={}) is False
    assert systemd.watchdog_interval_s(environ={}) is None
    assert systemd.listen_fds(environ={}) == {}


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_readiness_reaches_the_manager(tmp_path: Path, kind: str) -> None:
    name = str(tmp_path / "notify") if kind == "path" else f"@appliance-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0") if kind == "abstract" else name)
        manager.settimeout(5.0)
        assert systemd.notify("READY=1\nSTATUS=é", environ={"NOTIFY_SOCKET": name})
        assert manager.recv(100).decode() == "READY=1\nSTATUS=é"


def test_a_manager_that_went_away_or_does_not_read_is_no_failure(tmp_path: Path) -> None:
    name = str(tmp_path / "notify")
    assert systemd.notify("WATCHDOG=1", environ={"NOTIFY_SOCKET": name}) is False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        sent = 0
        while systemd.notify("WATCHDOG=1", environ={"NOTIFY_SOCKET": name}) and sent < 100_000:
            sent += 1
        assert 0 < sent < 100_000, "a full queue must neither block nor raise"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_asked(environ: dict[str, str], expected: float | None) -> None:
    assert systemd.watchdog_interval_s(environ=environ) == expected


def test_a_process_that_replaces_itself_gives_the_watchdog_more_time() -> None:
    environ = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    assert systemd.watchdog_limit(300.0, environ=environ) == "\nWATCHDOG=1\nWATCHDOG_USEC=300000000"
    assert systemd.watchdog_limit(environ=environ) == "\nWATCHDOG=1\nWATCHDOG_USEC=30000000"
    assert systemd.watchdog_limit(300.0, environ={}) == ""


_CHILD = """
import os, sys
from appliance.errors import SettingsError
from appliance.runtime import systemd
environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": sys.argv[1], "LISTEN_FDNAMES": sys.argv[2]}
try:
    found = systemd.listen_fds(environ=environ)
except SettingsError as error:
    print(error.message)
    raise SystemExit(3)
assert environ == {} and systemd.listen_fds(environ=environ) == {}
for name, listener in sorted(found.items()):
    print(name, listener.getsockname()[1], os.get_inheritable(listener.fileno()))
    listener.close()
"""


def _hand_over(files: list[int], names: str) -> tuple[int, str]:
    """Starts a child with `files` from descriptor 3 on, as systemd does."""
    # dup2 in the child, before its interpreter starts: subprocess can't renumber.
    moves = " ".join(f"{3 + at}<&{fd}" for at, fd in enumerate(files))
    script = f'exec {moves} && exec "$0" -W error -c "$1" {len(files)} "{names}"'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, _CHILD],
        pass_fds=files,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.stderr == "", done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def listeners() -> object:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    # Away from 3 and 4, which the child renumbers them to.
    files = [fcntl.fcntl(listener.fileno(), fcntl.F_DUPFD, 60) for listener in sockets]
    yield files, [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    for fd in files:
        os.close(fd)


def test_sockets_come_by_their_names(listeners: tuple[list[int], list[int]]) -> None:
    files, ports = listeners
    assert _hand_over(files, "ssh:enroll") == (0, f"enroll {ports[1]} False\nssh {ports[0]} False\n")


def test_a_nameless_socket_is_unknown(listeners: tuple[list[int], list[int]]) -> None:
    files, ports = listeners
    assert _hand_over(files, "ssh") == (0, f"ssh {ports[0]} False\nunknown {ports[1]} False\n")


def test_two_sockets_of_one_name_are_refused(listeners: tuple[list[int], list[int]]) -> None:
    assert _hand_over(listeners[0], "ssh:ssh") == (3, "systemd handed over two sockets named 'ssh'\n")


def test_what_is_no_socket_is_refused(listeners: tuple[list[int], list[int]], tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    far = fcntl.fcntl(fd, fcntl.F_DUPFD, 60)
    try:
        code, text = _hand_over([listeners[0][0], far], "ssh:enroll")
    finally:
        os.close(fd)
        os.close(far)
    assert code == 3
    assert "descriptor 4 ('enroll') from systemd is no socket" in text


@pytest.mark.parametrize("environ", [{"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_FDS": "1"}])
def test_sockets_of_another_process_are_left_alone(environ: dict[str, str]) -> None:
    assert systemd.listen_fds(environ=environ) == {}


def test_a_broken_count_is_nothing() -> None:
    assert systemd.listen_fds(environ={"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}) == {}


def test_refusing_closes_what_came(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    first = fcntl.fcntl(pair[0].fileno(), fcntl.F_DUPFD, 500)
    second = os.dup2(pair[1].fileno(), first + 1)
    monkeypatch.setattr(systemd, "_FIRST_FD", first)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:a"}
    with pytest.raises(SettingsError, match="two sockets named 'a'"):
        systemd.listen_fds(environ=environ)
    for fd in (first, second):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    for listener in pair:
        listener.close()


# The shipped units.


@pytest.fixture
def runnable(tmp_path: Path) -> Path:
    """The units with a program that exists here."""
    for file in UNITS.iterdir():
        text = file.read_text().replace("/usr/bin/appliance ", "/bin/true ")
        (tmp_path / file.name).write_text(text)
    return tmp_path


def _analyze(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze isn't installed")
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, cwd=cwd, check=False
    )


def test_the_units_are_valid(runnable: Path) -> None:
    units = sorted(str(file) for file in runnable.iterdir() if file.suffix in {".service", ".socket", ".path"})
    assert len(units) == 8
    done = _analyze("verify", *units, cwd=runnable)
    assert (done.returncode, done.stderr.strip()) == (0, "")


@pytest.mark.parametrize("unit", ["appliance-controller.service", "appliance-se.service"])
def test_the_daemons_are_confined(runnable: Path, unit: str) -> None:
    done = _analyze("security", "--offline=true", "--threshold=20", str(runnable / unit), cwd=runnable)
    assert done.returncode == 0, done.stdout[-2000:]
