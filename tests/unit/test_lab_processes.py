"""Only what was started is ended, whatever became of its pid; ports that are free."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from appliance.lab import ports, processes
from appliance.lab.layout import LabError, Process

SLEEPS = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "the-lab"])
print(child.pid, flush=True)
child.wait()
"""


def end(leaders: list[Process], *, timeout_s: float, marker: str = "the-lab") -> int:
    return processes.end(leaders, timeout_s=timeout_s, marker=marker)


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def begin(program: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_process_is_known_by_pid_start_and_boot(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    known = processes.identify(start(SLEEPS).pid)
    assert processes.is_running(known)
    assert not processes.is_running(None)
    assert not processes.is_running(msgspec.structs.replace(known, started=known.started + 1))
    assert not processes.is_running(msgspec.structs.replace(known, boot_id="another"))


def test_ending_leaves_strangers_with_the_same_pid_alone(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    stranger = start(SLEEPS)
    known = processes.identify(stranger.pid)
    assert end([msgspec.structs.replace(known, started=known.started - 1)], timeout_s=0.2) == 0
    assert stranger.poll() is None


def test_ending_asks_first_and_kills_after_the_deadline(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    gentle, stubborn = start(SLEEPS), start(STUBBORN)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    known = [processes.identify(process.pid) for process in (gentle, stubborn)]
    assert end(known, timeout_s=1.0) == 1
    assert not any(processes.is_running(process) for process in known)
    assert end(known, timeout_s=1.0) == 0


def test_a_stopped_process_ends_too(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    process = start(SLEEPS)
    known = processes.identify(process.pid)
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert end([known], timeout_s=10.0) == 0
    assert time.monotonic() - began < 5.0


def test_what_a_leader_started_ends_with_it(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    leader = start(PARENT)
    assert leader.stdout is not None
    child = processes.identify(int(leader.stdout.readline()))
    assert end([processes.identify(leader.pid)], timeout_s=10.0) == 0
    assert not processes.is_running(child)


def test_orphans_of_a_killed_leader_end_where_they_are_the_labs(
    start: Callable[[str], subprocess.Popen[bytes]],
) -> None:
    leader = start(PARENT)
    assert leader.stdout is not None
    child = processes.identify(int(leader.stdout.readline()))
    known = processes.identify(leader.pid)
    leader.kill()
    leader.wait()
    assert end([known], timeout_s=0.2, marker="another lab") == 0
    assert processes.is_running(child)
    assert end([known], timeout_s=10.0) == 0
    assert not processes.is_running(child)


def test_a_zombie_does_not_run(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    process = start(SLEEPS)
    known = processes.identify(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not processes.is_running(known)


def test_a_process_that_is_gone_can_not_be_identified() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.raises(LabError, match="ended at once"):
        processes.identify(gone.pid)


def test_free_ports_are_free_different_and_not_taken() -> None:
    found = ports.free_ports(5, taken=[1])
    assert len(set(found)) == 5
    assert all(ports.is_free(port) for port in found)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert not ports.is_free(port)
        offered = iter([port, found[0], found[1], found[1], found[2]])
        assert ports.free_ports(2, taken=[found[0]], choose=lambda _low, _high: next(offered)) == found[1:3]


def test_too_few_ports_are_told() -> None:
    with pytest.raises(LabError, match="fewer than 2 TCP ports"):
        ports.free_ports(2, choose=lambda low, _high: low, taken=[])
