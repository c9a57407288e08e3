"""Puts a seed on disk: as a folder (0700), as an ISO (0600), or both. Each appears under its name only when whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
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
