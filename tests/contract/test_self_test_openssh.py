"""The SE's self-test at a stock sshd: what that grants is found, each door for itself, and no more than that.

Our own gateway refuses all of it, and a careless one of the tests grants it by asyncssh; here OpenSSH is asked.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig import until

from appliance.pki import ssh_keys
from appliance.pki.identity import Identity
from appliance.protocol.tunnel import SELF_TEST_CHANNEL, Door
from appliance.runtime.clock import SystemClock
from appliance.se.self_test import open_doors
from appliance.se.ssh import SshConnection
from appliance.se.wire import Wire

SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else "")
pytestmark = pytest.mark.skipif(not SSHD, reason="needs OpenSSH: apt-get install openssh-server")

OPEN = [
    "StrictModes no", "UsePAM no", "PermitRootLogin prohibit-password", "PidFile none", "AllowTcpForwarding yes",
    "GatewayPorts clientspecified", "AllowAgentForwarding yes", "X11Forwarding yes", "XAuthLocation /bin/true",
    "Subsystem sftp internal-sftp",
]  # fmt: skip
SESSIONS = {Door.SESSION, Door.SHELL, Door.EXEC, Door.SFTP}


def connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.fixture
def dial(tmp_path: Path) -> Iterator[Callable[[list[str]], SshConnection]]:
    """Starts an sshd whose configuration begins with these lines (the first of a word counts), and logs in."""
    running: list[subprocess.Popen[bytes]] = []
    connections: list[SshConnection] = []

    def do(lines: list[str]) -> SshConnection:
        host, host_line = ssh_keys.generate()
        identity = Identity.create()
        (tmp_path / "host_key").write_bytes(host.reveal())
        (tmp_path / "host_key").chmod(0o600)
        (tmp_path / "authorized_keys").write_text(f"{identity.public_line}\n")
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        named = [
            f"ListenAddress 127.0.0.1:{port}", f"HostKey {tmp_path}/host_key",
            f"AuthorizedKeysFile {tmp_path}/authorized_keys",
        ]  # fmt: skip
        (tmp_path / "config").write_text("\n".join([*lines, *named, *OPEN, ""]))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (tmp_path / "sshd.log").open("wb") as log:
            command = [SSHD, "-D", "-e", "-f", str(tmp_path / "config")]
            running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        until(lambda: connects("127.0.0.1", port), what="sshd answers")
        wire = Wire(socket.create_connection(("127.0.0.1", port)), SystemClock())
        connections.append(SshConnection(wire, clock=SystemClock(), rtt_s=lambda: None, allow_curve25519=True))
        connections[-1].log_in(pwd.getpwuid(os.geteuid()).pw_name, identity, host_keys=[host_line])
        return connections[-1]

    yield do
    for connection in connections:
        connection.close()
    for process in running:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([], SESSIONS | {Door.AGENT, Door.X11, Door.LISTEN, Door.CONNECT}),
        (["X11Forwarding no"], SESSIONS | {Door.AGENT, Door.LISTEN, Door.CONNECT}),
        (["AllowAgentForwarding no"], SESSIONS | {Door.X11, Door.LISTEN, Door.CONNECT}),
        (["AllowTcpForwarding no"], SESSIONS | {Door.AGENT, Door.X11}),
        (["Subsystem other /bin/true", "DisableForwarding yes"], SESSIONS),
        (["MaxSessions 0"], {Door.LISTEN, Door.CONNECT}),
        (["MaxSessions 0", "DisableForwarding yes"], set()),
    ],
    ids=["all", "no X11", "no agent", "no TCP", "sessions alone", "no session", "nothing"],
)
def test_what_a_stock_sshd_grants_is_found(
    dial: Callable[[list[str]], SshConnection], lines: list[str], wanted: set[Door]
) -> None:
    # It grants a channel to where somebody listens.
    open_there = wanted if connects(*SELF_TEST_CHANNEL) else wanted - {Door.CONNECT}
    assert set(open_doors(dial(lines), 7)) == open_there
