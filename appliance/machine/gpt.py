"""Reads a GUID partition table and says how it looks without one partition (UEFI Specification 2.10, section 5.3).

Bytes in, bytes out: which disk they come from, and writing them, is `disk`. Rules:

1. A header counts only with its own and its entries' checksum right. Where the first copy is torn the second counts.
2. Only entries of 128 bytes are read, at most 128 of them, in sectors of 512 bytes: what every tool writes.
3. A change moves both copies to where they belong on a disk of the size it has now, so a disk that was enlarged after
   its table was made is used to its end.
4. Of the first copy only the header and the sector of the entry change. They are neighbours in one page of 4 KiB, so
   that a power cut leaves the old table or the new one on any disk that writes such a page as a whole; else the second
   copy, which is written first, still is whole.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from typing import NamedTuple

from appliance.errors import SeedError

SECTOR = 512
COPY_SECTORS = 33
"""A header and 128 entries."""
ALIGNMENT = 2048
"""Sectors: partitions end at a whole MiB."""

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_SIGNATURE = b"EFI PART"
_ENTRY_BYTES = 128
_MAX_ENTRIES = 128
_HINT = "look at it with `fdisk -l`"


class Partition(NamedTuple):
    """One entry in use."""

    number: int
    type: str
    """GUID in capitals."""
    name: str
    start: int
    """Sector."""
    sectors: int


class Table(NamedTuple):
    """A table whose checksums were right."""

    disk_guid: bytes
    first_usable: int
    """Sector."""
    entries: bytes
    partitions: tuple[Partition, ...]

    def find(self, *, type: str, name: str) -> Partition | None:  # noqa: A002 - GPT's own word
        """Returns the one partition with this type and this name; None where there is none, or more than one."""
        found = [one for one in self.partitions if (one.type, one.name) == (type, name)]
        return found[0] if len(found) == 1 else None


class Change(NamedTuple):
    """What is to be written, in this order, each flushed before the next."""

    second: bytes
    """To sector `sectors - COPY_SECTORS`."""
    first: bytes
    """To sector 1."""


def read(first: bytes, second: bytes, *, sectors: int) -> Table:
    """Reads a table.

    Args:
        first: sectors 1 to 33 of the disk.
        second: its last 33 sectors.
        sectors: of the whole disk.

    Raises:
        SeedError: neither copy holds.
    """
    table = _read_copy(first[:SECTOR], first[SECTOR:], sectors=sectors)
    if table is None:
        table = _read_copy(second[-SECTOR:], second[:-SECTOR], sectors=sectors)
    if table is None:
        raise SeedError("the disk has no partition table (GPT) whose checksums are right", hint=_HINT)
    return table


def _read_copy(header: bytes, entries: bytes, *, sectors: int) -> Table | None:
    if len(header) < SECTOR:
        return None
    (
        signature, _, size, checksum, _, _, _, first_usable, _, guid, _, count, entry_bytes, entries_checksum,
    ) = _HEADER.unpack_from(header)  # fmt: skip
    if signature != _SIGNATURE or not _HEADER.size <= size <= SECTOR:
        return None
    if zlib.crc32(header[:16] + bytes(4) + header[20:size]) != checksum:
        return None
    length = count * entry_bytes
    if entry_bytes != _ENTRY_BYTES or not 0 < count <= _MAX_ENTRIES or len(entries) < length:
        return None
    if zlib.crc32(entries[:length]) != entries_checksum:
        return None
    kept = entries[:length].ljust(_MAX_ENTRIES * _ENTRY_BYTES, b"\0")
    return Table(guid, first_usable, kept, tuple(_partitions(kept, sectors)))


def _partitions(entries: bytes, sectors: int) -> list[Partition]:
    found = []
    for number in range(1, _MAX_ENTRIES + 1):
        entry = entries[(number - 1) * _ENTRY_BYTES : number * _ENTRY_BYTES]
        start, last = struct.unpack_from("<QQ", entry, 32)
        if entry[:16] == bytes(16) or not COPY_SECTORS < start <= last < sectors:
            continue
        name = entry[56:].decode("utf-16-le", "replace").partition("\0")[0]
        kind = str(uuid.UUID(bytes_le=entry[:16])).upper()
        found.append(Partition(number, kind, name, start, last - start + 1))
    return found


def without(table: Table, number: int, *, grow: int, sectors: int) -> Change:
    """Returns the table without partition `number`, and with partition `grow` as long as the space behind it allows.

    Args:
        table: as it was read.
        number: to be removed; one that isn't there is no error.
        grow: to be enlarged; never made smaller.
        sectors: of the whole disk.
    """
    entries = bytearray(table.entries)
    entries[(number - 1) * _ENTRY_BYTES : number * _ENTRY_BYTES] = bytes(_ENTRY_BYTES)
    last_usable = sectors - COPY_SECTORS - 1
    rest = [one for one in table.partitions if one.number != number]
    growing = next((one for one in rest if one.number == grow), None)
    if growing is not None:
        behind = [one.start for one in rest if one.start > growing.start]
        end = min(behind, default=(last_usable + 1) // ALIGNMENT * ALIGNMENT)
        last = max(end - 1, growing.start + growing.sectors - 1)
        struct.pack_into("<Q", entries, (grow - 1) * _ENTRY_BYTES + 40, last)
    written = bytes(entries)

    def header(own: int, other: int, entries_at: int) -> bytes:
        def packed(checksum: int) -> bytes:
            return _HEADER.pack(
                _SIGNATURE, 0x10000, _HEADER.size, checksum, 0, own, other, table.first_usable, last_usable,
                table.disk_guid, entries_at, _MAX_ENTRIES, _ENTRY_BYTES, zlib.crc32(written),
            )  # fmt: skip

        return packed(zlib.crc32(packed(0))).ljust(SECTOR, b"\0")

    end = sectors - 1
    return Change(
        second=written + header(end, 1, sectors - COPY_SECTORS),
        first=header(1, end, 2) + written,
    )
