"""The programs a lab runs: this one, in its other roles, and image-builder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from appliance.lab.layout import LOOPBACK, ControllerPart, LabError
from appliance.paths import Paths
from appliance.runtime import child

_TIMEOUT_S = 60.0


class _Initialised(msgspec.Struct):
    """What the lab wants to know of `controller init --json`."""

    bundle: str


def appliance(paths: Paths, *words: str) -> str:
    """Runs one command on the instance at `paths`. Returns its stdout. Raises `ChildError`."""
    return child.run([*child.self_command(), "--root", str(paths.root), *words], timeout_s=_TIMEOUT_S).stdout


def daemon(paths: Paths, log: Path) -> child.Daemon:
    """Starts the daemon of the instance at `paths`, in the mode it was set to."""
    return child.Daemon([*child.self_command(), "--root", str(paths.root), "run"], log_path=log)


def set_mode(paths: Paths, role: str) -> None:
    """Sets the mode of the instance at `paths`: `controller` or `se`."""
    appliance(paths, "mode", "set", role)


def initialise(paths: Paths, part: ControllerPart) -> str:
    """Makes the cluster. Returns the path of its first bundle."""
    told = appliance(
        paths,
        *("controller", "init", "--address", LOOPBACK),
        *("--enroll-port", str(part.enroll_port), "--ssh-port", str(part.ssh_port)),
        *("--date", "now", "--json"),  # a lab's SEs have this very clock, right or wrong
    )
    return msgspec.json.decode(told.encode(), type=_Initialised).bundle


def bake(bundle: Path, seed: Path, name: str) -> None:
    """Bakes one SE's seed directory."""
    child.run(
        [*_image_builder(), "seed", "--bundle", str(bundle), "--out", str(seed), "--name", name, "--label", "lab=yes"],
        timeout_s=_TIMEOUT_S,
    )


def _image_builder() -> Sequence[str]:
    """Returns how to start image-builder: by this interpreter, or the frozen program beside ours."""
    if not getattr(sys, "frozen", False):
        return [sys.executable, "-m", "image_builder"]
    own = Path(sys.executable)
    for candidate in (own.with_name("image-builder"), own.parent.parent / "image-builder/image-builder"):
        if candidate.is_file():
            return [str(candidate)]
    found = shutil.which("image-builder")
    if found is None:
        raise LabError("image-builder isn't on this machine", hint=f"put it beside {own}, or on the PATH")
    return [found]
