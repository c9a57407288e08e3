"""Our authorized_keys line under a stock sshd: it may do what our gateway grants, and is refused what that refuses.

So an operator may put a plain OpenSSH server in the gateway's place, and the file alone keeps each SE in its bounds.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.pki import ssh_keys
from appliance.protocol.address import se_address

SSH = shutil.which("ssh") or ""
SFTP = shutil.which("sftp") or ""
SSHD = shutil.which("sshd") or (("/usr/sbin/sshd") if Path("/usr/sbin/sshd").exists() else "")
pytestmark = pytest.mark.skipif(
    not (SSH and SSHD and SFTP), reason="needs OpenSSH: apt-get install openssh-server openssh-client"
)

NUMBER = 12_345
OWN = se_address(NUMBER)
USER = pwd.getpwuid(os.geteuid()).pw_name


class Service:
    """A TCP service on loopback that says its name."""

    def __init__(self, name: bytes, address: str = "127.0.0.1") -> None:
        self.name = name
        self.sock = socket.create_server((address, 0))
        self.port: int = self.sock.getsockname()[1]
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.sock.accept()
                with connection, contextlib.suppress(OSError):
                    connection.sendall(self.name)

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.sock.close()


def free_port(address: str = "127.0.0.1") -> int:
    with socket.create_server((address, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def hears(address: str, port: int) -> bytes:
    """What a service behind a forward says; empty where nothing answers."""
    try:
        with socket.create_connection((address, port), timeout=5) as sock:
            return sock.recv(100)
    except OSError:
        return b""


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


class Sshd:
    """A stock sshd that knows one SE by our line, with its services."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.permitted, self.foreign = Service(b"permitted"), Service(b"foreign")
        self.port, self.reverse_port = free_port(), free_port(OWN)
        host_private, host_line = ssh_keys.generate()
        private, line = ssh_keys.generate()
        self._file("host_key", host_private.reveal())
        self.key = self._file("id", private.reveal())
        restricted = ssh_keys.authorized_keys_line(
            line, number=NUMBER, reverse_port=self.reverse_port, comment=f"SE {NUMBER}",
            permit_open=[f"127.0.0.1:{self.permitted.port}"],
        )  # fmt: skip
        authorized = self._file("authorized_keys", f"{restricted}\n".encode())
        known = ssh_keys.known_hosts_line([f"[127.0.0.1]:{self.port}"], host_line)
        self.known_hosts = self._file("known_hosts", f"{known}\n".encode())
        config = [
            f"ListenAddress 127.0.0.1:{self.port}",
            f"HostKey {directory / 'host_key'}",
            f"AuthorizedKeysFile {authorized}",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin yes",
            # As open as a server can be: what holds is the line alone.
            "AllowTcpForwarding yes",
            "AllowAgentForwarding yes",
            "X11Forwarding yes",
            "PermitTTY yes",
            # But for what a line can't say (see `ssh_keys.authorized_keys_line`).
            "GatewayPorts clientspecified",
            "AllowStreamLocalForwarding no",
            "PermitTunnel no",
            "Subsystem sftp internal-sftp",
        ]
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (directory / "sshd.log").open("wb") as log:
            self.process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(self._file("config", "\n".join(config).encode() + b"\n"))],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        until(lambda: hears("127.0.0.1", self.port).startswith(b"SSH-2.0"), "sshd never answered")

    def _file(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        path.chmod(0o600)
        return path

    def options(self, *, known_hosts: Path | None = None) -> list[str]:
        """Options of ssh and sftp: only what we wrote is believed and used."""
        chosen = {
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(known_hosts or self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "IdentityFile": str(self.key),
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ExitOnForwardFailure": "yes",
            "ConnectTimeout": "10",
        }
        return ["-F", "/dev/null", *(word for name, value in chosen.items() for word in ("-o", f"{name}={value}"))]

    def ssh(self, *words: str, command: tuple[str, ...] = (), stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs ssh to its end."""
        line = [SSH, *self.options(), "-p", str(self.port), *words, f"{USER}@127.0.0.1", *command]
        return subprocess.run(line, capture_output=True, text=True, input=stdin, timeout=30, check=False)

    @contextlib.contextmanager
    def forwarding(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """Keeps ssh running for its forwards."""
        line = [SSH, *self.options(), "-N", "-p", str(self.port), *words, f"{USER}@127.0.0.1"]
        with subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            try:
                yield process
            finally:
                process.kill()  # a SIGTERM just before it waits is noticed at its next packet only

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.permitted.close()
        self.foreign.close()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    found = Sshd(tmp_path_factory.mktemp("sshd"))
    try:
        yield found
    finally:
        found.close()


# What is granted.


def test_its_own_reverse_address_is_granted(sshd: Sshd) -> None:
    target = f"{OWN}:{sshd.reverse_port}:127.0.0.1:{sshd.foreign.port}"
    with sshd.forwarding("-R", target):
        until(lambda: hears(OWN, sshd.reverse_port) == b"foreign", "the reverse path never came up")
        assert hears("127.0.0.1", sshd.reverse_port) == b""


def test_the_permitted_destination_is_granted(sshd: Sshd) -> None:
    local = free_port()
    with sshd.forwarding("-L", f"127.0.0.1:{local}:127.0.0.1:{sshd.permitted.port}"):
        until(lambda: hears("127.0.0.1", local) == b"permitted", "the forward never came up")


# What is refused.


@pytest.mark.parametrize(
    "listen",
    [
        "{other}:{port}",
        "{own}:{free}",
        "127.0.0.1:{port}",
        "0.0.0.0:{port}",
        "*:{port}",
        "{port}",
        "{own}:0",
        "[::1]:{port}",
        "localhost:{port}",
    ],
)
def test_other_listen_addresses_are_refused(sshd: Sshd, listen: str) -> None:
    address = listen.format(own=OWN, other=se_address(NUMBER + 1), port=sshd.reverse_port, free=free_port(OWN))
    done = sshd.ssh("-N", "-R", f"{address}:127.0.0.1:{sshd.foreign.port}")
    assert done.returncode == 255
    assert "remote port forwarding failed" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", OWN, "::1", "0.0.0.0"])
def test_other_destinations_are_refused(sshd: Sshd, host: str) -> None:
    local = free_port()
    with sshd.forwarding("-L", f"127.0.0.1:{local}:[{host}]:{sshd.foreign.port}") as process:
        until(lambda: hears("127.0.0.1", local) == b"" and listens(local), "ssh never listened")
        assert hears("127.0.0.1", local) == b""
        process.kill()
        assert process.stderr is not None
        assert b"administratively prohibited" in process.stderr.read()


def listens(port: int) -> bool:
    """Whether a port is bound, without connecting to it."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_the_permitted_port_under_another_name_is_refused(sshd: Sshd) -> None:
    done = sshd.ssh("-W", f"localhost:{sshd.permitted.port}")
    assert done.returncode != 0
    assert "permitted" not in done.stdout


@pytest.mark.parametrize("command", [(), ("id",), ("sh", "-c", "id"), ("/bin/true",)])
def test_neither_shell_nor_command_runs(sshd: Sshd, command: tuple[str, ...]) -> None:
    done = sshd.ssh(command=command, stdin="id\nexit 0\n")
    assert done.returncode == 1, done.stderr  # that of /bin/false
    assert done.stdout == ""


def test_no_terminal_is_given(sshd: Sshd) -> None:
    done = sshd.ssh("-tt", command=("id",))
    assert "PTY allocation request failed" in done.stderr
    assert "uid=" not in done.stdout


def test_no_sftp_and_no_subsystem(sshd: Sshd, tmp_path: Path) -> None:
    batch = tmp_path / "batch"
    batch.write_text("ls /\n")
    line = [SFTP, "-b", str(batch), *sshd.options(), "-P", str(sshd.port), f"{USER}@127.0.0.1"]
    done = subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30, check=False)
    assert done.returncode != 0
    assert "etc" not in done.stdout
    assert sshd.ssh("-s", command=("sftp",)).returncode == 1


def test_no_unix_sockets_either_way(sshd: Sshd, tmp_path: Path) -> None:
    done = sshd.ssh("-N", "-R", f"{tmp_path}/listen:127.0.0.1:{sshd.foreign.port}")
    assert done.returncode == 255
    assert not (tmp_path / "listen").exists()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{tmp_path}/service")
        sock.listen()
        local = free_port()
        with sshd.forwarding("-L", f"127.0.0.1:{local}:{tmp_path}/service") as process:
            until(lambda: listens(local), "ssh never listened")
            assert hears("127.0.0.1", local) == b""
            process.kill()
            assert process.stderr is not None
            assert b"open failed" in process.stderr.read()


# The known_hosts line.


def test_our_known_hosts_line_is_the_only_one_believed(sshd: Sshd, tmp_path: Path) -> None:
    _, other = ssh_keys.generate()
    good = sshd.known_hosts.read_text()
    for text, wanted in (
        (good, "Permission denied"),
        (ssh_keys.known_hosts_line([f"[127.0.0.1]:{sshd.port}"], other), "HOST IDENTIFICATION HAS CHANGED"),
        (
            ssh_keys.known_hosts_line([f"[127.0.0.2]:{sshd.port}", "127.0.0.3"], good.split(" ", 1)[1].strip()),
            "host key is known",
        ),
        ("", "host key is known"),
    ):
        file = tmp_path / "known_hosts"
        file.write_text(text.strip() + "\n")
        line = [SSH, *sshd.options(known_hosts=file), "-o", "PubkeyAuthentication=no", "-p", str(sshd.port)]
        done = subprocess.run(
            [*line, f"{USER}@127.0.0.1"], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=30,
            check=False,
        )  # fmt: skip
        assert done.returncode == 255
        assert wanted in done.stderr, (text, done.stderr)
