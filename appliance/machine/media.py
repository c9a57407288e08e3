"""What lies on the disks that somebody attached to this VM: files by name, from ISO 9660 and FAT, never mounted.

The disk that holds the root file system is left out: what is the image's own is found another way. What can't be read
is passed over with a sentence; nothing here is believed, only handed on.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from appliance.errors import SeedError
from appliance.machine.fat import Fat, Read
from appliance.machine.iso import Iso

MAX_MEDIA = 32
_NO_DISKS = ("loop", "ram", "zram", "fd", "dm-", "md")


class Medium(NamedTuple):
    """A file system that was found."""

    source: str
    """Device, for messages."""
    label: str
    files: dict[str, bytes]


def attached(
    names: Collection[str],
    *,
    max_bytes: int,
    but: str,
    notes: list[str],
    sys: Path = Path("/sys"),
    dev: Path = Path("/dev"),
) -> list[Medium]:
    """Returns the readable file systems of attached disks, in the order of their names.

    Args:
        names: of the files that are wanted.
        max_bytes: of each.
        but: name of the root's disk, such as `vda`.
        notes: gets one sentence for each that can't be read as a whole.
        sys: where sysfs is.
        dev: where devices are.
    """
    found = []
    for device in list(_devices(sys, but))[:MAX_MEDIA]:
        path = dev / device
        try:
            medium = _look(path, names, max_bytes)
        except SeedError as error:
            notes.append(f"{path} left out: {error.message}")
        except OSError:
            continue  # an empty drive, most of the time
        else:
            if medium is not None:
                found.append(medium)
    return found


def _devices(sys: Path, but: str) -> Iterator[str]:
    for disk in sorted((sys / "block").glob("*")):
        if disk.name == but or disk.name.startswith(_NO_DISKS):
            continue
        yield disk.name
        yield from sorted(entry.parent.name for entry in disk.glob("*/partition"))


def _look(path: Path, names: Collection[str], max_bytes: int) -> Medium | None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        read: Read = lambda offset, length: os.pread(descriptor, length, offset)  # noqa: E731 - one line says it
        system = _file_system(read)
        if system is None:
            return None
        return Medium(str(path), system.label, system.files(names, max_bytes=max_bytes))
    finally:
        os.close(descriptor)


def _file_system(read: Read) -> Iso | Fat | None:
    for kind in (Iso, Fat):
        try:
            return kind(read)
        except SeedError:
            continue
    return None
