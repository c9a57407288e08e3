"""File systems of a test's own, which it can fill."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


class SmallDisk:
    """A file system of its own at `path`, which a test can fill and empty again."""

    def __init__(self, path: Path, *, size_bytes: int) -> None:
        self.path = path
        path.mkdir(parents=True)
        self._filler = path / "filler"
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "tmpfs", str(path)], check=True, timeout=20
        )

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Leaves so much free, to the page."""
        free = os.statvfs(self.path)
        with self._filler.open("ab") as file, contextlib.suppress(OSError):
            for _ in range((free.f_bavail * free.f_frsize - leave_bytes) // 4096):
                file.write(bytes(4096))

    def empty(self) -> None:
        """There is room again."""
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        """Takes it away."""
        subprocess.run(["umount", "-l", str(self.path)], check=True, timeout=20)


needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="a small file system of its own needs root")


@contextlib.contextmanager
def small_disk(path: Path, *, size_bytes: int) -> Iterator[SmallDisk]:
    """A mounted small disk."""
    disk = SmallDisk(path, size_bytes=size_bytes)
    try:
        yield disk
    finally:
        disk.close()
