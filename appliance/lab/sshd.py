"""One real OpenSSH server per SE: what the reverse path ends at, and what upgrades log in to.

It runs as whoever runs the lab, knows one host key and one file of authorized keys (which the SE writes from the trust
document), and asks for nothing but public keys. OpenSSH lets an unprivileged server log in its own user only.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from appliance.errors import ChildError
from appliance.lab.layout import LOOPBACK, LabError, Layout, SePart
from appliance.runtime import child
from appliance.storage.atomic import make_dir, write_atomic

_VERSION = re.compile(r"OpenSSH_(\d+)\.(\d+)")
_PENALTIES_SINCE = (9, 8)
_PRIVILEGE_SEPARATION = Path("/run/sshd")
_SHADOW = Path("/etc/shadow")


def find() -> str:
    """Returns the absolute path of sshd; it refuses to run under another. Raises `ChildError` where there is none."""
    found = child.find_program("sshd")
    if found is None:
        raise ChildError("the program 'sshd' isn't on this machine", hint="apt-get install openssh-server")
    return str(Path(found).absolute())


def version(sshd: str) -> tuple[int, int]:
    """Returns OpenSSH's version, (9, 2) for example."""
    # before 9.4 -V is an unknown option, and the answer to that names the version
    told = child.run([sshd, "-V"], timeout_s=10, check=False)
    match = _VERSION.search(told.stderr + told.stdout)
    if match is None:
        raise LabError(f"{sshd} doesn't say its OpenSSH version", hint="apt-get install openssh-server")
    return int(match[1]), int(match[2])


def _is_locked(user: str, shadow: Path) -> bool:
    """Whether `user`'s password is locked: sshd without PAM then refuses keys too (auth.c, platform_locked_account)."""
    try:
        lines = shadow.read_text("utf-8").splitlines()
    except OSError:
        return False  # not root: sshd can't read it either
    return any(line.split(":")[:1] == [user] and line.split(":")[1].startswith("!") for line in lines)


def configuration(
    layout: Layout, part: SePart, *, user: str, openssh: tuple[int, int], is_root: bool, shadow: Path = _SHADOW
) -> str:
    """Returns the text of one SE's sshd_config (sshd_config(5))."""
    keys = layout.se(part.name).se_state / "authorized_keys"
    lines = [
        f"# SSH server of the lab's {part.name}, written by `appliance lab up`",
        f"ListenAddress {LOOPBACK}:{part.sshd_port}",
        f"HostKey {layout.host_key(part.name)}",
        f"AuthorizedKeysFile {keys}",
        "PidFile none",
        "LogLevel VERBOSE",
        "AuthenticationMethods publickey",
        "PubkeyAuthentication yes",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        f"PermitRootLogin {'prohibit-password' if is_root else 'no'}",
        f"AllowUsers {user}",
        # The whole way to the file would have to be writable by its owner only, and a lab may lie under /tmp. The
        # file itself is 0600 in a directory that is 0700.
        "StrictModes no",
        f"UsePAM {'yes' if is_root and _is_locked(user, shadow) else 'no'}",
        "AllowAgentForwarding no",
        "AllowTcpForwarding no",
        "AllowStreamLocalForwarding no",
        "X11Forwarding no",
        "PermitTunnel no",
        "PermitUserEnvironment no",
        "PrintMotd no",
        "UseDNS no",
        f"SetEnv APPLIANCE_SE={part.name}",
        "Subsystem sftp internal-sftp",
    ]
    if openssh >= _PENALTIES_SINCE:
        # every connection of the reverse path comes from 127.0.0.1: one bad client would lock the controller out
        lines.append(f"PerSourcePenaltyExemptList {LOOPBACK}")
    return "\n".join(lines) + "\n"


def prepare(layout: Layout, part: SePart, *, user: str) -> None:
    """Makes host key (once) and configuration of one SE's server, and has sshd check them."""
    sshd = find()
    key = layout.host_key(part.name)
    if not key.exists():
        make_dir(key.parent, mode=0o755)
        child.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)], timeout_s=30)
    directory = layout.sshd(part.name)
    make_dir(directory)
    is_root = os.geteuid() == 0
    if is_root:
        # its own unit makes it (RuntimeDirectory=sshd); without it sshd refuses to start as root
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    text = configuration(layout, part, user=user, openssh=version(sshd), is_root=is_root)
    file = directory / "sshd_config"
    write_atomic(file, text.encode())
    child.run([sshd, "-t", "-f", str(file)], timeout_s=10)


def start(layout: Layout, part: SePart) -> child.Daemon:
    """Starts one SE's server; `is_answering` tells when it is there."""
    directory = layout.sshd(part.name)
    return child.Daemon([find(), "-D", "-e", "-f", str(directory / "sshd_config")], log_path=directory / "sshd.log")


def is_answering(port: int) -> bool:
    """Whether an SSH server shows its banner (RFC 4253 section 4.2) on `port` of this machine."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=2.0) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
