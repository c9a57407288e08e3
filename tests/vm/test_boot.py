"""What the builder writes boots, by BIOS and by UEFI, from a qcow2 and from an OVA's disk, and asks for a log-in."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest
from images import AGENT, image_builder
from qemu import Disk, Firmware, Vm

pytestmark = [pytest.mark.slow, pytest.mark.frozen]


def boot(directory: Path, disk: Path, *, firmware: Firmware, attached: Disk = "virtio") -> str:
    """Boots until the log-in prompt and cloud-init's last word, switches off properly, and returns the console."""
    with Vm(directory, disk, firmware=firmware, attached=attached) as vm:
        vm.wait_for("edge-1 login:")
        vm.wait_for(r"Reached target .*Cloud-init target|Cloud-init v\. \S+ finished")
        vm.power_button()
        vm.wait_off()
        return vm.console()


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_our_own_system_boots(tmp_path: Path, se_image: Path, firmware: Firmware) -> None:
    console = boot(tmp_path, se_image, firmware=firmware)
    assert "FAILED" not in console, [line for line in console.splitlines() if "FAILED" in line]
    assert "OpenBSD Secure Shell server" in console
    assert "Invalid cloud-config" not in console


def test_the_disk_of_an_ova_boots_on_vmwares_controller(tmp_path: Path, se_image: Path) -> None:
    with tarfile.open(se_image.with_suffix(".ova")) as archive:
        (name,) = (name for name in archive.getnames() if name.endswith(".vmdk"))
        archive.extract(name, tmp_path, filter="data")
    boot(tmp_path, tmp_path / name, firmware="bios", attached="pvscsi")


def test_a_foreign_system_installs_the_agent_itself(tmp_path: Path, bundle: Path) -> None:
    """Our own controller system under other names: the builder sees a stranger, whose cloud-init believes any disk."""
    stranger = tmp_path / "stranger.raw"
    image_builder("base", "--role", "controller", "--agent", AGENT, "--out", stranger)
    subprocess.run(
        ["sgdisk", "--change-name=1:EFI", "--change-name=2:root", str(stranger)], check=True, timeout=60,
        capture_output=True,
    )  # fmt: skip
    image_builder(
        "build", "--name", "edge", "--bundle", bundle, "--seed-name", "edge-2", "--agent-directory", AGENT,
        "--base-image", stranger, "--output-directory", tmp_path,
    )  # fmt: skip
    with Vm(tmp_path, tmp_path / "edge.qcow2", firmware="uefi") as vm:
        vm.wait_for("appliance: the agent is installed")
        vm.wait_for("edge-2 login:")
        vm.power_button()
        vm.wait_off()


NEW_INITRD = """#!/bin/sh
# What `apt upgrade` ends in: another initrd, and the kernel's own hooks.
set -e
script=/etc/initramfs-tools/scripts/init-premount/marker
printf '#!/bin/sh\\n[ "$1" = prereqs ] || echo "marker: the new initrd" >/dev/console\\n' >$script
chmod 755 $script
update-initramfs -u
release=$(uname -r)
run-parts --exit-on-error --arg="$release" --arg="/boot/vmlinuz-$release" /etc/kernel/postinst.d
echo "marker: installed" >/dev/ttyS0
"""


@pytest.mark.parametrize("firmware", ["bios", "uefi"])
def test_what_is_installed_in_a_vm_reaches_the_boot_partition(tmp_path: Path, bundle: Path, firmware: Firmware) -> None:
    hook = tmp_path / "install.sh"
    hook.write_text(NEW_INITRD)
    image_builder(
        "build", "--name", "se", "--bundle", bundle, "--seed-name", "edge-1", "--agent-directory", AGENT,
        "--output-directory", tmp_path, "--hook", hook,
    )  # fmt: skip
    with Vm(tmp_path, tmp_path / "se.qcow2", firmware=firmware) as vm:
        vm.wait_for("marker: installed", deadline_s=900)
        assert "marker: the new initrd" not in vm.console()
        vm.reset()  # a power cut: what was written is there
        vm.wait_for("marker: the new initrd")
        vm.wait_for("edge-1 login:", count=2)
