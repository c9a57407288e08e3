"""Puts first boot together for the machine it runs on: its disks, its hypervisor, its users, its consoles.

Run at each boot, before cloud-init and the daemons. A first boot takes and scrubs the seed; at each later one it looks
for what was cut, and for new wishes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from appliance.errors import ApplianceError, ChildError
from appliance.machine import console, media, role, wishes
from appliance.machine.disk import Disk, root_disk
from appliance.machine.first_boot import FirstBoot, Step
from appliance.machine.wishes import Wishes
from appliance.paths import Paths
from appliance.protocol import ovf
from appliance.runtime import child, log, mode
from appliance.runtime.clock import SystemClock
from appliance.settings import Settings

_RPCTOOL = "vmware-rpctool"
_SETTLE_TIMEOUT_S = 30
_SAID = {
    Step.TAKE: "the seed was taken from {source}",
    Step.WIPE: "the seed partition was wiped",
    Step.REMOVE: "the seed partition was removed",
    Step.GROW: "the root file system fills the disk",
    Step.NAME: "the host name is {name}",
    Step.HOST_KEY: "sshd has a host key of its own",
}
_log = log.bind("seed")


def run(paths: Paths, settings: Settings) -> None:
    """Does what this boot has to do.

    Raises:
        ApplianceError: the first step that failed; all of them are logged and said on the console.
    """
    disk = root_disk()
    of_image = role.of_image(paths)
    boot = FirstBoot(
        paths,
        disk=disk,
        gather=lambda cluster_id: gather(disk, cluster_id=cluster_id),
        owner=role.user_of(settings),
        boot_id=_boot_id(),
        now=int(time.time()),
        needs_seed=of_image is not mode.Mode.CONTROLLER,
        own_mark=own_mark,
    )
    for step in boot.run():
        host_name = Path("/proc/sys/kernel/hostname").read_text("ascii").strip()
        _say(_SAID[step].format(source=boot.record.source or "nowhere, none is needed", name=host_name))
    for note in boot.notes:
        _log.warning("%s", note)
        _say(note)
    for step, error in boot.failed.items():
        _say(f"{step.value} failed, it is tried again at the next boot: {error.message} ({error.code})")
    if role.is_due(
        role=of_image,
        is_told=mode.document_of(paths).load() is not None,
        has_hooks=boot.record.has_hooks,
        is_later_boot=boot.record.boot_id not in {"", _boot_id()},
    ):
        role.start(paths, settings, SystemClock())
    for error in boot.failed.values():
        raise error


def gather(disk: Disk | None, *, cluster_id: str) -> Wishes:
    """Returns what attached disks and the hypervisor wish."""
    with contextlib.suppress(ApplianceError):  # a drive that never answers must not stop the boot
        child.run(["udevadm", "settle", f"--timeout={_SETTLE_TIMEOUT_S}"], timeout_s=_SETTLE_TIMEOUT_S + 5.0)
    notes: list[str] = []
    own = disk.path.name if disk is not None else ""
    found = media.attached(wishes.NAMES, max_bytes=wishes.MAX_BYTES, but=own, notes=notes)
    told = wishes.gather(found, list(_environments()), cluster_id=cluster_id)
    told.notes.extend(notes)
    return told


def _environments() -> Iterator[tuple[str, bytes]]:
    """VMware's other way for an OVF environment, where its tools are."""
    if child.find_program(_RPCTOOL) is None:
        return
    try:
        document = child.run([_RPCTOOL, "info-get guestinfo.ovfEnv"], timeout_s=10.0).stdout.encode()
    except ChildError as error:
        _log.info("VMware tells no OVF environment: %s", error.message)
        return
    if document.strip() and len(document) <= ovf.MAX_DOCUMENT_BYTES + 1:
        yield "guestinfo.ovfEnv", document


def own_mark(root: Path = Path("/")) -> str:
    """Returns six hex digits: the end of the first card's MAC address, which hypervisors show; else of the machine id.

    "" where there is neither.
    """
    for path, digits in ((root / "sys/class/net/eth0/address", slice(-6, None)), (root / "etc/machine-id", slice(6))):
        try:
            found = path.read_text("ascii").strip().replace(":", "")[digits]
        except (OSError, ValueError):
            continue
        if len(found) == 6 and found.isalnum():
            return found.lower()
    return ""


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def _say(text: str) -> None:
    _log.info("%s", text)
    console.say(f"first boot: {text}")
