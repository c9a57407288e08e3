"""Partition tables (GPT and MBR) in plain files: reads them, and adds one partition at the disk's end.

The file need not hold the whole disk: a *skeleton* of the first and the last MiB with a hole between is enough, so that
a table inside a qcow2 changes without unpacking it. `sgdisk` and `sfdisk` do the writing.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Literal

import msgspec

from appliance.errors import ChildError, ImageError
from appliance.runtime import child

SECTOR = 512
ALIGNMENT = 2048
"""Sectors: 1 MiB."""
BASIC_DATA = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX_ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
"""x86-64 root (uapi-group.org, Discoverable Partitions Specification)."""

_TIMEOUT_S = 60.0
_MBR_FAT32_LBA = "c"


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a table."""

    number: int
    start: int
    """Sector."""
    sectors: int
    type: str
    """GPT: GUID in capitals. MBR: hex."""
    name: str = ""
    """GPT only."""

    @property
    def offset(self) -> int:
        """Bytes from the disk's beginning."""
        return self.start * SECTOR

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return self.sectors * SECTOR


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A partition table."""

    kind: Literal["gpt", "dos"]
    partitions: list[Partition]

    def named(self, name: str) -> Partition | None:
        """Returns the partition of that GPT name."""
        return next((partition for partition in self.partitions if partition.name == name), None)

    def of_type(self, kind: str) -> list[Partition]:
        """Returns the partitions of that type."""
        return [partition for partition in self.partitions if partition.type.upper() == kind.upper()]

    @property
    def end(self) -> int:
        """First sector behind all partitions."""
        return max((partition.start + partition.sectors for partition in self.partitions), default=ALIGNMENT)


def read(disk: Path, *, name: str, sectors: int) -> Table:
    """Reads the table of a disk or skeleton.

    Args:
        disk: the file.
        name: how messages call it.
        sectors: of the whole disk.

    Raises:
        ImageError: no table, or one that tells of more than the disk has: a truncated file.
    """
    raw = disk.open("rb")
    with raw:
        head = raw.read(2 * SECTOR)
        raw.seek(-SECTOR, 2)
        last = raw.read(SECTOR)
    if len(head) < 2 * SECTOR or head[510:512] != b"\x55\xaa":
        raise ImageError(
            f"{name} holds no partition table", hint="a bootable disk image with GPT or MBR is expected; is it whole?"
        )
    is_gpt = head[SECTOR : SECTOR + 8] == b"EFI PART"
    if is_gpt:
        (backup,) = struct.unpack_from("<Q", head, SECTOR + 32)
        if last[:8] != b"EFI PART" or backup != sectors - 1:
            raise ImageError(
                f"{name} is truncated: its partition table ends at sector {backup}, the disk has {sectors}",
                hint="get it anew and compare its checksum",
            )
    try:
        told = json.loads(child.run(["sfdisk", "--json", str(disk)], timeout_s=_TIMEOUT_S).stdout)["partitiontable"]
    except (ChildError, ValueError, KeyError) as error:
        raise ImageError(f"the partition table of {name} can't be read: {error}") from error
    if told.get("sectorsize", SECTOR) != SECTOR or told["label"] not in {"gpt", "dos"}:
        raise ImageError(f"{name} has a table of kind {told['label']}; GPT or MBR with sectors of 512 bytes expected")
    partitions = [
        Partition(
            number=int(entry["node"][len(str(disk)) :].lstrip("p")),
            start=entry["start"],
            sectors=entry["size"],
            type=entry["type"].upper(),
            name=entry.get("name", ""),
        )
        for entry in told.get("partitions", [])
    ]
    table = Table(kind=told["label"], partitions=partitions)
    if not partitions:
        raise ImageError(f"{name} has an empty partition table: there is no system on it")
    if table.end > sectors:
        raise ImageError(
            f"{name} is truncated: its partitions end at sector {table.end}, the disk has {sectors}",
            hint="get it anew and compare its checksum",
        )
    return table


def place_for(table: Table, *, name: str, sectors: int, size_bytes: int) -> int:
    """Returns the first sector of a new partition of that size, the last on a disk of `sectors`.

    Raises:
        ImageError: there is no room, or no free entry.
    """
    if table.kind == "dos" and len([one for one in table.partitions if one.number <= 4]) == 4:
        raise ImageError(
            f"{name} has four primary partitions in its MBR, no fifth fits",
            hint="convert it to GPT (sgdisk --mbrtogpt), or take a seed ISO beside it",
        )
    end = sectors - (ALIGNMENT if table.kind == "gpt" else 0)
    start = (end - size_bytes // SECTOR) // ALIGNMENT * ALIGNMENT
    if start < table.end:
        missing = -(-(table.end - start) * SECTOR // (1024 * 1024))
        raise ImageError(
            f"{name} has no free space at its end for a seed of {size_bytes // (1024 * 1024)} MiB",
            hint=f"leave disk.size away, or make it {missing} MiB larger",
        )
    return start


def add(skeleton: Path, table: Table, *, start: int, size_bytes: int, type: str, name: str, guid: str) -> None:  # noqa: A002
    """Adds a partition. On MBR it has the type FAT32 and no name.

    Raises:
        ChildError: the tool refused.
    """
    length = size_bytes // SECTOR
    if table.kind == "gpt":
        spans = [f"--new=0:{start}:{start + length - 1}", f"--typecode=0:{type}"]
        args = ["sgdisk", "--move-second-header", *spans, f"--partition-guid=0:{guid}", f"--change-name=0:{name}"]
        child.run([*args, str(skeleton)], timeout_s=_TIMEOUT_S)
        return
    child.run(
        ["sfdisk", "--append", "--no-reread", "--no-tell-kernel", "--wipe=never", str(skeleton)],
        input=f"start={start}, size={length}, type={_MBR_FAT32_LBA}\n",
        timeout_s=_TIMEOUT_S,
    )
