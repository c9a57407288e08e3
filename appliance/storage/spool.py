"""A bounded queue on disk for what may be lost but shouldn't be: oldest first out, whoever falls out is counted.

The queue is a row of segment files, `<id of the first item>.seg`, of records `id, length, CRC-32, item`; ids grow. An
acknowledgement is a record without an item. A segment whose items are all acknowledged is removed, the newest one is
emptied instead; when the bound is reached the oldest segment goes, acknowledged or not. A finished segment is fsynced,
a record isn't: what was appended survives the end of the process, but after a power cut the newest items may be missing
and acknowledged ones may come again. A record that is cut short or damaged ends its segment.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from appliance.errors import StorageError
from appliance.storage.atomic import explain, make_dir, sync_directory, write_all

_HEADER = struct.Struct(">QII")
"""Id, length of the item in bytes, CRC-32 of id, length and item."""
_ACKNOWLEDGED = 0xFFFF_FFFF
"""A length that no item has: the record says that items up to and including its id are done."""
_MAX_ID = 1 << 62
"""No spool gets there by counting; an id behind it is damage, and would leave no room for the next."""
_SEGMENTS = 8
"""In a full spool: what falls out at once is an eighth of it."""


class _Record(NamedTuple):
    id: int
    item: bytes | None
    end: int
    """Offset behind the record, in bytes."""


@dataclass(slots=True)
class _Segment:
    path: Path
    first: int
    last: int
    """Newest item's id; `first - 1` where there is none."""
    size: int
    """Bytes of good records."""


def _pack(number: int, length: int, item: bytes) -> bytes:
    start = struct.pack(">QI", number, length)
    return start + struct.pack(">I", zlib.crc32(item, zlib.crc32(start))) + item


def _records(content: bytes, first: int) -> Iterator[_Record]:
    """Yields the records of a segment up to the first that is cut short or damaged."""
    offset, expected = 0, first
    while offset + _HEADER.size <= len(content):
        number, length, _ = _HEADER.unpack_from(content, offset)
        end = offset + _HEADER.size + (0 if length == _ACKNOWLEDGED else length)
        item = content[offset + _HEADER.size : end]
        if number > _MAX_ID or end > len(content) or content[offset:end] != _pack(number, length, item):
            return
        if length == _ACKNOWLEDGED:
            if offset and number >= expected:
                return  # only a segment that was emptied begins with what it no longer has
            yield _Record(number, None, end)
            expected = max(expected, number + 1)
        elif number < expected:
            return
        else:
            yield _Record(number, item, end)
            expected = number + 1
        offset = end


class Spool:
    """Items (bytes) in the order in which they were appended. Safe to use from several threads."""

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        """Opens the spool, and makes `directory` where it is missing.

        Args:
            directory: holds the segments, and nothing else.
            max_bytes: the most that the segments may take on disk.

        Raises:
            StorageError: the directory can't be made, read or written.
        """
        self._directory = directory
        self._max_bytes = max_bytes
        self._mutex = threading.Lock()
        self._segments: deque[_Segment] = deque()
        self._acknowledged = 0
        self._dropped = 0
        make_dir(directory)
        try:
            self._load()
            self._fd = self._open_last()
        except OSError as error:
            raise explain(error, "open the spool", directory) from error

    @property
    def size_bytes(self) -> int:
        """What the segments take on disk."""
        with self._mutex:
            return self._size()

    @property
    def dropped(self) -> int:
        """Items lost since this object was made: pushed out by newer ones, or damaged on disk."""
        with self._mutex:
            return self._dropped

    def __len__(self) -> int:
        """Returns how many items wait."""
        with self._mutex:
            return sum(self._waiting(segment) for segment in self._segments)

    def append(self, item: bytes) -> None:
        """Adds an item behind all others; the oldest make room for it.

        Raises:
            StorageError: it alone is larger than the spool, or it can't be written; the spool is as it was.
        """
        need = _HEADER.size + len(item)
        if need > self._max_bytes:
            raise StorageError(
                f"an item of {len(item)} bytes doesn't fit into the spool {self._directory} of {self._max_bytes} bytes",
                hint="raise the spool's size in the settings",
            )
        with self._mutex:
            try:
                segment = self._segments[-1]
                if segment.first <= segment.last and segment.size + need > self._max_bytes // _SEGMENTS:
                    segment = self._begin_segment()
                while self._size() + need > self._max_bytes:
                    self._drop_oldest()
                self._write(segment, _pack(segment.last + 1, len(item), item))
                segment.last += 1
            except OSError as error:
                raise explain(error, "append to the spool", self._directory) from error

    def peek(self, count: int) -> list[tuple[int, bytes]]:
        """Returns up to `count` of the oldest items that wait, with their ids. They stay until acknowledged.

        Raises:
            StorageError: a segment can't be read.
        """
        found: list[tuple[int, bytes]] = []
        with self._mutex:
            try:
                for segment in list(self._segments):
                    if len(found) >= count:
                        break
                    if self._waiting(segment):
                        found += self._read(segment, count - len(found))
            except OSError as error:
                raise explain(error, "read the spool", self._directory) from error
        return found

    def acknowledge(self, last_id: int) -> None:
        """Takes out all items up to and including `last_id`.

        Raises:
            StorageError: the disk didn't take it; the items are out, but may come again after a restart.
        """
        with self._mutex:
            last_id = min(last_id, self._segments[-1].last)
            if last_id <= self._acknowledged:
                return
            self._acknowledged = last_id
            try:
                while len(self._segments) > 1 and not self._waiting(self._segments[0]):
                    self._remove_oldest()
                if not self._waiting(self._segments[-1]):
                    self._empty_last()
                if self._size() + _HEADER.size <= self._max_bytes:
                    self._write(self._segments[-1], _pack(last_id, _ACKNOWLEDGED, b""))
            except OSError as error:
                raise explain(error, "acknowledge in the spool", self._directory) from error

    def close(self) -> None:
        """Makes the newest segment durable as far as the disk lets it, and closes it. The spool is done then."""
        with self._mutex:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise explain(error, "close the spool", self._directory) from error
            finally:
                os.close(self._fd)

    def _load(self) -> None:
        for path in sorted(path for path in self._directory.glob("*.seg") if path.stem.isdecimal()):
            segment = _Segment(path, int(path.stem), int(path.stem) - 1, 0)
            for record in _records(path.read_bytes(), segment.first):
                segment.size = record.end
                if record.item is None:
                    self._acknowledged = max(self._acknowledged, record.id)
                else:
                    if segment.last < segment.first:
                        segment.first = record.id
                    segment.last = record.id
            self._segments.append(segment)
        for before, after in zip(self._segments, list(self._segments)[1:], strict=False):
            # Only the oldest are ever removed: a gap between two is what damage took.
            self._dropped += max(0, after.first - 1 - max(before.last, self._acknowledged))
        if not self._segments:
            self._segments.append(self._segment(1))
        newest = self._segments[-1]
        if newest.last < self._acknowledged:  # or new items would get ids that count as acknowledged
            newest.first, newest.last = self._acknowledged + 1, self._acknowledged

    def _segment(self, first: int) -> _Segment:
        return _Segment(self._directory / f"{first:020d}.seg", first, first - 1, 0)

    def _open_last(self) -> int:
        """Opens the segment that is appended to, and cuts off what isn't a good record."""
        segment = self._segments[-1]
        fd = os.open(segment.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, segment.size)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _begin_segment(self) -> _Segment:
        os.fsync(self._fd)
        segment = self._segment(self._segments[-1].last + 1)
        self._segments.append(segment)
        try:
            fd = self._open_last()
        except OSError:
            self._segments.pop()
            raise
        os.close(self._fd)
        self._fd = fd
        sync_directory(self._directory)
        return segment

    def _drop_oldest(self) -> None:
        lost = self._waiting(self._segments[0])
        if len(self._segments) > 1:
            self._remove_oldest()
        else:
            self._empty_last()
        self._dropped += lost

    def _empty_last(self) -> None:
        os.ftruncate(self._fd, 0)
        segment = self._segments[-1]
        segment.first, segment.size = segment.last + 1, 0

    def _remove_oldest(self) -> None:
        self._segments[0].path.unlink(missing_ok=True)
        self._segments.popleft()

    def _write(self, segment: _Segment, record: bytes) -> None:
        try:
            os.lseek(self._fd, segment.size, os.SEEK_SET)
            write_all(self._fd, record)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, segment.size)  # a full disk may have taken half of it
            raise
        segment.size += len(record)

    def _read(self, segment: _Segment, count: int) -> list[tuple[int, bytes]]:
        """Returns up to `count` waiting items; a segment that is damaged by now is cut to what is good of it."""
        found: list[tuple[int, bytes]] = []
        good, last = 0, segment.first - 1
        for record in _records(segment.path.read_bytes()[: segment.size], segment.first):
            good = record.end
            if record.item is not None:
                last = record.id
                if record.id > self._acknowledged:
                    found.append((record.id, record.item))
                    if len(found) == count:
                        return found
        if good < segment.size:
            if segment is self._segments[-1]:
                self._begin_segment()
            self._dropped += self._waiting(segment) - len(found)
            segment.last, segment.size = last, good
        return found

    def _size(self) -> int:
        return sum(segment.size for segment in self._segments)

    def _waiting(self, segment: _Segment) -> int:
        return max(0, segment.last - max(self._acknowledged, segment.first - 1))
