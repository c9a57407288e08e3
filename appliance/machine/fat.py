"""Reads files from the top folder of a FAT file system (Microsoft FAT specification 1.03): 12, 16 and 32 bits.

Nothing is mounted: the kernel's reader never sees a disk that anybody may have attached. Rules: every place is checked
against the file system's own size before it is read; a chain of clusters is followed for at most as long as its file
may be; names compare without case; whatever doesn't hold is a `SeedError`, never another exception.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from appliance.errors import SeedError

Read = Callable[[int, int], bytes]
"""Takes offset and length in bytes; returns fewer at the end."""

MAX_FOLDER_BYTES = 64 * 1024
_FOLDER, _LABEL, _LONG_NAME = 0x10, 0x08, 0x0F


class _Entry(NamedTuple):
    name: str
    attributes: int
    cluster: int
    size: int


class Fat:
    """One file system.

    Args:
        read: its bytes.

    Raises:
        SeedError: it isn't FAT.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        boot = read(0, 512)
        if len(boot) < 512 or boot[510:] != b"\x55\xaa":
            raise SeedError("that is no FAT file system")
        sector, per_cluster, reserved, copies, top_entries, small = struct.unpack_from("<HBHBHH", boot, 11)
        fat_sectors = struct.unpack_from("<H", boot, 22)[0] or struct.unpack_from("<I", boot, 36)[0]
        total = small or struct.unpack_from("<I", boot, 32)[0]
        if sector not in {512, 1024, 2048, 4096} or not per_cluster or not copies or not reserved or not fat_sectors:
            raise SeedError("that is no FAT file system")
        top_sectors = -(-top_entries * 32 // sector)
        first = reserved + copies * fat_sectors + top_sectors
        self._clusters = (total - first) // per_cluster
        if self._clusters <= 0:
            raise SeedError("a FAT file system without room for files")
        self._bits = 12 if self._clusters < 4085 else 16 if self._clusters < 65525 else 32
        self._cluster_bytes = per_cluster * sector
        self._first = first * sector
        self._table = reserved * sector
        if self._bits == 32:
            top = self._chain(struct.unpack_from("<I", boot, 44)[0], MAX_FOLDER_BYTES)
        else:
            top = read((first - top_sectors) * sector, min(top_entries * 32, MAX_FOLDER_BYTES))
        self._entries = list(_entries(top, is_fat32=self._bits == 32))
        self.label = next((one.name for one in self._entries if one.attributes & _LABEL), "")
        """As the top folder has it."""

    def files(self, names: Collection[str], *, max_bytes: int) -> dict[str, bytes]:
        """Returns those of `names` that are there.

        Raises:
            SeedError: one is larger than `max_bytes`, or its chain of clusters breaks.
        """
        wanted = {name.lower(): name for name in names}
        found = {}
        for entry in self._entries:
            name = wanted.get(entry.name.lower())
            if name is None or entry.attributes & (_FOLDER | _LABEL):
                continue
            if entry.size > max_bytes:
                raise SeedError(f"{name} has {entry.size} bytes, at most {max_bytes} are read")
            content = self._chain(entry.cluster, entry.size) if entry.size else b""
            if len(content) < entry.size:
                raise SeedError(f"{name} is cut off: {len(content)} of {entry.size} bytes")
            found[name] = content
        return found

    def _chain(self, cluster: int, size: int) -> bytes:
        """Returns at most `size` bytes of the chain that begins with `cluster`."""
        parts, left = [], size
        while left > 0 and 2 <= cluster < self._clusters + 2:
            part = self._read(self._first + (cluster - 2) * self._cluster_bytes, min(left, self._cluster_bytes))
            if not part:
                break
            parts.append(part)
            left -= len(part)
            cluster = self._next(cluster)
        return b"".join(parts)

    def _next(self, cluster: int) -> int:
        if self._bits == 12:
            raw = self._read(self._table + cluster + cluster // 2, 2).ljust(2, b"\0")
            value = int.from_bytes(raw, "little")
            return value >> 4 if cluster & 1 else value & 0xFFF
        length = self._bits // 8
        value = int.from_bytes(self._read(self._table + cluster * length, length), "little")
        return value & 0x0FFFFFFF


def _entries(folder: bytes, *, is_fat32: bool) -> Iterator[_Entry]:
    parts: dict[int, bytes] = {}
    for at in range(0, len(folder) - 31, 32):
        raw = folder[at : at + 32]
        if raw[0] == 0:
            return
        attributes = raw[11]
        if raw[0] == 0xE5:
            parts = {}
        elif attributes & 0x3F == _LONG_NAME:
            parts[raw[0] & 0x1F] = raw[1:11] + raw[14:26] + raw[28:32]
        else:
            long = b"".join(parts[number] for number in sorted(parts)).decode("utf-16-le", "replace").partition("\0")[0]
            short = raw[:8].decode("latin-1").rstrip() + (
                "." + raw[8:11].decode("latin-1").rstrip() if raw[8:11].strip() and not attributes & _LABEL else ""
            )
            if attributes & _LABEL:
                short = raw[:11].decode("latin-1").rstrip()
            high, low, size = struct.unpack_from("<H", raw, 20)[0], *struct.unpack_from("<HI", raw, 26)
            yield _Entry(long or short, attributes, low | (high << 16 if is_fat32 else 0), size)
            parts = {}
