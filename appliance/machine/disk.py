"""The disk that holds the root file system: its seed partition, wiped and removed, and the room that this frees.

A `Disk` is one file, a block device or (in tests) a plain file; what a partition table means is `gpt`. Each method may
be repeated after a cut, and has reached the disk when it returns.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from appliance.errors import ChildError
from appliance.machine import gpt
from appliance.machine.fat import Fat
from appliance.machine.gpt import SECTOR, Partition, Table
from appliance.protocol import seed as protocol
from appliance.runtime import child, log
from appliance.storage.atomic import explain, write_all

_BLKDISCARD = 0x1277  # linux/fs.h: start and length in bytes
_CHUNK_BYTES = 1 << 20
_TOOL_TIMEOUT_S = 300.0
_log = log.bind("seed")


class Disk:
    """The root's disk.

    Args:
        path: the whole disk.
        root: number of the root's partition.
        root_device: of that partition; None where the kernel doesn't know it (a plain file).
    """

    def __init__(self, path: Path, *, root: int, root_device: Path | None) -> None:
        self.path = path
        self._root = root
        self._root_device = root_device

    def seed_partition(self) -> Partition | None:
        """Returns the image's own seed partition: by type and name, on this disk and no other.

        Raises:
            SeedError: the table doesn't hold.
            StorageError: the disk can't be read.
        """
        return self._table()[0].find(type=protocol.OWN_TYPE, name=protocol.OWN_LABEL)

    def read_seed(self, partition: Partition, names: tuple[str, ...]) -> dict[str, bytes]:
        """Returns those files of the seed partition that are there.

        Raises:
            SeedError: it holds no file system, or a file doesn't hold.
            StorageError: the disk can't be read.
        """
        start, end = partition.start * SECTOR, (partition.start + partition.sectors) * SECTOR

        def read(offset: int, length: int) -> bytes:
            return self._read(start + offset, max(0, min(length, end - start - offset)))

        return Fat(read).files(names, max_bytes=protocol.MAX_BUNDLE_BYTES)

    def wipe(self, partition: Partition) -> None:
        """Overwrites a partition with zeros, and tells the disk that nobody needs it. Raises `StorageError`."""
        start, length = partition.start * SECTOR, partition.sectors * SECTOR
        with self._open(os.O_WRONLY) as disk:
            os.lseek(disk.fd, start, os.SEEK_SET)
            for at in range(0, length, _CHUNK_BYTES):
                write_all(disk.fd, bytes(min(_CHUNK_BYTES, length - at)))
            os.fsync(disk.fd)
            # After the zeros have arrived: what a discarded block reads as is the disk's own affair.
            try:
                fcntl.ioctl(disk.fd, _BLKDISCARD, struct.pack("<QQ", start, length))
            except OSError as error:
                _log.debug("%s discards nothing: %s", self.path, error.strerror)

    def remove(self, number: int) -> None:
        """Takes a partition out of the table and gives its room to the root's. Raises `SeedError`, `StorageError`."""
        table, sectors = self._table()
        change = gpt.without(table, number, grow=self._root, sectors=sectors)
        with self._open(os.O_WRONLY) as disk:
            for at, content in ((sectors - gpt.COPY_SECTORS, change.second), (1, change.first)):
                os.lseek(disk.fd, at * SECTOR, os.SEEK_SET)
                write_all(disk.fd, content)
                os.fsync(disk.fd)

    def grow(self, number: int) -> None:
        """Tells the kernel of the new table, and lets the root file system fill its partition.

        Args:
            number: of the partition that is gone.

        Raises:
            ChildError: a tool failed.
        """
        if self._root_device is None:
            return
        # udev looks into the partitions of a table that was written; while it does, none can be taken away
        child.run(["udevadm", "settle", "--timeout=90"], timeout_s=_TOOL_TIMEOUT_S, check=False)
        try:
            child.run(["partx", "--delete", "--nr", str(number), str(self.path)], timeout_s=_TOOL_TIMEOUT_S)
        except ChildError as error:
            _log.debug("the kernel knows it already: %s", error.message)  # after a reboot it has read the new table
        child.run(["partx", "--update", "--nr", str(self._root), str(self.path)], timeout_s=_TOOL_TIMEOUT_S)
        child.run(["resize2fs", str(self._root_device)], timeout_s=_TOOL_TIMEOUT_S)

    def _table(self) -> tuple[Table, int]:
        sectors = self._size() // SECTOR
        copy = gpt.COPY_SECTORS * SECTOR
        first, second = self._read(SECTOR, copy), self._read((sectors - gpt.COPY_SECTORS) * SECTOR, copy)
        return gpt.read(first, second, sectors=sectors), sectors

    def _size(self) -> int:
        with self._open(os.O_RDONLY) as disk:
            return os.lseek(disk.fd, 0, os.SEEK_END)

    def _read(self, offset: int, length: int) -> bytes:
        with self._open(os.O_RDONLY) as disk:
            return os.pread(disk.fd, length, offset)

    def _open(self, flags: int) -> _Opened:
        return _Opened(self.path, flags)


class _Opened:
    """An open disk; system calls inside end as `StorageError`."""

    def __init__(self, path: Path, flags: int) -> None:
        self._path, self._flags, self.fd = path, flags, -1

    def __enter__(self) -> _Opened:
        try:
            self.fd = os.open(self._path, self._flags | os.O_CLOEXEC)
        except OSError as error:
            raise explain(error, "open", self._path) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        os.close(self.fd)
        if isinstance(error, OSError):
            raise explain(error, "use", self._path) from error


def root_disk(*, sys: Path = Path("/sys"), dev: Path = Path("/dev"), device: int | None = None) -> Disk | None:
    """Returns the disk with the root file system; None where that isn't a partition of a disk.

    Args:
        sys: where sysfs is.
        dev: where devices are.
        device: number of the device with the root file system; None asks the kernel.
    """
    number = Path("/").stat().st_dev if device is None else device
    entry = (sys / f"dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    try:
        partition = int((entry / "partition").read_text())
    except (OSError, ValueError):
        return None
    return Disk(dev / entry.parent.name, root=partition, root_device=dev / entry.name)
