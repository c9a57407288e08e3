"""The peer: what an operator without this product would run, sshd with `ssh -R` kept up by autossh.

Timeouts are 5 s x 3 on both sides, as in the row's goal. State lies in a directory of the bench, ports on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import asyncssh
import uvloop

from appliance.lab import sshd as lab_sshd
from appliance.lab.layout import LOOPBACK
from appliance.lab.ports import free_ports
from appliance.runtime import child
from appliance.storage.atomic import make_dir
from bench.processes import BenchError, children, until

ALIVE_S = 5
ALIVE_COUNT = 3
START_S = 20.0
LOG_INS_AT_ONCE = 32


def missing(*, autossh: bool = True) -> list[str]:
    """Debian packages without which there is no peer; `autossh` says whether it is one without that."""
    needed = {"sshd": "openssh-server", "ssh": "openssh-client"} | ({"autossh": "autossh"} if autossh else {})
    return [package for program, package in needed.items() if child.find_program(program) is None]


class Server:
    """A running sshd that grants reverse forwards to one key."""

    def __init__(self, directory: Path, port: int, daemon: child.Daemon) -> None:
        self.directory = directory
        self.port = port
        self.pid = daemon.pid
        self.log = daemon.log_path

    @property
    def sessions(self) -> list[int]:
        """Its processes without the listener."""
        return children(self.pid)

    def arguments(self, *, port: int = 0) -> list[str]:
        """What `ssh` needs to log in, without a program before it and host and forwards after it.

        `port` leads to it by another way.
        """
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": 10,
            "ExitOnForwardFailure": "yes",
            "HostKeyAlias": f"[{LOOPBACK}]:{self.port}",
            "IdentitiesOnly": "yes",
            "ServerAliveCountMax": ALIVE_COUNT,
            "ServerAliveInterval": ALIVE_S,
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": self.directory / "known_hosts",
        }
        settings = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return ["-F", "none", *settings, "-i", str(self.directory / "id"), "-p", str(port or self.port)]


@contextlib.contextmanager
def server(place: Path) -> Iterator[Server]:
    """An sshd for this user, below `place`."""
    directory = place / "openssh"
    make_dir(directory)
    (port,) = free_ports(1)
    is_root = os.geteuid() == 0
    if is_root:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # its unit makes it, where there is one
    for name in ("host", "id"):
        child.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(directory / name)], timeout_s=30)
    (directory / "authorized_keys").write_text((directory / "id.pub").read_text())
    (directory / "known_hosts").write_text(f"[{LOOPBACK}]:{port} {(directory / 'host.pub').read_text()}")
    # sshd without PAM lets nobody in whose password is locked, as root's often is
    uses_pam = is_root and lab_sshd._is_locked(user(), Path("/etc/shadow"))
    lines = [
        f"ListenAddress {LOOPBACK}:{port}",
        f"HostKey {directory / 'host'}",
        f"AuthorizedKeysFile {directory / 'authorized_keys'}",
        "AuthenticationMethods publickey",
        "PermitRootLogin prohibit-password",
        "StrictModes no",
        f"UsePAM {'yes' if uses_pam else 'no'}",
        "PidFile none",
        "LogLevel VERBOSE",
        "AllowTcpForwarding yes",
        f"ClientAliveInterval {ALIVE_S}",
        f"ClientAliveCountMax {ALIVE_COUNT}",
        "MaxStartups 1000",
    ]
    file = directory / "sshd_config"
    file.write_text("\n".join(lines) + "\n")
    command = [lab_sshd.find(), "-D", "-e", "-f", str(file)]
    with child.Daemon(command, log_path=directory / "sshd.log") as daemon:
        running = Server(directory, port, daemon)
        try:
            until(lambda: lab_sshd.is_answering(port), what="sshd answers", deadline_s=START_S)
            yield running
        finally:
            # sessions outlive the listener
            for pid in running.sessions:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 15)


class Reverse:
    """One machine's link: autossh, its ssh, and a port on the server that leads to `target_port`."""

    def __init__(self, to: Server, daemon: child.Daemon, reverse_port: int) -> None:
        self._server = to
        self.autossh = daemon.pid
        self.reverse_port = reverse_port

    @property
    def ssh(self) -> list[int]:
        """The ssh under autossh; none between two tries."""
        return children(self.autossh)

    def answers(self) -> bool:
        """Whether an SSH server shows its banner at the far end of the reverse port."""
        return shows_banner(LOOPBACK, self.reverse_port)


@contextlib.contextmanager
def reverse(to: Server, target_port: int) -> Iterator[Reverse]:
    """A link to `to` that is up, kept up by autossh."""
    (port,) = free_ports(1)
    forward = ["-N", "-R", f"{LOOPBACK}:{port}:{LOOPBACK}:{target_port}"]
    command = ["autossh", "-M", "0", *to.arguments(), *forward, f"{user()}@{LOOPBACK}"]
    # without a gate time autossh gives up where the very first try fails, which is what we want to see
    with child.Daemon(command, log_path=to.directory / "autossh.log") as daemon:
        link = Reverse(to, daemon, port)
        try:
            until(link.answers, what="autossh's reverse port answers", deadline_s=START_S, every_s=0.1)
            yield link
        finally:
            for pid in link.ssh:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 18)  # a stopped one would sleep through autossh's signal


@contextlib.contextmanager
def links(to: Server, count: int) -> Iterator[float]:
    """`count` plain links at once, held by one client process, as ours are. Gives the seconds until all were in."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        told: Future[float] = Future()
        leave = threading.Event()
        held = thread.submit(lambda: uvloop.run(_hold(to, count, told, leave)))
        try:
            while not (told.done() or held.done()):
                time.sleep(0.05)
            if held.done():
                held.result()
            yield told.result()
        finally:
            leave.set()


async def _hold(to: Server, count: int, told: Future[float], leave: threading.Event) -> None:
    options = await asyncssh.SSHClientConnectionOptions.construct(
        username=user(),
        client_keys=[str(to.directory / "id")],
        known_hosts=str(to.directory / "known_hosts"),
        agent_path=None,
        config=None,
        preferred_auth=["publickey"],
    )
    turn = asyncio.Semaphore(LOG_INS_AT_ONCE)

    async def one() -> asyncssh.SSHClientConnection:
        async with turn:
            return await asyncssh.connect(LOOPBACK, to.port, options=options)

    began = time.monotonic()
    connections = await asyncio.gather(*(one() for _ in range(count)))
    told.set_result(time.monotonic() - began)
    await asyncio.to_thread(leave.wait)
    for connection in connections:
        connection.abort()


def shows_banner(host: str, port: int) -> bool:
    """Whether an SSH server shows its banner (RFC 4253 section 4.2)."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as connection:
            connection.settimeout(1.0)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise BenchError(f"user id {os.geteuid()} has no name, and sshd logs in names only") from None
