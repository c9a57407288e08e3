"""An operator's way into a VM: a NoCloud disk that lets them in, and a shell over one kept SSH connection."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from image_builder import iso
from image_builder.seed import SeedFile

COMMAND_S = 420.0
"""For one command: a VM without KVM on busy cores is slow."""


def operator_key(directory: Path) -> Path:
    """Makes an operator's SSH key and returns its private half; the public one lies beside it."""
    key = directory / "operator"
    run = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)]
    subprocess.run(run, check=True, timeout=60)
    return key


def nocloud(
    path: Path, key: Path, *, hostname: str, addresses: Sequence[str], commands: Sequence[Sequence[str]] = ()
) -> Path:
    """Writes the disk that an operator attaches to a controller's VM: host name, key, and DHCP on the first card.

    Args:
        path: to be made.
        key: private half of the operator's key.
        hostname: of the VM.
        addresses: `ADDRESS/PREFIX` of `eth1`, for the VMs' own network.
        commands: to be run at first boot, as root.
    """
    user = {
        "hostname": hostname,
        "ssh_authorized_keys": [key.with_suffix(".pub").read_text("ascii").strip()],
        "runcmd": list(commands),
    }
    network = {"version": 2, "ethernets": {"eth0": {"dhcp4": True}, "eth1": {"addresses": list(addresses)}}}
    files = {
        "user-data": f"#cloud-config\n{json.dumps(user)}\n",
        "meta-data": json.dumps({"instance-id": f"by-hand-{hostname}"}) + "\n",
        "network-config": json.dumps(network) + "\n",
    }
    path.write_bytes(
        iso.render([SeedFile(name, text.encode(), 0o644) for name, text in files.items()], at=int(time.time()))
    )
    return path


class Shell:
    """Runs commands in a VM as the operator, who may do everything by `sudo`. Use as a context.

    Args:
        directory: for the kept connection's socket and the VM's host key.
        key: private half of the operator's key.
        port: on this machine's loopback, forwarded to the VM's admin sshd.
    """

    def __init__(self, directory: Path, key: Path, *, port: int) -> None:
        socket = directory / "ssh"
        options = {
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "accept-new",
            "UserKnownHostsFile": directory / "known_hosts",
            "ControlMaster": "auto",
            "ControlPath": socket,
            "ControlPersist": "yes",
            "ConnectTimeout": "60",
            "ServerAliveInterval": "15",
            "LogLevel": "ERROR",
            "BatchMode": "yes",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        self._ssh = ["ssh", "-F", "none", "-i", str(key), "-p", str(port), *words]
        self._to = "operator@127.0.0.1"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        """Ends the kept connection; the next command makes a new one."""
        subprocess.run([*self._ssh, "-O", "exit", self._to], capture_output=True, timeout=60, check=False)

    def wait(self, *, deadline_s: float) -> None:
        """Polls until the VM lets the operator in and cloud-init has done all it does."""
        end = time.monotonic() + deadline_s
        while True:
            try:
                done = self.run("cloud-init status --wait", check=False, timeout_s=deadline_s)
            except subprocess.TimeoutExpired:
                done = None
            if done is not None and done.returncode == 0:
                return
            self.hang_up()
            if time.monotonic() > end:
                pytest.fail(f"no log-in within {deadline_s} s: {done.stderr if done else 'no answer'}")
            time.sleep(0.5)

    def run(
        self, command: str, *, check: bool = True, timeout_s: float = COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Runs a shell's command line as root."""
        line = [*self._ssh, self._to, "sudo -n sh -c " + shlex.quote(command)]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def out(self, command: str) -> str:
        """Returns what a command prints."""
        return self.run(command).stdout.strip()

    def json(self, command: str, *, check: bool = True) -> Any:
        """Returns what a command says with `--json`."""
        done = self.run(f"{command} --json", check=check)
        return json.loads(done.stdout)

    def until(self, command: str, *, shows: str, deadline_s: float = COMMAND_S) -> str:
        """Polls a command until it succeeds and its output has `shows` in it, and returns that."""
        end = time.monotonic() + deadline_s
        while True:
            done = self.run(command, check=False)
            if done.returncode == 0 and shows in done.stdout:
                return done.stdout
            if time.monotonic() > end:
                pytest.fail(f"{command} didn't show {shows!r} within {deadline_s} s:\n{done.stdout}\n{done.stderr}")
            time.sleep(1)
