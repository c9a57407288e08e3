"""Reads files from the top folder of an ISO 9660 disk (ECMA-119): with Rock Ridge or Joliet names, else its own.

Nothing is mounted. Rules: every length is a limit of ours before it is read; whatever doesn't hold is a `SeedError`.
Names compare without case and without version; a plain ISO name has `_` where ours have `-` (`OVF_ENV.XML`).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

from appliance.errors import SeedError
from appliance.machine.fat import MAX_FOLDER_BYTES, Read

_SECTOR = 2048
_DESCRIPTORS = range(16, 32)
_FOLDER = 0x02
_JOLIET = (b"%/@", b"%/C", b"%/E")


class _Entry(NamedTuple):
    names: tuple[str, ...]
    at: int
    size: int
    is_folder: bool


class Iso:
    """One disk.

    Args:
        read: its bytes.

    Raises:
        SeedError: it isn't ISO 9660.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self.label = ""
        """Of the volume."""
        self._entries: list[_Entry] = []
        found = False
        for number in _DESCRIPTORS:
            descriptor = read(number * _SECTOR, _SECTOR)
            if len(descriptor) < _SECTOR or descriptor[1:6] != b"CD001" or descriptor[0] == 255:
                break
            is_joliet = descriptor[0] == 2 and descriptor[88:91] in _JOLIET
            if descriptor[0] == 1:
                found = True
                self.label = descriptor[40:72].decode("latin-1").rstrip(" \0")
            if descriptor[0] == 1 or is_joliet:
                at, size = struct.unpack_from("<I4xI", descriptor, 156 + 2)
                folder = read(at * _SECTOR, min(size, MAX_FOLDER_BYTES))
                self._entries += _entries(folder, "utf-16-be" if is_joliet else "latin-1")
        if not found:
            raise SeedError("that is no ISO 9660 disk")

    def files(self, names: Collection[str], *, max_bytes: int) -> dict[str, bytes]:
        """Returns those of `names` that are there.

        Raises:
            SeedError: one is larger than `max_bytes`, or cut off.
        """
        wanted = {name.lower(): name for name in names}
        found: dict[str, bytes] = {}
        for entry in self._entries:
            name = next((wanted[one] for one in entry.names if one in wanted), None)
            if name is None or name in found or entry.is_folder:
                continue
            if entry.size > max_bytes:
                raise SeedError(f"{name} has {entry.size} bytes, at most {max_bytes} are read")
            content = self._read(entry.at * _SECTOR, entry.size) if entry.size else b""
            if len(content) < entry.size:
                raise SeedError(f"{name} is cut off: {len(content)} of {entry.size} bytes")
            found[name] = content
        return found


def _entries(folder: bytes, encoding: str) -> Iterator[_Entry]:
    at = 0
    while at + 34 <= len(folder):
        length = folder[at]
        if length < 34:
            at = (at // _SECTOR + 1) * _SECTOR  # a record never crosses a sector
            continue
        record = folder[at : at + length]
        extent, size, flags, name_length = *struct.unpack_from("<I4xI", record, 2), record[25], record[32]
        name = record[33 : 33 + name_length].decode(encoding, "replace").partition(";")[0].rstrip(".").lower()
        rest = record[33 + name_length + (1 - name_length % 2) :]
        yield _Entry((_rock_ridge(rest), name, name.replace("_", "-")), extent, size, bool(flags & _FOLDER))
        at += length


def _rock_ridge(area: bytes) -> str:
    """Returns the name in a record's system use area, "" where it has none."""
    name, at = b"", 0
    while at + 4 <= len(area) and area[at + 2] >= 4:
        if area[at : at + 2] == b"NM":
            name += area[at + 5 : at + area[at + 2]]
        at += area[at + 2]
    return name.decode("utf-8", "replace").lower()
