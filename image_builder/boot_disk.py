"""Puts our own minimal system onto a disk that starts by BIOS and by UEFI, without loop device, mount or root.

    LBA 0             code of a boot loader for BIOS (syslinux' gptmbr), which starts the partition marked for it
    1  APPLIANCE-ESP  FAT32: kernel and initrd (`kernel_update` brings later ones), systemd-boot for UEFI, syslinux for
                      BIOS, appliance-image.json
    2  APPLIANCE-ROOT ext4, the last one, so that it can grow

Every byte follows from the tree, the overlay and the epoch: UUIDs are derived, and e2fsprogs before 1.47.1, which dates
inodes by the clock, is corrected by debugfs.
"""

from __future__ import annotations

import math
import os
import tarfile
import uuid
from pathlib import Path

import msgspec

from appliance.errors import ImageError
from appliance.runtime import child
from image_builder import debian, fat, partition
from image_builder.fat import MIB
from image_builder.overlay import DESCRIPTION_FILE, ESP_NAME, Role
from image_builder.steps import Steps

ROOT_NAME = "APPLIANCE-ROOT"
ESP_BYTES = 128 * MIB
DEFAULT_BYTES = 2048 * MIB
CONSOLE = "console=tty0 console=ttyS0,115200"

_SYSLINUX = Path("/usr/lib/syslinux")
_GPT_MBR = _SYSLINUX / "mbr/gptmbr.bin"
_TIMEOUT_S = 900.0
_NAMESPACE = uuid.UUID("5eeda991-1a0c-4e55-9c1b-0a5eed0a9911")


class Guids(msgspec.Struct, frozen=True, kw_only=True):
    """Names of a disk's parts, derived from what is on it."""

    disk: str
    esp: str
    root: str
    filesystem: str

    @classmethod
    def derive(cls, digest: str) -> Guids:
        """Returns those of the system with this digest."""
        made = {name: str(uuid.uuid5(_NAMESPACE, f"{digest} {name}")) for name in cls.__struct_fields__}
        return cls(**made)


def missing_tools() -> list[str]:
    """Returns what this machine lacks to build a system, one sentence each with the Debian package."""
    programs = [
        "mmdebstrap",
        "mke2fs",
        "debugfs",
        "mcopy",
        "mformat",
        "sgdisk",
        "sfdisk",
        "syslinux",
        "qemu-img",
        "tar",
    ]
    if os.geteuid() != 0:
        programs += ["unshare", "newuidmap"]
    problems = tools_missing(programs)
    if not _GPT_MBR.is_file():
        problems.append(f"{_GPT_MBR} isn't on this machine: apt-get install syslinux-common")
    return problems


def tools_missing(programs: list[str]) -> list[str]:
    """Returns which programs this machine lacks, one sentence each with the Debian package."""
    return [
        f"the program {name!r} isn't on this machine: apt-get install {child.package_of(name)}"
        for name in programs
        if child.find_program(name) is None
    ]


def assemble(
    raw: Path,
    *,
    tree: Path,
    overlay: Path,
    description: bytes,
    role: Role,
    guids: Guids,
    size_bytes: int,
    epoch: int,
    steps: Steps,
) -> None:
    """Makes the disk as a raw, sparse file.

    Args:
        raw: to be made; the work lies beside it, in folders that the caller removes.
        tree: tar of packages.
        overlay: tar that is laid over it.
        description: what `appliance-image.json` says.
        role: named in the boot menu.
        guids: of disk, partitions and file system.
        size_bytes: of the disk, whole MiB.
        epoch: date of everything, seconds since 1970.
        steps: is told what goes on.

    Raises:
        ChildError: a tool failed, mostly since the disk is too small or the machine's is full.
        ImageError: the tree lacks what a boot loader needs.
    """
    root_start = ESP_BYTES // partition.SECTOR + partition.ALIGNMENT
    root_sectors = size_bytes // partition.SECTOR - partition.ALIGNMENT - root_start
    work = raw.parent
    with steps.step("make the root file system"):
        root = _root_filesystem(work, tree, overlay, guids=guids, size_bytes=root_sectors * 512, epoch=epoch)
    with steps.step("make the boot partition"):
        esp = _boot_partition(work, tree, description, role=role, guids=guids, epoch=epoch)
    with steps.step("put the disk together"):
        with raw.open("wb") as disk:
            disk.truncate(size_bytes)
        child.run(
            [
                "sgdisk",
                f"--disk-guid={guids.disk}",
                f"--new=1:{partition.ALIGNMENT}:{root_start - 1}",
                f"--typecode=1:{partition.ESP}",
                f"--change-name=1:{ESP_NAME}",
                f"--partition-guid=1:{guids.esp}",
                "--attributes=1:set:2",  # legacy BIOS bootable
                f"--new=2:{root_start}:{root_start + root_sectors - 1}",
                f"--typecode=2:{partition.LINUX_ROOT}",
                f"--change-name=2:{ROOT_NAME}",
                f"--partition-guid=2:{guids.root}",
                str(raw),
            ],
            timeout_s=60.0,
        )
        with raw.open("r+b") as disk:
            disk.write(_GPT_MBR.read_bytes()[:440])
        copy_sparse(esp, raw, offset=partition.ALIGNMENT * partition.SECTOR)
        copy_sparse(root, raw, offset=root_start * partition.SECTOR)


def copy_sparse(source: Path, target: Path, *, offset: int) -> None:
    """Copies what isn't a hole in `source` into `target` at `offset` bytes."""
    with source.open("rb") as reading, target.open("r+b") as writing:
        end = os.fstat(reading.fileno()).st_size
        at = 0
        while at < end:
            try:
                at = os.lseek(reading.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole follows
                return
            until = os.lseek(reading.fileno(), at, os.SEEK_HOLE)
            while at < until:
                content = os.pread(reading.fileno(), min(until - at, 4 * MIB), at)
                os.pwrite(writing.fileno(), content, offset + at)
                at += len(content)


def _root_filesystem(work: Path, tree: Path, overlay: Path, *, guids: Guids, size_bytes: int, epoch: int) -> Path:
    image, files = work / "root.ext4", work / "tree"
    files.mkdir(mode=0o755)
    # Without root a user name space makes us its root, so that files get their owners and mke2fs sees them.
    prefix = [] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--map-auto", "--user", "--mount"]
    # A user name space may make no device nodes; the kernel fills /dev at boot. Whose apt's folders for downloads are
    # depends on who ran mmdebstrap; apt makes them when it needs them.
    script = (
        'tar -x --numeric-owner --exclude="./dev/*" --exclude="./var/*/apt/*/partial" -C "$1" -f "$2" &&'
        ' tar -x --numeric-owner -C "$1" -f "$3" &&'
        ' chmod 0755 "$1" && find "$1" -newermt "@$5" -exec touch -h -d "@$5" {} + &&'
        ' mke2fs -q -F -t ext4 -L appliance-root -U "$6" -E "hash_seed=$6,lazy_itable_init=1" -d "$1" "$4"'
    )
    with image.open("wb") as stream:
        stream.truncate(size_bytes)
    try:
        child.run(
            [*prefix, "sh", "-c", script, "sh", *map(str, (files, tree, overlay, image, epoch, guids.filesystem))],
            timeout_s=_TIMEOUT_S,
            env={"E2FSPROGS_FAKE_TIME": str(epoch), "TZ": "UTC"},
        )
    finally:
        child.run([*prefix, "rm", "-rf", "--one-file-system", str(files)], timeout_s=_TIMEOUT_S)
    told = child.run(["dumpe2fs", "-h", str(image)], timeout_s=60.0).stdout
    counts = {key: value.strip() for key, _, value in (line.partition(":") for line in told.splitlines())}
    used = int(counts["Inode count"]) - int(counts["Free inodes"])
    # 11 is the first that isn't the file system's own; mke2fs takes them in order
    corrections = "".join(
        f"set_inode_field <{number}> {field} @{epoch}\n"
        for number in range(11, used + 1)
        for field in ("atime", "ctime")
    )
    child.run(
        ["debugfs", "-w", "-f", "-", str(image)],
        input=corrections,
        timeout_s=_TIMEOUT_S,
        env={"E2FSPROGS_FAKE_TIME": str(epoch), "TZ": "UTC"},
    )
    return image


def _boot_partition(work: Path, tree: Path, description: bytes, *, role: Role, guids: Guids, epoch: int) -> Path:
    # gpt: where a power cut tore the first copy of the partition table, the kernel takes the second
    # loglevel: warnings and worse, so that the state line isn't lost among the rest, which the journal has
    options = f"root=PARTUUID={guids.root} ro gpt net.ifnames=0 loglevel=5 {CONSOLE}"
    with tarfile.open(tree) as packages:
        kernels = [name for name in packages.getnames() if name.startswith("./boot/vmlinuz-")]
        if len(kernels) != 1:
            raise ImageError(f"the system that was installed has {len(kernels)} kernels, one expected")
        release = kernels[0].removeprefix("./boot/vmlinuz-")
        contents = {
            f"vmlinuz-{release}": debian.member(packages, f"boot/vmlinuz-{release}"),
            f"initrd.img-{release}": debian.member(packages, f"boot/initrd.img-{release}"),
            "EFI/BOOT/BOOTX64.EFI": debian.member(packages, "usr/lib/systemd/boot/efi/systemd-bootx64.efi"),
        }
    contents |= {
        "loader/loader.conf": b"default appliance.conf\ntimeout 0\neditor no\n",
        "loader/entries/appliance.conf": (
            f"title Appliance {role}\nversion {release}\n"
            f"linux /vmlinuz-{release}\ninitrd /initrd.img-{release}\noptions {options}\n"
        ).encode(),
        "syslinux.cfg": (
            "SERIAL 0 115200\nDEFAULT appliance\nPROMPT 0\nNOESCAPE 1\n"
            f"LABEL appliance\n  LINUX /vmlinuz-{release}\n  INITRD /initrd.img-{release}\n  APPEND {options}\n"
        ).encode(),
        DESCRIPTION_FILE: description,
    }
    sources = {}
    folder = work / "esp"
    folder.mkdir()
    for number, (name, content) in enumerate(contents.items()):
        sources[name] = folder / str(number)
        sources[name].write_bytes(content)
    image = work / "esp.fat"
    fat.make(
        image,
        sources,
        label="APPLIANCE",
        size_bytes=ESP_BYTES,
        serial=int(guids.esp[:8], 16),
        epoch=epoch,
        first_sector=partition.ALIGNMENT,
        fat32=True,
    )
    child.run(
        ["syslinux", "--install", image.name],
        timeout_s=120.0,
        cwd=work,
        env={"SOURCE_DATE_EPOCH": str(epoch), "TZ": "UTC", "MTOOLS_SKIP_CHECK": "1"},
    )
    return image


def whole_mib(size_bytes: int) -> int:
    """Returns the size rounded up to whole MiB."""
    return math.ceil(size_bytes / MIB) * MIB
