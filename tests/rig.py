"""The rig: a real controller as a child process, and simulated SEs against it. Ends only what it started."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncssh
import msgspec

from appliance.cli.operator import Operator
from appliance.controller.init import initialise
from appliance.lab.simulated import Beats, SharedSshd, SimulatedSe
from appliance.lab.simulated_link import TurnError
from appliance.paths import Paths
from appliance.pki.secret import Secret
from appliance.protocol.seed import Bundle
from appliance.runtime.clock import SystemClock
from appliance.runtime.mode import Mode, ModeDocument, document_of

DEADLINE_S = 20.0


def until(condition: Callable[[], Any], *, what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Polls until `condition` is true, and returns what it gave."""
    end = time.monotonic() + deadline_s
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.02)


def is_open(sock: socket.socket) -> bool:
    """Whether the peer hasn't closed a connection; what it said is thrown away."""
    try:
        while chunk := sock.recv(4096, socket.MSG_DONTWAIT):
            del chunk
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


async def until_async(condition: Callable[[], Any], *, what: str, deadline_s: float = DEADLINE_S) -> Any:
    """The same inside a loop, with the operator's calls in a thread."""
    return await asyncio.to_thread(until, condition, what=what, deadline_s=deadline_s)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


def open_descriptors() -> int:
    """How many this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def leaves_core(process: subprocess.Popen[bytes]) -> bool:
    """Aborts a process and tells whether the kernel wrote its memory to a file.

    The limit on core files is lifted first, where that is allowed: the process itself must forbid them as well.
    """
    folder = Path(f"/proc/{process.pid}/cwd").resolve()
    with contextlib.suppress(PermissionError):
        resource.prlimit(process.pid, resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    process.send_signal(signal.SIGABRT)
    _, status = os.waitpid(process.pid, 0)
    process.wait()
    assert os.WTERMSIG(status) == signal.SIGABRT
    for name in ("core", f"core.{process.pid}"):
        (folder / name).unlink(missing_ok=True)
    return os.WCOREDUMP(status)


def core_limit(pid: int) -> tuple[int, int]:
    """Soft and hard limit of a process on core files."""
    return resource.prlimit(pid, resource.RLIMIT_CORE)


def set_mode(paths: Paths, role: Mode) -> None:
    """Makes a root a controller's or an SE's, as `appliance mode set` leaves it."""
    paths.mode_file.parent.mkdir(parents=True, exist_ok=True)
    document_of(paths).save(ModeDocument(mode=role, target=role))


_REFUSED = re.compile(
    r'^(?:appliance_refused_total|appliance_enroll_refusals_total)\{\w+="([^"]+)"\} (\d+)$', re.MULTILINE
)


def refused(metrics_port: int) -> dict[str, int]:
    """What a controller turned away since its start, by reason, as its metrics tell."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=20) as answer:
        return {reason: int(count) for reason, count in _REFUSED.findall(answer.read().decode())}


class RunningController:
    """One controller on loopback."""

    def __init__(
        self, root: Path, *, settings: dict[str, Any] | None = None,
        clock: dict[str, Any] | None = None, services: dict[str, str] | None = None,
        address: str = "127.0.0.1", seen: tuple[int, int] | None = None, date: str = "now", told: str = "",
        passphrase: str = "",
    ) -> None:  # fmt: skip
        """`address` is bound and told to SEs; `told` is told to them instead, and `seen` instead of the own ports for
        enrolling and SSH."""
        self.root = root
        self.paths = Paths(root)
        self.enroll_port, self.ssh_port = free_ports(2)
        terms: dict[str, Any] = {
            "enroll_listen": f"{address}:{self.enroll_port}",
            "ssh_listen": f"{address}:{self.ssh_port}",
            "reverse_port": 0,
            "metrics_listen": "127.0.0.1:0",
            **(settings or {}),
        }
        self.paths.settings_file.parent.mkdir(parents=True)
        lines = ["[controller]", *(f"{key} = {json.dumps(value)}" for key, value in terms.items())]
        lines += ["[controller.services]", *(f"{key} = {json.dumps(value)}" for key, value in (services or {}).items())]
        lines += ["[clock]", *(f"{key} = {json.dumps(value)}" for key, value in (clock or {}).items())]
        self.paths.settings_file.write_text("\n".join(lines) + "\n")
        self.log = root / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None
        enroll, ssh = seen or (self.enroll_port, self.ssh_port)
        self._make_cluster(told or address, enroll, ssh, date, passphrase)
        set_mode(self.paths, Mode.CONTROLLER)

    def _make_cluster(self, address: str, enroll_port: int, ssh_port: int, date: str, passphrase: str) -> None:
        """What `appliance controller init` does, in this process: most tests need a controller, few the command."""
        make = functools.partial(
            initialise, self.paths, addresses=[address], enroll_port=enroll_port, ssh_port=ssh_port,
            clock=SystemClock(), date=int(time.time() if date == "now" else datetime.fromisoformat(date).timestamp()),
            passphrase=Secret(passphrase.encode()) if passphrase else None,
        )  # fmt: skip
        with ThreadPoolExecutor(1) as outside:  # of the loop that the caller may be in
            outside.submit(make).result()

    def command(self, *args: str, check: bool = True, said: str = "") -> subprocess.CompletedProcess[str]:
        """Runs `appliance` on this root; `said` is what it reads on stdin."""
        line = [sys.executable, "-m", "appliance", "--root", str(self.root), *args]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, input=said)
        assert not check or done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done

    def start(self, *python: str, wrap: Sequence[str] = (), deadline_s: float = 60.0) -> RunningController:
        """Starts the daemon and waits until it listens.

        `python` are arguments in place of `-m appliance`; `wrap` comes before the command.
        """
        self.paths.controller_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*wrap, sys.executable, *(python or ("-m", "appliance")), "--root", str(self.root), "run"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until(self._is_ready, what="the controller listens", deadline_s=deadline_s)
        return self

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        return self.paths.controller_file.exists()

    @property
    def bound(self) -> dict[str, Any]:
        """What it listens on."""
        found: dict[str, Any] = json.loads(self.paths.controller_file.read_text())
        return found

    @property
    def operator(self) -> Operator:
        """Its operator API."""
        return Operator(self.paths)

    @property
    def bundle(self) -> Bundle:
        """The bundle of the first image key."""
        path = next((self.paths.controller_state / "bundles").glob("*.json"))
        return msgspec.json.decode(path.read_bytes(), type=Bundle)

    def signal(self, number: int) -> None:
        """Sends a signal to the daemon."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends it without warning, as a power cut does."""
        self.signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> int:
        """Asks it to stop and returns its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Waits for its end."""
        assert self.process is not None
        code = self.process.wait(timeout=20)
        self.process = None
        return code

    def end(self) -> None:
        """Makes sure that nothing stays."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGCONT)
            self.kill()

    def state(self, se: str) -> str:
        """State and reason of an SE in one text."""
        summary = self.operator.se(se).summary
        return f"{summary.state.value} {summary.reason.value}"


@contextlib.contextmanager
def running(root: Path, **more: Any) -> Iterator[RunningController]:
    """A running controller below `root`."""
    controller = RunningController(root, **more)
    try:
        yield controller.start()
    finally:
        controller.end()


class Machine:
    """What simulated SEs stand on: an SSH server for their reverse paths."""

    def __init__(self) -> None:
        self.sshd = SharedSshd()

    def se(self, bundle: Bundle, name: str = "sim") -> SimulatedSe:
        """A fresh SE."""
        return SimulatedSe(bundle, name=name, sshd=self.sshd, beats=Beats())


async def link_in_turn(se: SimulatedSe) -> None:
    """Links, and comes back when the gateway says so, as an agent does."""
    while True:
        try:
            await se.link()
        except TurnError as busy:
            await asyncio.sleep(busy.wait_s)
        else:
            return


async def linked(stand: Machine, controller: RunningController, name: str) -> SimulatedSe:
    """A fresh SE that is enrolled and linked, and whose first heartbeat was answered."""
    se = stand.se(controller.bundle, name)
    await se.enroll()
    await link_in_turn(se)
    await se.beat()
    return se


def twin_of(stand: Machine, controller: RunningController, se: SimulatedSe) -> SimulatedSe:
    """Another machine with the same key and state."""
    twin = stand.se(controller.bundle, se.name)
    twin.identity, twin.se_id, twin.grant, twin.ticket = se.identity, se.se_id, se.grant, se.ticket
    twin.trust = se.trust
    return twin


@contextlib.asynccontextmanager
async def machine():  # type: ignore[no-untyped-def]
    """A machine for simulated SEs; closes their links at the end."""
    descriptors = open_descriptors()
    made: list[SimulatedSe] = []
    stand = Machine()
    plain = stand.se

    def remembered(bundle: Bundle, name: str = "sim") -> SimulatedSe:
        made.append(plain(bundle, name))
        return made[-1]

    stand.se = remembered  # type: ignore[method-assign]
    try:
        yield stand
    finally:
        for se in made:
            conn = se.conn
            se.close()
            if conn is not None:
                with contextlib.suppress(Exception):
                    await conn.wait_closed()
        # asyncssh ends connections in tasks and callbacks of its own; a loop closed before them leaves sockets behind.
        deadline = time.monotonic() + 5
        while open_descriptors() > descriptors:
            assert time.monotonic() < deadline, "descriptors are left behind"
            await asyncio.sleep(0.01)


def leave_keys_lie(se: SimulatedSe) -> None:
    """Begins a key exchange, leaves the answer lie, and lets the client go on as if it had not asked."""
    se.conn._packet_handlers = {**se.conn._packet_handlers, asyncssh.constants.MSG_KEXINIT: lambda *_: True}
    se.conn._send_kexinit()
    se.conn._kex_complete = True
