"""Images of systems that aren't ours: the builder looks at no root file system, so any will do. No vendor's image can
be had offline; these are made of Debian's packages, unlike ours in release, table, loader and file system.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import stranger
from cluster_bundle import Cluster
from fleet import controller_for_vms, in_vm, network, wait_up
from images import AGENT, image_builder
from qemu import Vm, need_qemu

pytestmark = [pytest.mark.slow, pytest.mark.frozen]


def need(*programs: str) -> None:
    need_qemu()
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here")


def test_another_debian_on_btrfs_comes_up_by_bios(tmp_path: Path) -> None:
    need("mmdebstrap", "mkfs.btrfs", "syslinux", "sfdisk", "mformat")
    foreign = stranger.debian_13_on_btrfs(tmp_path)
    with controller_for_vms(tmp_path / "controller") as controller:
        bundle = next((controller.paths.controller_state / "bundles").glob("*.json"))
        image_builder(
            "build", "--name", "edge", "--bundle", bundle, "--seed-name", "edge-9", "--agent-directory", AGENT,
            "--base-image", foreign, "--output-directory", tmp_path,
        )  # fmt: skip
        foreign.unlink()
        # Kernel 6.12 patches its own code as it boots; a second processor of QEMU 7.2 may meet an int3 there and panic.
        with Vm(tmp_path, tmp_path / "edge.qcow2", firmware="bios", processors=1, network=network(controller)) as vm:
            wait_up(controller, "edge-9")
            assert "appliance: the agent is installed" in vm.console()
            told = in_vm(controller, tmp_path, "edge-9", "stat -f -c %T /; cat /etc/debian_version; hostname").stdout
            kind, version, name = told.split()
            assert (kind, version.partition(".")[0], name) == ("btrfs", "13", "edge-9")
            vm.power_button()
            vm.wait_off(deadline_s=600)


def test_a_system_of_an_older_c_library_is_refused_by_name(tmp_path: Path) -> None:
    need("mmdebstrap", "mke2fs", "sfdisk")
    old = stranger.debian_11(tmp_path)
    bundle = tmp_path / "bundle.json"
    bundle.write_bytes(Cluster().bundle())
    done = image_builder(
        "build", "--name", "edge", "--bundle", bundle, "--agent-directory", AGENT, "--base-image", old,
        "--output-directory", tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(r"has glibc 2\.31, the agent needs 2\.3\d: take a newer system", done.stderr), done.stderr
    assert not list(tmp_path.glob("edge*"))
