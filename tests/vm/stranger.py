"""Foreign systems for tests: as unlike our own as packages allow, made without loop device or mount.

    MBR    1  FAT     syslinux, kernel, initrd: starts by BIOS
           2  Btrfs   the root, without a partition name that could tell anything

Its cloud-init is as Debian ships it: it believes any disk labelled cidata.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from image_builder import debian, fat

MIB = 1 << 20
BOOT_MIB, ROOT_MIB = 160, 1400
PACKAGES = (
    "btrfs-progs", "chrony", "cloud-init", "dbus", "iproute2", "linux-image-cloud-amd64", "netbase", "openssh-server",
    "sudo", "systemd-resolved", "systemd-sysv", "udev", "zstd",
)  # fmt: skip
MBR = Path("/usr/lib/syslinux/mbr/mbr.bin")
_EPOCH = 1_700_000_000
_CUSTOMISE = """set -eu
chroot "$1" systemctl --quiet enable systemd-networkd.service systemd-resolved.service
ln -sf ../run/systemd/resolve/stub-resolv.conf "$1/etc/resolv.conf"
echo stranger >"$1/etc/hostname"
echo 'LABEL=stranger / btrfs defaults 0 0' >"$1/etc/fstab"
: >"$1/etc/machine-id"
rm -rf "$1"/etc/ssh/ssh_host_* "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin
"""


def _run(*line: str | Path, timeout_s: float = 1800, cwd: Path | None = None) -> None:
    words = [str(word) for word in line]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, cwd=cwd, check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, f"{words[:4]}: {done.stdout[-2000:]}{done.stderr[-4000:]}"


def install(directory: Path, release: str, packages: tuple[str, ...], customise: str) -> Path:
    """Installs a release of Debian from this machine's mirror; returns the tree."""
    if os.geteuid() != 0:
        pytest.skip("only root can lay out another system's files")
    sources = directory / "stranger.sources"
    texts = [text.replace(debian.RELEASE, release) for text in debian.sources().values()]
    kinds = list(debian.sources())
    if kinds != ["sources"]:
        sources = sources.with_suffix(".list")
    sources.write_text("\n\n".join(texts))
    tar, tree = directory / "stranger.tar", directory / "tree"
    _run(
        "mmdebstrap", "--variant=minbase", "--format=tar", *([f"--include={','.join(packages)}"] if packages else []),
        '--aptopt=APT::Install-Recommends "false"', f"--customize-hook={customise}", release, tar, sources,
    )  # fmt: skip
    tree.mkdir()
    _run("tar", "-x", "--numeric-owner", "--exclude=./dev/*", "-C", tree, "-f", tar)
    tar.unlink()
    return tree


def debian_13_on_btrfs(directory: Path) -> Path:
    """Makes the disk described above, raw, with the release after ours; returns it."""
    tree = install(directory, "trixie", PACKAGES, _CUSTOMISE)
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    (initrd,) = (tree / "boot").glob("initrd.img-*")
    menu = directory / "syslinux.cfg"
    menu.write_text(
        "SERIAL 0 115200\nDEFAULT it\nLABEL it\n  LINUX /vmlinuz\n  INITRD /initrd\n"
        "  APPEND root=LABEL=stranger ro console=tty0 console=ttyS0,115200\n"
    )
    boot, root, disk = directory / "boot.fat", directory / "root.btrfs", directory / "stranger.raw"
    fat.make(
        boot, {"vmlinuz": kernel, "initrd": initrd, "syslinux.cfg": menu}, label="BOOT", size_bytes=BOOT_MIB * MIB,
        serial=1, epoch=_EPOCH, first_sector=2048,
    )  # fmt: skip
    _run("syslinux", "--install", boot.name, cwd=directory)
    with root.open("wb") as stream:
        stream.truncate(ROOT_MIB * MIB)
    _run("mkfs.btrfs", "--quiet", "--label", "stranger", "--rootdir", tree, root)
    with disk.open("wb") as stream:
        stream.truncate((BOOT_MIB + ROOT_MIB + 2) * MIB)
    table = f"label: dos\nstart=2048, size={BOOT_MIB * 2048}, type=c, bootable\n"
    table += f"start={2048 * (BOOT_MIB + 1)}, size={ROOT_MIB * 2048}, type=83\n"
    subprocess.run(["sfdisk", "--quiet", str(disk)], input=table, text=True, timeout=60, check=True)
    with disk.open("r+b") as stream:
        stream.write(MBR.read_bytes()[:440])
    for part, at in ((boot, 1), (root, BOOT_MIB + 1)):
        _run("dd", f"if={part}", f"of={disk}", "bs=1M", f"seek={at}", "conv=notrunc,sparse", "status=none")
        part.unlink()
    return disk


def debian_11(directory: Path) -> Path:
    """Makes a disk with the C library of Debian 11, which is too old for the agent; it needn't start."""
    tree = install(directory, "bullseye", (), "true")
    root, disk = directory / "old.ext4", directory / "old.raw"
    with root.open("wb") as stream:
        stream.truncate(600 * MIB)
    _run("mke2fs", "-q", "-t", "ext4", "-d", tree, root)
    with disk.open("wb") as stream:
        stream.truncate(602 * MIB)
    subprocess.run(
        ["sfdisk", "--quiet", str(disk)], input=f"label: gpt\nstart=2048, size={600 * 2048}\n", text=True, timeout=60,
        check=True,
    )  # fmt: skip
    _run("dd", f"if={root}", f"of={disk}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none")
    return disk
