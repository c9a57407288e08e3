"""Files that hold either their old or their new content, whatever is cut when.

A file is written beside its place, flushed, renamed, and its directory is flushed: a reader, or the boot after a power
cut, finds the old bytes or the new ones, never a mix. The file beside it (`.<name>.tmp`) is locked while it is written,
so two writers take turns, and what an interrupted writer left behind is used up by the next one.
What the bytes mean is `document`'s concern; who may write at all is decided by `lock`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from appliance.errors import StorageError

_HINTS = {
    errno.ENOSPC: "the disk is full: free space on that file system (`df -h {directory}`), then try again",
    errno.EDQUOT: "the quota is used up: free space below {directory}, or have the quota raised, then try again",
    errno.EROFS: "{directory} is mounted read-only: see `dmesg` for the reason, remount it read-write, then try again",
    errno.EACCES: "repeat as root, or as the user that it belongs to (`ls -la {directory}`)",
    errno.EPERM: "check owner, mode and attributes of {path} (`ls -la {directory}`, `lsattr {path}`)",
    errno.ENOENT: "create {directory}, or correct the path",
    errno.ENOTDIR: "one of the names above {path} is no directory: move that file away",
    errno.EISDIR: "{path} is a directory where a file belongs: move it away",
    errno.ELOOP: "a symbolic link stands where a file belongs: look with `ls -la {directory}`, move it away",
    errno.EIO: "the disk fails: see `dmesg`, and replace it",
}
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
_SCRUB_CHUNK_BYTES = 64 * 1024


class TooLargeError(StorageError):
    """A file is larger than anything that this program writes there."""

    code = "STORAGE-005"


def explain(error: OSError, doing: str, path: Path) -> StorageError:
    """Returns the `StorageError` for a failed system call on `path`; full disks and quotas are retryable."""
    hint = _HINTS.get(error.errno or 0, "see `dmesg` and the state of {directory}")
    return StorageError(
        f"cannot {doing} {path}: {error.strerror or error}",
        hint=hint.format(path=path, directory=path.parent),
        retryable=error.errno in _PASSING,
    )


@contextlib.contextmanager
def _explained(doing: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain(error, doing, path) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def write_all(fd: int, content: bytes) -> None:
    """Writes all of `content`; a write(2) may take less than it was given."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_directory(directory: Path) -> None:
    """Makes names in `directory` durable: fsync of a file covers its content, not its name."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_locked(temporary: Path) -> int:
    """Opens `temporary` and locks it; what another writer renamed away meanwhile is not ours any more."""
    while True:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), temporary.stat(follow_symlinks=False)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def write_atomic(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replaces `path` with `content`; when this returns, the new content survives a power cut.

    Args:
        path: its directory must exist; a symbolic link there is replaced, not followed.
        content: all of the file.
        mode: permission bits; the umask is not applied.

    Raises:
        StorageError: nothing was changed, except where the last step alone failed (the directory's fsync): then the
            new content is in place but might not survive a power cut.
    """
    with _explained("write", path):
        temporary = _temporary(path)
        fd = _open_locked(temporary)
        try:
            try:
                os.fchmod(fd, 0o600)
                os.ftruncate(fd, 0)
                write_all(fd, content)
                os.fchmod(fd, mode)
                os.fsync(fd)
                temporary.rename(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        finally:
            os.close(fd)
        sync_directory(path.parent)


def read_limited(path: Path, *, max_bytes: int) -> bytes:
    """Returns the content of a regular file.

    Raises:
        FileNotFoundError: there is none.
        TooLargeError: it holds more than `max_bytes`.
        StorageError: it can't be read, or is no regular file (a pipe would block for ever).
    """
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for one.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise explain(error, "read", path) from error
    with _explained("read", path):
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StorageError(f"cannot read {path}: it is no regular file", hint=f"move {path} away")
            with open(fd, "rb", closefd=False) as file:
                content = file.read(max_bytes + 1)
        finally:
            os.close(fd)
    if len(content) > max_bytes:
        raise TooLargeError(
            f"cannot read {path}: it holds more than {max_bytes} bytes",
            hint=f"this program writes less there; look at {path} and move it away",
        )
    return content


def make_dir(path: Path, *, mode: int = 0o700) -> None:
    """Makes `path` and whatever is missing above it, durably; directories that exist keep their mode.

    Raises:
        StorageError: a name on the way is no directory, or can't be made.
    """
    with _explained("make the directory", path):
        missing = list(itertools.takewhile(lambda place: not place.is_dir(), (path, *path.parents)))
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):  # made by someone else a moment ago, or no directory: seen below
                directory.mkdir(mode)
                directory.chmod(mode)  # mkdir's mode passes through the umask
            sync_directory(directory)
            sync_directory(directory.parent)


def _scrub(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        left = os.fstat(fd).st_size
        while left > 0:
            left -= os.write(fd, bytes(min(left, _SCRUB_CHUNK_BYTES)))
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_durably(path: Path, *, scrub: bool = False) -> None:
    """Removes `path`, and what an interrupted write left beside it, so that neither comes back after a power cut.

    Args:
        path: may be missing.
        scrub: overwrites the bytes with zeros first. Hygiene, no guarantee: copy-on-write and flash keep old blocks.

    Raises:
        StorageError: `path` is still there, or might come back.
    """
    with _explained("remove", path), contextlib.suppress(FileNotFoundError):
        for victim in (_temporary(path), path):
            with contextlib.suppress(FileNotFoundError):
                if scrub:
                    _scrub(victim)
                victim.unlink()
        sync_directory(path.parent)


def set_aside(path: Path) -> Path:
    """Renames `path` to `<name>.broken-<n>` with the first free n, durably, and returns the new path.

    Raises:
        StorageError: it could not be renamed, or there is none.
    """
    with _explained("set aside", path):
        aside = next(
            place
            for place in (path.with_name(f"{path.name}.broken-{n}") for n in itertools.count(1))
            if not os.path.lexists(place)
        )
        path.rename(aside)
        sync_directory(path.parent)
    return aside
