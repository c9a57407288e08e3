"""Our own minimal system, from packages to a finished disk: what `image-builder base` does, and `build` without a base.

Two layers are kept in a cache, since packages take a minute and the agent changes more often than they do:

    tree-<digest>.tar       packages, whatever the role       digest of packages, sources and settings
    system-<digest>.qcow2   the finished disk                 digest of the tree's key, role, agent, overlay and size

A newer state of the package archive doesn't change a digest: `--fresh` fetches it. One builder at a time makes layers
for a cache; a second that wants the same finds it done. What was used within the hour is never cleared away, since
another builder may be reading it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from appliance import __version__
from appliance.errors import ApplianceError, ImageError, StorageError
from appliance.protocol import strict_json
from appliance.runtime import child
from image_builder import agent as agent_files
from image_builder import boot_disk, debian, overlay, private_keys
from image_builder.agent import Agent
from image_builder.output import Draft, publish
from image_builder.overlay import Role
from image_builder.steps import Steps

TREE_FORM = 2
SYSTEM_FORM = 7
"""Raised when the same inputs make another tree or disk than before."""
DEFAULT_EPOCH = 1_700_000_000
KEPT = 3
"""Cache entries of each kind, beside those in use."""
IN_USE_S = 3600.0
"""After its last use: longer than any build reads it."""
MAX_DESCRIPTION_BYTES = 1024 * 1024


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """`appliance-image.json` on the boot partition and below /usr/lib: what this system is."""

    schema: int = 1
    role: Role
    digest: str
    """Of everything that it was made from, hex."""
    release: str
    epoch: int
    builder_version: str
    agent_version: str
    agent_digest: str
    packages: list[debian.Package]
    published_keys: list[str]
    """Digests of private keys that Debian's packages carry, known to the world (`private_keys.note`)."""


class System(msgspec.Struct, frozen=True, kw_only=True):
    """A finished disk in the cache."""

    path: Path
    """qcow2."""
    description: Description


def cache_directory() -> Path:
    """Returns where layers are kept by default (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "image-builder"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def install_packages(
    *, sources: Sequence[Path], extra: Sequence[str] = (), epoch: int, cache: Path, fresh: bool, steps: Steps
) -> Path:
    """Returns the tree of packages that `make` with the same arguments takes, from the cache where it is there.

    Raises:
        ImageError: this machine lacks a tool.
        ChildError: a tool failed.
        StorageError: the cache can't be written.
    """
    texts = debian.sources(sources)
    tree = cache / f"tree-{_tree_key(texts, extra, epoch)}.tar"
    with _alone(cache, steps):
        if fresh or not tree.exists():
            _check_tools()
            with _draft(cache) as draft:
                _install(draft, tree, texts, extra=extra, epoch=epoch, steps=steps)
        tree.touch()
    return tree


def make(
    role: Role,
    agent: Agent,
    *,
    sources: Sequence[Path],
    extra: Sequence[str] = (),
    epoch: int,
    size_bytes: int,
    cache: Path,
    fresh: bool,
    steps: Steps,
) -> System:
    """Returns the system, from the cache where it is there.

    Args:
        role: who will live on it.
        agent: goes in.
        sources: files of apt sources; empty takes this machine's.
        extra: packages besides our own.
        epoch: date of everything in it, seconds since 1970.
        size_bytes: of the disk, whole MiB.
        cache: where layers are kept.
        fresh: install the packages anew.
        steps: is told what goes on.

    Raises:
        ImageError: the parts don't fit each other.
        ChildError: a tool failed or isn't here.
        StorageError: the cache can't be written.
    """
    texts = debian.sources(sources)
    units = overlay.units_of(agent)
    tree_key = _tree_key(texts, extra, epoch)
    # both versions of OpenSSH stand for the overlay's text, since the tree's own isn't known before it is there
    layout = [
        overlay.places(role, root_guid="", openssh=version, units=units) for version in ((0, 0), overlay.EXEMPT_SINCE)
    ]
    parts = [SYSTEM_FORM, tree_key, role, agent.digest, size_bytes, msgspec.to_builtins(layout)]
    key = _digest(parts)
    finished = cache / f"system-{key}.qcow2"
    with _alone(cache, steps):
        if finished.exists() and not fresh:
            steps.note(f"the system comes from the cache, {finished}")
            finished.touch()
            return System(path=finished, description=_read_description(finished))
        _check_tools()
        with _draft(cache) as draft:
            tree = cache / f"tree-{tree_key}.tar"
            if fresh or not tree.exists():
                _install(draft, tree, texts, extra=extra, epoch=epoch, steps=steps)
            tree.touch()
            description = _assemble(draft, tree, role, agent, key=key, size_bytes=size_bytes, epoch=epoch, steps=steps)
            packed = draft / "system.qcow2"
            with steps.step("compress the system", watch=packed, expected_bytes=260 << 20):
                # zstd, since QEMU 5.1: five times as fast as zlib, and no larger
                form = ["-O", "qcow2", "-c", "-o", "compression_type=zstd"]
                args = ["qemu-img", "convert", "-f", "raw", *form, str(draft / "system.raw"), str(packed)]
                child.run(args, timeout_s=900.0)
            told = finished.with_suffix(".json")
            for target in (finished, told):
                target.unlink(missing_ok=True)
            (draft / "told").write_bytes(strict_json.encode(description))
            publish({draft / "told": told, packed: finished}, modes={})
        _prune(cache, now=time.time())
    return System(path=finished, description=description)


def _tree_key(texts: dict[str, str], extra: Sequence[str], epoch: int) -> str:
    return _digest({"form": TREE_FORM, "epoch": epoch, **debian.recipe(texts, extra)})


@contextlib.contextmanager
def _alone(cache: Path, steps: Steps) -> Iterator[None]:
    """Keeps other builders from changing the cache meanwhile; the kernel ends that when the process ends."""
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o755)
        descriptor = os.open(cache / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"the cache {cache} can't be made: {error.strerror}", hint="name one by --cache") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with steps.step("wait for another builder to be done with the cache"):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_tools() -> None:
    problems = boot_disk.missing_tools()
    if problems:
        raise ImageError("\n  - ".join(["this machine can't build a system:", *problems]))


@contextlib.contextmanager
def _draft(cache: Path) -> Iterator[Path]:
    with Draft(cache) as draft:
        if os.geteuid() != 0:
            draft.chmod(0o711)  # apt's sources are read in a user name space
        yield draft


def _install(draft: Path, tree: Path, texts: dict[str, str], *, extra: Sequence[str], epoch: int, steps: Steps) -> None:
    made = draft / "tree.tar"
    debian.install(made, texts, extra=extra, epoch=epoch, steps=steps)
    made.replace(tree)


def _assemble(
    draft: Path, tree: Path, role: Role, agent: Agent, *, key: str, size_bytes: int, epoch: int, steps: Steps
) -> Description:
    try:
        with tarfile.open(tree) as content:
            packages = debian.packages(content)
    except (OSError, tarfile.TarError) as error:
        raise ImageError(f"the cached {tree} can't be read: {error}", hint="build it anew with --fresh") from error
    versions = {package.name: debian.upstream(package.version) for package in packages}
    if versions.get("libc6", (0, 0)) < agent.glibc:
        have, need = (".".join(map(str, version)) for version in (versions.get("libc6", (0, 0)), agent.glibc))
        raise ImageError(
            f"the system's glibc is {have}, the agent in {agent.directory} needs {need}",
            hint=f"build the agent on Debian {debian.RELEASE}",
        )
    guids = boot_disk.Guids.derive(key)
    description = Description(
        role=role,
        digest=key,
        release=debian.RELEASE,
        epoch=epoch,
        builder_version=__version__,
        agent_version=agent.version,
        agent_digest=agent.digest,
        packages=packages,
        published_keys=private_keys.published(tree),
    )
    raw = strict_json.encode(description)
    places = overlay.places(
        role, root_guid=guids.root, openssh=versions.get("openssh-server", (0, 0)), units=overlay.units_of(agent)
    )
    overlay.write(draft / "overlay.tar", places, agent, description=raw, epoch=epoch)
    boot_disk.assemble(
        draft / "system.raw",
        tree=tree,
        overlay=draft / "overlay.tar",
        description=raw,
        role=role,
        guids=guids,
        size_bytes=size_bytes,
        epoch=epoch,
        steps=steps,
    )
    return description


def _read_description(finished: Path) -> Description:
    path = finished.with_suffix(".json")
    try:
        return parse_description(path.read_bytes())
    except (OSError, ApplianceError) as error:
        raise ImageError(f"the cached {path} can't be read: {error}", hint="build it anew with --fresh") from error


def parse_description(raw: bytes) -> Description:
    """Reads `appliance-image.json`.

    Raises:
        ApplianceError: it isn't one.
    """
    return strict_json.decode(raw, Description, max_bytes=MAX_DESCRIPTION_BYTES)


def _prune(cache: Path, *, now: float) -> None:
    for pattern in ("tree-*.tar", "system-*.qcow2"):
        entries = sorted(cache.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in entries[KEPT:]:
            if now - path.stat().st_mtime < IN_USE_S:
                continue
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)


def copy_out(system: System, target: Path, *, form: str, steps: Steps) -> None:
    """Writes the system as a file of its own: `qcow2` (compressed) or `raw`.

    Raises:
        ChildError: qemu-img failed.
        StorageError: it can't be written.
    """
    with Draft(target.absolute().parent) as draft:
        made = draft / "disk"
        with steps.step(f"write {target.name}", watch=made, expected_bytes=system.path.stat().st_blocks * 512):
            if form == "qcow2":
                try:
                    shutil.copyfile(system.path, made)
                except OSError as error:
                    raise StorageError(f"{target} can't be written: {error.strerror}") from error
            else:
                args = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(system.path), str(made)]
                child.run(args, timeout_s=900.0)
        publish({made: target}, modes={})


def default_agent() -> Path:
    """Returns where the agent is looked for when nobody names it: beside this frozen program, else dist/."""
    own = Path(child.self_command()[0])
    for candidate in (own.parent.parent / "appliance", Path("dist/appliance")):
        if (candidate / agent_files.PROGRAM).is_file() and (candidate / "_internal").is_dir():
            return candidate
    return Path("dist/appliance")
