"""Disks as files: what kind they are, and a seed partition at their end. Never looks into anybody's root file system.

    our own system     partition APPL-SEED: the seed's files
    any other system   partition CIDATA: the seed's files, the agent as appliance.tar, install.sh, sshd.conf

The work is done on a qcow2 copy: only the first and last MiB and the new partition are written, so that neither size
nor compression of the system matters. The partition lies at the very end of the disk: where the disk isn't enlarged
later, a system that grows its root at first boot finds it no obstacle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from appliance.errors import ApplianceError, ImageError, StorageError
from appliance.protocol import seed as protocol
from appliance.runtime import child
from image_builder import boot_disk, fat, minimal, partition
from image_builder.fat import MIB
from image_builder.overlay import DESCRIPTION_FILE, ESP_NAME
from image_builder.partition import Table
from image_builder.seed import SeedFile
from image_builder.steps import Steps

Format = Literal["qcow2", "raw", "vmdk"]
QEMU_TIMEOUT_S = 3600.0

_SECTOR = partition.SECTOR
_NAMESPACE = uuid.UUID("5eeda991-1a0c-4e55-9c1b-0a5eed0a9913")
_UNSPECIFIC_HINT = "raw, qcow2 and vmdk (one file) are read; convert it with `qemu-img convert`"


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A disk image that somebody gave us."""

    path: Path
    format: Format
    size_bytes: int
    """Of the disk, not of the file."""
    is_plain: bool
    """qcow2 that may be copied as it is."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """A disk's partitions, and whether they are ours."""

    table: Table
    own: minimal.Description | None


def inspect(path: Path) -> Source:
    """Says what a file is, by its own beginning, and refuses what would read other files.

    Raises:
        ImageError: it is no disk image, or none that can be taken.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
            size = os.fstat(stream.fileno()).st_size
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder, a disk image is expected", hint=_UNSPECIFIC_HINT) from None
    except OSError as error:
        raise ImageError(f"the disk image {path} can't be read: {error.strerror}") from error
    form: Format = "qcow2" if head[:4] == b"QFI\xfb" else "vmdk" if head[:4] == b"KDMV" else "raw"
    if form == "raw":
        if b"# Disk DescriptorFile" in head:
            raise ImageError(f"{path} is a VMDK that only names other files", hint=_UNSPECIFIC_HINT)
        if size < 4 * MIB or size % _SECTOR or head[510:512] != b"\x55\xaa":
            raise ImageError(f"{path} is no bootable disk image, or a truncated one", hint=_UNSPECIFIC_HINT)
        return Source(path=path, format=form, size_bytes=size, is_plain=False)
    told = _qemu_info(path, form)
    specific = told.get("format-specific", {}).get("data", {})
    if "backing-filename" in told or "data-file" in specific or told.get("encrypted"):
        what = "is encrypted" if told.get("encrypted") else "leans on another file"
        raise ImageError(f"{path} {what}", hint="flatten it with `qemu-img convert -O qcow2`")
    if form == "vmdk" and any(Path(extent["filename"]).name != path.name for extent in specific.get("extents", [])):
        raise ImageError(f"{path} is a VMDK of several files", hint=_UNSPECIFIC_HINT)
    _check_whole(path, form, size)
    is_plain = form == "qcow2" and specific.get("compat") != "0.10" and not told.get("snapshots")
    return Source(path=path, format=form, size_bytes=told["virtual-size"], is_plain=is_plain)


def _qemu_info(path: Path, form: str) -> dict[str, Any]:
    try:
        ended = child.run(["qemu-img", "info", "--output=json", "-f", form, str(path)], timeout_s=60.0)
        told: dict[str, Any] = json.loads(ended.stdout)
    except (ApplianceError, ValueError) as error:
        if isinstance(error, ApplianceError) and "isn't on this machine" in error.message:
            raise
        raise ImageError(
            f"{path} is no whole {form} image: {error}", hint="get it anew, compare its checksum"
        ) from error
    return told


def _check_whole(path: Path, form: str, size: int) -> None:
    """Refuses a damaged or truncated file, which reading alone would take for zeros."""
    ended = child.run(["qemu-img", "check", "--output=json", "-f", form, str(path)], timeout_s=600.0, check=False)
    try:
        end = json.loads(ended.stdout).get("image-end-offset", 0)
    except ValueError:
        end = 0
    if ended.returncode not in {0, 3} or end > size + 65536:  # 3: leaked clusters only
        raise ImageError(
            f"{path} is damaged or truncated, {size} bytes are left of it",
            hint=f"get it anew and compare its checksum; `qemu-img check {path}` tells more",
        )


def sha256_of(path: Path) -> str:
    """Returns a file's SHA-256, hex.

    Raises:
        ImageError: it can't be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"{path} can't be read: {error.strerror}") from error


def copy(source: Source, work: Path, *, size_bytes: int, steps: Steps) -> None:
    """Makes the qcow2 to work on, of at least the source's size.

    Raises:
        ChildError: qemu-img failed.
        StorageError: the disk is full.
    """
    with steps.step(f"copy {source.path.name}", watch=work, expected_bytes=source.path.stat().st_blocks * 512):
        if source.is_plain:
            try:
                shutil.copyfile(source.path, work)
            except OSError as error:
                raise StorageError(
                    f"{source.path} could not be copied: {error.strerror}", hint="check the disk's free space"
                ) from error
        else:
            args = ["qemu-img", "convert", "-f", source.format, "-O", "qcow2", str(source.path), str(work)]
            child.run(args, timeout_s=QEMU_TIMEOUT_S)
    if size_bytes > source.size_bytes:
        child.run(["qemu-img", "resize", "-q", "-f", "qcow2", str(work), str(size_bytes)], timeout_s=60.0)


def _excerpt(disk: Path, into: Path, *, start: int, length: int, form: str = "qcow2") -> None:
    """Copies a piece of a disk (bytes, whole MiB but for the disk's end) into a raw file."""
    into.unlink(missing_ok=True)
    skip, count = start // MIB, -(-length // MIB)
    args = ["qemu-img", "dd", "-f", form, "-O", "raw", f"bs={MIB}", f"skip={skip}", f"count={skip + count}"]
    child.run([*args, f"if={disk}", f"of={into}"], timeout_s=QEMU_TIMEOUT_S)


def skeleton_of(disk: Path, skeleton: Path, *, size_bytes: int, form: str = "qcow2") -> None:
    """Writes the first MiB and the last piece of a disk into a sparse raw file of the disk's size."""
    piece = skeleton.with_name(f"{skeleton.name}.piece")
    tail = (size_bytes - 1) // MIB * MIB
    with skeleton.open("wb") as stream:
        stream.truncate(size_bytes)
        for start, length in ((0, MIB), (max(tail - MIB, 0), size_bytes - max(tail - MIB, 0))):
            _excerpt(disk, piece, start=start, length=length, form=form)
            stream.seek(start)
            stream.write(piece.read_bytes()[:length])
    piece.unlink()


def layout_of(disk: Path, *, name: str, size_bytes: int, scratch: Path, form: str = "qcow2") -> Layout:
    """Reads a disk's table, and its description where it is our own system.

    Args:
        disk: the image.
        name: how messages call it.
        size_bytes: of the disk.
        scratch: a folder for moments.
        form: of the image.

    Raises:
        ImageError: no table, or a truncated disk.
    """
    skeleton = scratch / "layout"
    skeleton_of(disk, skeleton, size_bytes=size_bytes, form=form)
    table = partition.read(skeleton, name=name, sectors=size_bytes // _SECTOR)
    skeleton.unlink()
    esp = table.named(ESP_NAME)
    if esp is None or table.named(boot_disk.ROOT_NAME) is None:
        return Layout(table=table, own=None)
    piece = scratch / "esp"
    _excerpt(disk, piece, start=esp.offset, length=esp.size_bytes, form=form)
    raw = fat.read(piece, DESCRIPTION_FILE, into=scratch, max_bytes=minimal.MAX_DESCRIPTION_BYTES)
    piece.unlink()
    if raw is None:
        raise ImageError(f"{name} looks like our own system but has no {DESCRIPTION_FILE}")
    return Layout(table=table, own=minimal.parse_description(raw))


def seed_partition(
    image: Path,
    files: Sequence[SeedFile],
    others: dict[str, Path],
    *,
    label: str,
    image_id: str,
    epoch: int,
) -> int:
    """Makes the FAT file system of a seed; returns its size in bytes.

    Args:
        image: to be made; the work lies beside it.
        files: of the seed.
        others: name to file, such as the agent's tar.
        label: CIDATA or APPL-SEED.
        image_id: its serial number follows from it.
        epoch: date of the files, seconds since 1970.
    """
    folder = image.with_name("seed-files")
    folder.mkdir(mode=0o700)
    sources = dict(others)
    for file in files:
        path = folder / file.name
        path.write_bytes(file.content)
        sources[file.name] = path
    content = sum(path.stat().st_size for path in sources.values())
    size = fat.size_for(content, files=len(sources))
    serial = int(hashlib.sha256(image_id.encode()).hexdigest()[:8], 16)
    fat.make(image, sources, label=label, size_bytes=size, serial=serial, epoch=epoch, first_sector=0)
    shutil.rmtree(folder)
    return size


def add_partition(
    work: Path, layout: Layout, image: Path, *, old_bytes: int, size_bytes: int, name: str, image_id: str
) -> int:
    """Writes a file system into a new partition at the end of the qcow2 `work`; returns its offset in bytes.

    Args:
        work: has `size_bytes` already; its table was made for `old_bytes`.
        layout: of it.
        image: the FAT file system.
        old_bytes: size of the disk that the system came on.
        size_bytes: of the disk.
        name: label and GPT name.
        image_id: the partition's GUID follows from it.

    Raises:
        ImageError: no room, or no free entry.
        ChildError: a tool failed.
    """
    length = image.stat().st_size
    sectors = size_bytes // _SECTOR
    start = partition.place_for(layout.table, name="the disk", sectors=sectors, size_bytes=length)
    skeleton = work.with_name("skeleton")
    skeleton_of(work, skeleton, size_bytes=old_bytes)
    os.truncate(skeleton, size_bytes)
    partition.add(
        skeleton,
        layout.table,
        start=start,
        size_bytes=length,
        type=protocol.OWN_TYPE if name == protocol.OWN_LABEL else partition.BASIC_DATA,
        name=name,
        guid=str(uuid.uuid5(_NAMESPACE, image_id)),
    )
    commands = [f"write -q -s {image.name} {start * _SECTOR} {length}"]
    pieces = [(0, MIB)]
    if layout.table.kind == "gpt":
        last = (sectors - partition.ALIGNMENT) * _SECTOR
        pieces.append((last, size_bytes - last))
    with skeleton.open("rb") as stream:
        for number, (at, size) in enumerate(pieces):
            stream.seek(at)
            piece = work.with_name(f"piece-{number}")
            piece.write_bytes(stream.read(size))
            commands.append(f"write -q -s {piece.name} {at} {size}")
    words = [word for command in commands for word in ("-c", command)]
    ended = child.run(["qemu-io", "-f", "qcow2", *words, work.name], timeout_s=QEMU_TIMEOUT_S, cwd=work.parent)
    if ended.stdout.strip() or ended.stderr.strip():  # qemu-io tells of failures and exits with 0
        raise StorageError(
            f"the seed partition could not be written: {(ended.stdout + ended.stderr).strip()[-500:]}",
            hint="check the disk's free space",
        )
    for path in (skeleton, *work.parent.glob("piece-*")):
        path.unlink()
    return start * _SECTOR


def convert(source: Path, target: Path, *, to: str, options: Sequence[str] = (), steps: Steps, text: str) -> None:
    """Converts a qcow2 into another format.

    Raises:
        ChildError: qemu-img failed.
    """
    _convert(source, target, form="qcow2", to=to, options=options, steps=steps, text=text)


def convert_any(source: Source, target: Path, *, to: str, steps: Steps, text: str) -> None:
    """Converts an inspected image.

    Raises:
        ChildError: qemu-img failed.
    """
    _convert(source.path, target, form=source.format, to=to, options=(), steps=steps, text=text)


def _convert(
    source: Path, target: Path, *, form: str, to: str, options: Sequence[str], steps: Steps, text: str
) -> None:
    with steps.step(text, watch=target, expected_bytes=source.stat().st_blocks * 512):
        args = ["qemu-img", "convert", "-f", form, "-O", to, *options, str(source), str(target)]
        child.run(args, timeout_s=QEMU_TIMEOUT_S)
