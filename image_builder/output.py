"""Puts a seed on disk: as a folder (0700), as an ISO (0600), or both. Each appears under its name only when whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from appliance.errors import StorageError
from image_builder.seed import SeedFile


def check_target(path: Path) -> list[str]:
    """Returns what stands in the way of making `path`, one sentence each; nothing existing is ever replaced."""
    if os.path.lexists(path):
        return [f"{path} exists already: remove it or choose another name"]
    if not path.absolute().parent.is_dir():
        return [f"{path.absolute().parent} is no directory: make it first"]
    return []


def _write(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        os.fchmod(descriptor, mode)
        stream.flush()
        os.fsync(descriptor)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place(files: Sequence[SeedFile], *, directory: Path | None, iso: Path | None, iso_content: bytes) -> None:
    """Writes the wanted forms beside their names, then renames them.

    Raises:
        StorageError: something could not be written; nothing of it is left under its name.
    """
    drafts: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        for target in (directory, iso):
            if target is None:
                continue
            # a folder of its own also for the ISO: mkdtemp's 0700 keeps the half-written key from other users
            draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
            drafts.append((draft, target))
            if target is iso:
                _write(draft / "iso", iso_content, 0o600)
            else:
                for file in files:
                    _write(draft / file.name, file.content, file.mode)
            _sync(draft)
        for draft, target in drafts:
            (draft / "iso" if target is iso else draft).rename(target)
            placed.append(target)
            _sync(target.absolute().parent)
    except OSError as error:
        for target in placed:
            _remove(target)
        raise StorageError(
            f"the seed could not be written: {error.strerror} ({error.filename})",
            hint="check the disk's free space and the folder's permissions; nothing was left behind",
        ) from error
    finally:
        for draft, _ in drafts:
            _remove(draft)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class Draft:
    """A hidden folder (0700) beside the targets, in which everything is made. Use as a context: it goes at the end.

    Raises:
        StorageError: it can't be made, or what lies in it can't be put under its names.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix=".image-builder-", dir=directory.absolute()))
        except OSError as error:
            raise StorageError(
                f"no work folder can be made in {directory}: {error.strerror}",
                hint="choose another folder for the output, or check its permissions and free space",
            ) from error

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        # mmdebstrap mounts in a name space of its own; should a mount have stayed in ours, what lies behind it is
        # the machine's /dev or /proc
        mounts = Path("/proc/self/mounts").read_text("utf-8", "replace")
        if f" {self.path}/" not in mounts:
            shutil.rmtree(self.path, ignore_errors=True)


def publish(files: Mapping[Path, Path], *, modes: Mapping[Path, int]) -> None:
    """Gives finished files (keys) their names (values), all of them or none; existing ones are never replaced.

    Args:
        files: in a draft beside their targets, so that a rename is enough.
        modes: of a target; 0644 where it isn't named.

    Raises:
        StorageError: one could not be placed; those before it are gone again.
    """
    placed: list[Path] = []
    try:
        for made, target in files.items():
            descriptor = os.open(made, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fchmod(descriptor, modes.get(target, 0o644))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.link(made, target)  # unlike rename, it refuses a name that came up meanwhile
            placed.append(target)
            _sync(target.absolute().parent)
    except OSError as error:
        for target in placed:
            target.unlink(missing_ok=True)
        raise StorageError(
            f"{error.filename2 or error.filename} could not be written: {error.strerror}",
            hint="check the disk's free space and the folder's permissions; nothing was left behind",
        ) from error
