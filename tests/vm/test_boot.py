"""What the builder writes boots, by BIOS and by UEFI, from a qcow2 and from an OVA's disk, and asks for a log-in."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from qemu import Disk, Firmware, Vm

pytestmark = [pytest.mark.slow, pytest.mark.frozen]


def boot(directory: Path, disk: Path, *, firmware: Firmware, attached: Disk = "virtio") -> str:
    """Boots until the log-in prompt and cloud-init's last word, switches off properly, and returns the console."""
    with Vm(directory, disk, firmware=firmware, attached=attached) as vm:
        vm.wait_for(r"appliance-se login:|edge-1 login:")
        vm.wait_for(r"Reached target .*Cloud-init target|Cloud-init v\. \S+ finished")
        vm.power_button()
        vm.wait_off()
        return vm.console()


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_our_own_system_boots(tmp_path: Path, se_image: Path, firmware: Firmware) -> None:
    console = boot(tmp_path, se_image, firmware=firmware)
    assert "FAILED" not in console, [line for line in console.splitlines() if "FAILED" in line]
    assert "/dev/root" not in console.partition("login:")[0].partition("Kernel panic")[2]
    assert "Started ssh.service" in console or "OpenBSD Secure Shell server" in console


def test_the_disk_of_an_ova_boots_on_vmwares_controller(tmp_path: Path, se_image: Path) -> None:
    with tarfile.open(se_image.with_suffix(".ova")) as archive:
        (name,) = (name for name in archive.getnames() if name.endswith(".vmdk"))
        archive.extract(name, tmp_path, filter="data")
    boot(tmp_path, tmp_path / name, firmware="bios", attached="pvscsi")
