"""The script that brings a later kernel onto the boot partition, run by a real shell on folders in place of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from image_builder import kernel_update

ENTRY = "title Appliance se\nversion {0}\nlinux /vmlinuz-{0}\ninitrd /initrd.img-{0}\noptions root=PARTUUID=1 ro\n"
MENU = (
    "DEFAULT appliance\nLABEL appliance\n  LINUX /vmlinuz-{0}\n  INITRD /initrd.img-{0}\n  APPEND root=PARTUUID=1 ro\n"
)


class Machine:
    """A /boot and a boot partition that starts kernel 6.1.0-9."""

    def __init__(self, directory: Path) -> None:
        self.boot, self.esp = directory / "boot", directory / "esp"
        self.script = directory / "script"
        self.script.write_text(kernel_update.script(esp_name="APPLIANCE-ESP"))
        self.script.chmod(0o755)
        (self.esp / "loader/entries").mkdir(parents=True)
        self.boot.mkdir()
        self.install("6.1.0-9")
        for name in ("vmlinuz-6.1.0-9", "initrd.img-6.1.0-9"):
            (self.esp / name).write_bytes((self.boot / name).read_bytes())
        for name, text in zip(kernel_update.LOADER_FILES, (ENTRY, MENU), strict=True):
            (self.esp / name).write_text(text.format("6.1.0-9"))
        (self.esp / "ldlinux.sys").write_text("not ours to touch")

    def install(self, release: str, *, initrd: str = "initrd of") -> None:
        (self.boot / f"vmlinuz-{release}").write_text(f"kernel {release}")
        (self.boot / f"initrd.img-{release}").write_text(f"{initrd} {release}")

    def run(self, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
        env = {"PATH": path or os.environ["PATH"], "APPLIANCE_BOOT": str(self.boot), "APPLIANCE_ESP": str(self.esp)}
        return subprocess.run(
            [str(self.script), *arguments], capture_output=True, text=True, timeout=60, env=env, check=False
        )

    def starts(self, release: str) -> None:
        """Both loaders start it, with the options they had, and what they start is whole."""
        for name, text in zip(kernel_update.LOADER_FILES, (ENTRY, MENU), strict=True):
            assert (self.esp / name).read_text() == text.format(release)
        for name in (f"vmlinuz-{release}", f"initrd.img-{release}"):
            assert (self.esp / name).read_bytes() == (self.boot / name).read_bytes()

    def kernels(self) -> set[str]:
        return {path.name for path in self.esp.glob("*-*")}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_newer_kernel_is_started_and_the_one_before_stays(machine: Machine) -> None:
    machine.install("6.1.0-10")
    assert machine.run("6.1.0-10", "/boot/vmlinuz-6.1.0-10").returncode == 0
    machine.starts("6.1.0-10")
    assert machine.kernels() == {f"{kind}-6.1.0-{number}" for kind in ("vmlinuz", "initrd.img") for number in (9, 10)}
    assert (machine.esp / "ldlinux.sys").read_text() == "not ours to touch"


def test_a_removed_kernel_goes_and_the_one_before_is_started_again(machine: Machine) -> None:
    machine.install("6.1.0-10")
    assert machine.run().returncode == 0
    for name in ("vmlinuz-6.1.0-10", "initrd.img-6.1.0-10"):
        (machine.boot / name).unlink()
    assert machine.run().returncode == 0
    machine.starts("6.1.0-9")
    assert machine.kernels() == {"vmlinuz-6.1.0-9", "initrd.img-6.1.0-9"}


def test_a_new_initrd_of_the_same_kernel_is_taken_over(machine: Machine) -> None:
    machine.install("6.1.0-9", initrd="another initrd of")
    assert machine.run().returncode == 0
    machine.starts("6.1.0-9")
    before = {path: path.stat().st_mtime_ns for path in machine.esp.rglob("*")}
    assert machine.run().returncode == 0
    assert {path: path.stat().st_mtime_ns for path in machine.esp.rglob("*")} == before, (
        "it writes what is there already"
    )


def test_a_kernel_without_its_initrd_is_not_started(machine: Machine) -> None:
    (machine.boot / "vmlinuz-6.1.0-10").write_text("kernel")
    assert machine.run().returncode == 0
    machine.starts("6.1.0-9")


def test_a_full_boot_partition_keeps_what_it_starts(machine: Machine, tmp_path: Path) -> None:
    machine.install("6.1.0-10")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cp").write_text("#!/bin/sh\necho half >\"$2\"\necho 'cp: no space left on device' >&2\nexit 1\n")
    (tools / "cp").chmod(0o755)
    done = machine.run(path=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "still starts with the kernel before" in done.stderr
    machine.starts("6.1.0-9")
    assert machine.kernels() == {"vmlinuz-6.1.0-9", "initrd.img-6.1.0-9"}


def test_rests_of_a_cut_go_and_nothing_is_done_without_kernels(machine: Machine) -> None:
    (machine.esp / "vmlinuz-6.1.0-10.new").write_text("half")
    assert machine.run().returncode == 0
    assert machine.kernels() == {"vmlinuz-6.1.0-9", "initrd.img-6.1.0-9"}
    for path in machine.boot.iterdir():
        path.unlink()
    done = machine.run()
    assert (done.returncode, "nothing was changed" in done.stderr) == (0, True)
    assert machine.kernels() == {"vmlinuz-6.1.0-9", "initrd.img-6.1.0-9"}
