"""One daemon to a root: an flock(2) that ends with its process, however that ends.

The lock file is never removed (a second daemon could lock the new file while the first holds the old one). It holds the
holder's pid, for messages only; whether it is locked, the kernel alone says.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from appliance.errors import LockedError
from appliance.storage.atomic import explain, make_dir

_PID_BYTES = 16
_TRIES = 10
_PAUSE_S = 0.02
"""`holder` may hold the lock for an instant after an unclean end: worth a second look, not a wait for the other one."""


def _read_pid(fd: int) -> int | None:
    text = os.pread(fd, _PID_BYTES, 0).strip()
    return int(text) if text.isdigit() else None


def _write_pid(fd: int, pid: int | None) -> None:
    # Always the same width, in place: a full disk must neither keep a daemon from starting nor leave a stale pid.
    with contextlib.suppress(OSError):
        os.pwrite(fd, f"{pid or ''}".ljust(_PID_BYTES - 1).encode() + b"\n", 0)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class RootLock:
    """The right to work on a root, held by at most one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            LockedError: another process has it; the message names its pid.
            StorageError: the lock file can't be made.
        """
        make_dir(self._path.parent)
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._lock(fd)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise explain(error, "lock", self._path) from error
        self._fd = fd

    def _lock(self, fd: int) -> None:
        for _ in range(_TRIES):
            if _try_lock(fd, fcntl.LOCK_EX):
                _write_pid(fd, os.getpid())
                return
            time.sleep(_PAUSE_S)
        pid = _read_pid(fd)
        raise LockedError(
            f"{self._path} is held by {f'process {pid}' if pid else 'a process'}: another daemon works on this root",
            hint="stop it first, or use another --root",
        )

    def release(self) -> None:
        """Gives the lock back; fine where it isn't held."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            _write_pid(fd, None)
            os.close(fd)

    def __enter__(self) -> RootLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder(path: Path) -> int | None:
    """Returns the pid of the process that holds the lock at `path`, None where nobody does.

    Raises:
        StorageError: the lock file can't be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain(error, "read", path) from error
    try:
        pid = _read_pid(fd)
        # A file without a pid was given back properly: asking the kernel would only get in a starting daemon's way.
        return pid if pid is not None and not _try_lock(fd, fcntl.LOCK_SH) else None
    finally:
        os.close(fd)
