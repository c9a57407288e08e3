"""Disk space held back, to be given up when what must be written finds the disk full.

A file of zeros that really takes its blocks (fallocate); `release` removes it, and whoever calls writes then. `fill`
takes the space again once there is enough. Another user of the disk may be quicker: it is a reserve, no guarantee.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from appliance.storage.atomic import explain


class Reserve:
    """Space on the file system of `path`. One at a time uses it.

    Args:
        path: the file that holds the space; nobody else's.
        size_bytes: how much; 0 holds nothing.
    """

    def __init__(self, path: Path, *, size_bytes: int) -> None:
        self._path = path
        self.size_bytes = size_bytes

    @property
    def is_held(self) -> bool:
        """Whether all of the space is there to be given up."""
        try:
            return self._path.stat().st_size >= self.size_bytes
        except OSError:
            return self.size_bytes == 0

    @property
    def is_needed(self) -> bool:
        """Whether less than the reserve is free on the disk beside it."""
        return shutil.disk_usage(self._path.parent).free < self.size_bytes

    def fill(self) -> bool:
        """Takes the space where at least as much again stays free. Returns whether it is held.

        Raises:
            StorageError: the file system refuses for another reason than being full.
        """
        if self.is_held:
            return True
        if shutil.disk_usage(self._path.parent).free < 2 * self.size_bytes:
            return False
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self.size_bytes)
            finally:
                os.close(fd)
        except OSError as error:
            self.release()
            raise explain(error, "hold space in", self._path) from error
        return True

    def release(self) -> bool:
        """Gives the space up. Returns whether there was any."""
        with contextlib.suppress(OSError):
            self._path.unlink()
            return True
        return False
