"""A controller on this machine's loopback for SEs in virtual machines, and a way into them over their own links."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from images import AGENT, image_builder
from rig import RunningController, running, until

HERE = Path(__file__).parent
SEEN_AS = "10.0.2.100"
"""Where a VM sees the controller: an address of its own network that QEMU leads to the relay."""
UP_S = 1200.0
"""From the power button to UP, on busy cores without KVM."""


@contextlib.contextmanager
def controller_for_vms(root: Path, **more: Any) -> Iterator[RunningController]:
    """A running controller whose trust document names it as VMs see it."""
    with running(root, told=SEEN_AS, **more) as controller:
        yield controller


def network(*controllers: RunningController) -> str:
    """Value of `-netdev` after `id` for a VM that reaches these controllers and nothing else."""
    words = ["user", "restrict=on", "ipv6=off"]
    for controller in controllers:
        for port in (controller.enroll_port, controller.ssh_port):
            command = f"{sys.executable} -I {HERE / 'relay.py'} {port}"
            words.append(f"guestfwd=tcp:{SEEN_AS}:{port}-cmd:{command}".replace(",", ",,"))
    return ",".join(words)


def bake(
    directory: Path, controller: RunningController, *more: str | Path, name: str = "se", bundle: Path | None = None
) -> Path:
    """Bakes an SE image of our own system, with the controller's first bundle or another, and returns the qcow2."""
    bundle = bundle or next((controller.paths.controller_state / "bundles").glob("*.json"))
    image_builder(
        "build", "--name", name, "--bundle", bundle, "--agent-directory", AGENT, "--output-directory", directory, *more
    )
    return directory / f"{name}.qcow2"


def wait_up(controller: RunningController, se: str, *, deadline_s: float = UP_S) -> None:
    """Waits until an SE is UP, or UP with a reason that a slow VM may have."""

    def is_up() -> bool:
        return any(one.name == se and one.state.value in {"UP", "DEGRADED"} for one in controller.operator.ses())

    until(is_up, what=f"{se} is UP", deadline_s=deadline_s)


def in_vm(
    controller: RunningController, directory: Path, se: str, command: str, *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs a shell's command line on an SE as its daemon's user, by a stock ssh over the reverse path."""
    detail = controller.operator.se(se)
    address, port = detail.summary.address, controller.bound["reverse_port"]
    known = directory / "known_hosts"
    known.write_text("".join(f"[{address}]:{port} {key}\n" for key in detail.host_keys))
    line = [
        "ssh", "-F", "none", "-i", str(controller.paths.controller_state / "id_se"), "-p", str(port),
        "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes",
        "-o", f"UserKnownHostsFile={known}", "-o", "GlobalKnownHostsFile=/dev/null", "-o", "ConnectTimeout=120",
        f"aviseuser@{address}", "sh -c " + shlex.quote(command),
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
