"""FAT file systems in plain files, by mtools: no loop device, no mount, and the same bytes for the same files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from appliance.errors import ChildError, ImageError
from appliance.runtime import child

MIB = 1024 * 1024
SECTOR = 512
_TIMEOUT_S = 300.0


def _environment(epoch: int) -> dict[str, str]:
    # mtools dates files by SOURCE_DATE_EPOCH and the time zone, and reads the user's own settings
    return {"SOURCE_DATE_EPOCH": str(epoch), "TZ": "UTC", "MTOOLSRC": "/dev/null", "MTOOLS_SKIP_CHECK": "1"}


def size_for(content_bytes: int, *, files: int) -> int:
    """Returns the size of a file system for that much, in bytes: whole MiB, with room for tables and clusters."""
    return max(4, math.ceil((content_bytes + files * 8192) * 1.02 / MIB) + 2) * MIB


def make(
    path: Path,
    files: Mapping[str, Path],
    *,
    label: str,
    size_bytes: int,
    serial: int,
    epoch: int,
    first_sector: int,
    fat32: bool = False,
) -> None:
    """Makes a FAT image.

    Args:
        path: the image, made anew.
        files: name in it (with `/`, folders are made) to the file with the content.
        label: of the volume, at most 11 characters.
        size_bytes: of the whole image.
        serial: of the volume, 32 bits.
        epoch: date of everything in it, seconds since 1970.
        first_sector: where on its disk it will lie, told to boot loaders.
        fat32: insist on FAT32 (UEFI's own form); otherwise the size decides.

    Raises:
        ChildError: mtools failed; mostly since it didn't fit.
    """
    env = _environment(epoch)
    with path.open("wb") as stream:
        stream.truncate(size_bytes)
    geometry = ["-T", str(size_bytes // SECTOR), "-h", "64", "-s", "32", "-H", str(first_sector)]
    kind = ["-F", "-c", "2"] if fat32 else []
    child.run(
        ["mformat", "-i", path.name, "-v", label, "-N", f"{serial & 0xFFFFFFFF:08x}", *geometry, *kind, "::"],
        timeout_s=_TIMEOUT_S,
        cwd=path.parent,
        env=env,
    )
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents if str(parent) != "."}
    for folder in sorted(folders):
        child.run(["mmd", "-i", path.name, f"::{folder}"], timeout_s=_TIMEOUT_S, cwd=path.parent, env=env)
    for name, source in files.items():
        child.run(
            ["mcopy", "-i", path.name, str(source.absolute()), f"::{name}"],
            timeout_s=_TIMEOUT_S,
            cwd=path.parent,
            env=env,
        )


def read(image: Path, name: str, *, offset: int = 0, into: Path, max_bytes: int) -> bytes | None:
    """Returns a file of the FAT file system at `offset` of an image, None where there is no such file.

    Args:
        image: the file with the file system.
        name: with `/`.
        offset: in bytes.
        into: a folder for a moment's copy.
        max_bytes: a larger file is refused.

    Raises:
        ImageError: it is too large.
    """
    copy = into / "read-from-fat"
    copy.unlink(missing_ok=True)
    try:
        child.run(
            ["mcopy", "-n", "-i", f"{image.name}@@{offset}", f"::{name}", str(copy.absolute())],
            timeout_s=_TIMEOUT_S,
            cwd=image.parent,
            env=_environment(0),
        )
    except ChildError:
        return None
    if copy.stat().st_size > max_bytes:
        raise ImageError(f"{name} in {image} has {copy.stat().st_size} bytes, at most {max_bytes} are read")
    return copy.read_bytes()
