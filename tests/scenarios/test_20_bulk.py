"""20: bulk over a link. Heartbeats come through in time, both ways, forward and reverse; readers that don't read cost
bounded memory.

The way is 10 Mbit/s wide and 70 ms long, with some megabytes of buffer before its narrowest place: what fills it stands
before every ping.
"""

from __future__ import annotations

import contextlib
import re
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from lab_rig import RealSe, Site, site
from rig import free_ports, until
from rough import controller_pid, resident_bytes
from shaper import shaped

from appliance.protocol.tunnel import DEADLINE_S

MIB = 1 << 20
WINDOWS_BYTES = 16 * MIB
INTERVAL_S = 0.25
SECONDS = 5.0
ANSWERED = re.compile(r"heartbeat \d+ answered after ([0-9.]+) ms")
USUAL_MS = 500.0
"""What half of them take at most: 70 ms of way, as much again and 50 ms of queue, and a busy machine. The window that
SSH servers usually grant would make it 1700."""
SLOW_BYTES_PER_S = 10 * 125_000


class Service:
    """A controller's service: takes what comes, or sends for ever, as the first byte says; it may stop reading."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        self.taken = 0
        self.reads = threading.Event()
        self.reads.set()
        self._threads = [threading.Thread(target=self._run)]
        self._threads[0].start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._connections.append(sock)
                self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
                self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            if sock.recv(1) == b"g":
                while True:
                    sock.sendall(bytes(65536))
            while self.reads.wait() and (received := sock.recv(65536)):
                self.taken += len(received)

    def close(self) -> None:
        """Ends it."""
        self.reads.set()
        for sock in [self._listener, *self._connections]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()


class Place(NamedTuple):
    """A site whose SE is UP and reaches the service."""

    at: Site
    se: RealSe
    service: Service
    local: int


@contextlib.contextmanager
def place(root: Path, **way: float) -> Iterator[Place]:
    """A controller, an SE with a forward to a service, and a way between them."""
    service = Service()
    (local,) = free_ports(1)
    terms = {"heartbeat_interval_s": INTERVAL_S, "windows_max_bytes": WINDOWS_BYTES}
    try:
        with contextlib.ExitStack() as stack:
            at = stack.enter_context(site(root, settings=terms, services={"bulk": f"127.0.0.1:{service.port}"}))
            if way:
                at.ssh.target = stack.enter_context(shaped(at.controller.ssh_port, **way))  # type: ignore[arg-type]
            se = at.se("se-1")
            with se.paths.settings_file.open("a") as settings:
                settings.write(f'[se.forwards]\nbulk = "127.0.0.1:{local}"\n')
            se.start(wrap=["env", "APPLIANCE_LOG_LEVEL=debug"])
            until(lambda: se.state == "UP", what="the SE is up")
            until(
                lambda: at.controller.operator.se("se-1").summary.state.value in {"UP", "DEGRADED"}, what="it is seen"
            )
            yield Place(at, se, service, local)
    finally:
        service.close()


def beats_ms(se: RealSe) -> list[float]:
    return [float(ms) for ms in ANSWERED.findall(se.logged())]


@contextlib.contextmanager
def judged_by_heartbeats(found: Place) -> Iterator[None]:
    """What happens inside must leave the link alone, and each heartbeat answered in time."""
    links, missed = found.se.logged().count("up -> idle"), found.at.events("se.down")
    before = len(beats_ms(found.se))
    yield
    answers = beats_ms(found.se)[before:]
    assert found.se.logged().count("up -> idle") == links, "the link was lost"
    assert found.at.events("se.down") == missed
    assert found.se.state == "UP"
    assert len(answers) >= 0.6 * SECONDS / (INTERVAL_S + 0.2), "heartbeats went on"
    assert statistics.median(answers) < USUAL_MS, answers
    assert max(answers) < 1000 * DEADLINE_S, answers


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("slow"), rtt_s=0.07, mbit_s=10.0) as found:
        yield found


def test_bulk_over_the_forward_to_the_controller(slow: Place) -> None:
    with judged_by_heartbeats(slow), socket.create_connection(("127.0.0.1", slow.local)) as sock:
        sock.sendall(b"p")
        before, end = slow.service.taken, time.monotonic() + SECONDS
        while time.monotonic() < end:
            sock.sendall(bytes(65536))
        assert slow.service.taken - before > 0.5 * SECONDS * SLOW_BYTES_PER_S, "and it is carried"


def test_bulk_over_the_forward_to_the_se(slow: Place) -> None:
    with judged_by_heartbeats(slow), socket.create_connection(("127.0.0.1", slow.local)) as sock:
        sock.sendall(b"g")
        taken, end = 0, time.monotonic() + SECONDS
        while time.monotonic() < end:
            taken += len(sock.recv(65536))
        assert taken > 0.5 * SECONDS * SLOW_BYTES_PER_S


@pytest.mark.parametrize("way", ["to the SE", "to the controller"])
def test_bulk_over_the_reverse_path(slow: Place, tmp_path: Path, way: str) -> None:
    """OpenSSH on both ends, as an operator copies a file."""
    state = slow.at.controller.paths.controller_state
    known = tmp_path / "known_hosts"
    host_key = (slow.se.paths.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text()
    known.write_text("se-1 " + " ".join(host_key.split()[:2]) + "\n")
    options = {
        "BatchMode": "yes", "HostKeyAlias": "se-1", "UserKnownHostsFile": str(known), "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
    }  # fmt: skip
    address = slow.at.controller.operator.se("se-1").summary.address
    command = [
        "ssh", "-F", "none", "-i", str(state / "id_se"), "-p", str(slow.at.controller.bound["reverse_port"]),
        *(word for key, value in options.items() for word in ("-o", f"{key}={value}")), f"{slow.se.user}@{address}",
    ]  # fmt: skip
    count = round(SECONDS * SLOW_BYTES_PER_S)
    with judged_by_heartbeats(slow):
        if way == "to the SE":
            done = subprocess.run([*command, "wc -c"], input=bytes(count), capture_output=True, timeout=60, check=True)
            assert int(done.stdout) == count
        else:
            send = [*command, f"head -c {count} /dev/zero"]
            done = subprocess.run(send, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True)
            assert len(done.stdout) == count


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place(tmp_path_factory.mktemp("fast")) as found:
        yield found


def test_a_service_that_stops_reading_costs_the_controller_a_window(fast: Place) -> None:
    """The window has grown on a fast way; when its reader stops, no more than the pool of windows is kept for it."""
    with judged_by_heartbeats(fast), socket.create_connection(("127.0.0.1", fast.local)) as sock:
        sock.sendall(b"p")
        while fast.service.taken < 64 * MIB:
            sock.sendall(bytes(MIB))
        before = resident_bytes(controller_pid(fast.at))
        fast.service.reads.clear()
        sock.settimeout(2.0)
        poured = 0
        with contextlib.suppress(TimeoutError):
            while poured < 512 * MIB:
                poured += sock.send(bytes(65536))
        assert poured < 512 * MIB, "whoever sends has to wait"
        assert resident_bytes(controller_pid(fast.at)) - before < 2 * WINDOWS_BYTES
        taken = fast.service.taken
        fast.service.reads.set()
        until(lambda: fast.service.taken - taken >= poured, what="all of it arrives")
        time.sleep(SECONDS / 2)  # heartbeats are counted


def test_a_local_program_that_stops_reading_costs_the_se_a_window(fast: Place) -> None:
    with judged_by_heartbeats(fast), socket.create_connection(("127.0.0.1", fast.local)) as sock:
        sock.sendall(b"g")
        taken = 0
        while taken < 64 * MIB:
            taken += len(sock.recv(MIB))
        before = resident_bytes(fast.se.pid), resident_bytes(controller_pid(fast.at))
        time.sleep(SECONDS)  # nothing is read; what is judged is what this costs
        after = resident_bytes(fast.se.pid), resident_bytes(controller_pid(fast.at))
        assert after[0] - before[0] < 160 * MIB
        assert after[1] - before[1] < 16 * MIB
