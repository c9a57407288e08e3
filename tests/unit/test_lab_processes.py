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
from appliance.lab.layout import LabError

SLEEPS = "import time; time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def begin(program: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
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
    assert processes.end([msgspec.structs.replace(known, started=known.started - 1)], timeout_s=0.2) == []
    assert stranger.poll() is None


def test_ending_asks_first_and_kills_after_the_deadline(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    gentle, stubborn = start(SLEEPS), start(STUBBORN)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    known = [processes.identify(process.pid) for process in (gentle, stubborn)]
    assert processes.end(known, timeout_s=1.0) == [known[1]]
    assert not any(processes.is_running(process) for process in known)
    assert processes.end(known, timeout_s=1.0) == []


def test_a_stopped_process_ends_too(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    process = start(SLEEPS)
    known = processes.identify(process.pid)
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert processes.end([known], timeout_s=10.0) == []
    assert time.monotonic() - began < 5.0


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
