"""The SE agent as it goes into images: the directory form that the build freezes, as a tar and with what it needs."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from appliance.errors import ApplianceError, ImageError
from appliance.protocol import strict_json
from appliance.runtime import child

PROGRAM = "appliance"
DESCRIPTION_FILE = "agent.json"
"""On a seed partition: which agent lies beside it."""
UNITS = Path("_internal/appliance/cli/units")
_GLIBC = re.compile(rb"GLIBC_(\d+)\.(\d+)")
_HINT = "name the directory form, such as dist/appliance, which scripts/build makes"


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in a directory form."""

    directory: Path
    version: str
    glibc: tuple[int, int]
    """The oldest it runs with."""
    digest: str
    """SHA-256 over names, modes and contents of all files, hex."""
    size_bytes: int
    files: int


def _entries(directory: Path) -> Iterator[Path]:
    """Yields everything below `directory` in one order on every machine."""
    yield from sorted(directory.rglob("*"), key=lambda path: path.relative_to(directory).as_posix().encode())


def load(directory: Path) -> Agent:
    """Reads a directory form.

    Raises:
        ImageError: it is none, or doesn't run here.
    """
    program = directory / PROGRAM
    if not program.is_file() or not os.access(program, os.X_OK) or not (directory / "_internal").is_dir():
        raise ImageError(f"{directory} doesn't hold the agent: {PROGRAM} and _internal expected in it", hint=_HINT)
    digest = hashlib.sha256()
    needed, size, files = (2, 0), 0, 0
    try:
        for path in _entries(directory):
            name = path.relative_to(directory).as_posix()
            if path.is_symlink():
                digest.update(f"link {name} {path.readlink()}\n".encode())
            elif path.is_file():
                content = path.read_bytes()
                digest.update(f"file {name} {_mode(path):o} {hashlib.sha256(content).hexdigest()}\n".encode())
                size, files = size + len(content), files + 1
                if content.startswith(b"\x7fELF"):
                    versions = ((int(major), int(minor)) for major, minor in _GLIBC.findall(content))
                    needed = max(needed, max(versions, default=needed))
        version = child.run([str(program.absolute()), "version"], timeout_s=60.0).stdout.split()[-1]
    except (OSError, IndexError, ApplianceError) as error:
        raise ImageError(f"the agent in {directory} can't be used: {error}", hint=_HINT) from error
    return Agent(
        directory=directory, version=version, glibc=needed, digest=digest.hexdigest(), size_bytes=size, files=files
    )


def _mode(path: Path) -> int:
    return 0o755 if path.stat().st_mode & 0o111 else 0o644


def add_to(archive: tarfile.TarFile, agent: Agent, *, prefix: str, epoch: int) -> None:
    """Adds the agent's files to a tar: owned by root, dated `epoch`, in one order."""
    top = tarfile.TarInfo(prefix)
    top.type, top.mode, top.mtime = tarfile.DIRTYPE, 0o755, epoch
    archive.addfile(top)
    for path in _entries(agent.directory):
        member = tarfile.TarInfo(f"{prefix}/{path.relative_to(agent.directory).as_posix()}")
        member.mtime = epoch
        if path.is_symlink():
            member.type, member.linkname, member.mode = tarfile.SYMTYPE, str(path.readlink()), 0o777
            archive.addfile(member)
        elif path.is_dir():
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(member)
        else:
            member.mode, member.size = _mode(path), path.stat().st_size
            with path.open("rb") as stream:
                archive.addfile(member, stream)


def write_tar(path: Path, agent: Agent, *, epoch: int) -> None:
    """Writes the agent as `appliance/…` into a tar of its own: the same bytes for the same agent."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add_to(archive, agent, prefix="appliance", epoch=epoch)


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """`agent.json` on the seed partition of a foreign system: what lies beside it, and what was there before."""

    version: str
    tree_sha256: str
    glibc: str
    system_keys: list[str]
    """Digests of private keys that the system came with (`private_keys.note`)."""


def describe(agent: Agent, *, system_keys: list[str]) -> bytes:
    """Returns what `agent.json` says."""
    glibc = ".".join(map(str, agent.glibc))
    told = Beside(version=agent.version, tree_sha256=agent.digest, glibc=glibc, system_keys=system_keys)
    return msgspec.json.format(msgspec.json.encode(told), indent=1) + b"\n"


def read_description(raw: bytes) -> Beside:
    """Reads an `agent.json`.

    Raises:
        ImageError: it isn't one.
    """
    try:
        return msgspec.json.decode(raw, type=Beside)
    except strict_json.UNDECODABLE as error:
        raise ImageError(f"{DESCRIPTION_FILE} on the seed partition can't be read: {error}") from error
