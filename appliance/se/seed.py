"""Stage seed on the SE: finds what the image and the VM's disks carry, and believes none of it unverified.

Two kinds of source, looked at in this order:

    image     what was given on the console (`se.given`), setting `se.seed` (directory or ISO), then
              `etc/appliance/seed` below the root: the first that holds a trust document is *the* seed; root, trust
              document, image key and cluster id come from it alone
    per VM    every other one, disks labelled `cidata` where the setting is empty, and what first boot heard as root
              (`etc/appliance/wishes`): they may add addresses, a token and hints, never an anchor (FACTS, trap 3: a
              disk attached later must not replace whom the image trusts)

What a per-VM source gets wrong is left out and told in `notes`; what the image gets wrong is an error. Files are read
with a limit each; nothing is written here.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from appliance.errors import ApplianceError, SeedError, UsageError
from appliance.paths import Paths
from appliance.pki.identity import Identity
from appliance.pki.image_key import image_key_id
from appliance.pki.trust import verify_trust
from appliance.protocol import seed as protocol
from appliance.protocol import strict_json
from appliance.protocol.address import format_endpoint, parse_endpoint
from appliance.protocol.trust import Envelope, TrustDocument
from appliance.se.identity import IMAGE_DIRECTORY
from appliance.storage.atomic import read_limited

ENROLL_PORT = 8443

_DISKS = ("dev/disk/by-label/cidata", "dev/disk/by-label/CIDATA")
_FILES = {protocol.SEED_FILE, protocol.ROOT_CA_FILE, protocol.TRUST_FILE, protocol.IMAGE_KEY_FILE}
_MAX_TRUST_FILE_BYTES = protocol.MAX_BUNDLE_BYTES
_READ = {
    protocol.SEED_FILE: protocol.MAX_SEED_BYTES,
    protocol.ROOT_CA_FILE: protocol.MAX_SEED_BYTES,
    protocol.TRUST_FILE: _MAX_TRUST_FILE_BYTES,
    protocol.IMAGE_KEY_FILE: protocol.MAX_SEED_BYTES,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedSeed:
    """A verified seed with what the VM's own disks add to it."""

    source: str
    seed: protocol.Seed
    envelope: Envelope
    """The trust document, verified by the seed's root."""
    document: TrustDocument
    image_key: Identity | None
    controllers: tuple[str, ...]
    """`host:port` of HTTPS enrollment, the image's first, then those of per-VM disks."""
    token: str
    hints: protocol.Hints
    notes: tuple[str, ...] = ()
    """What was left out and why, one sentence each."""


class _Files(Protocol):
    """Files of one source by name."""

    source: str

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """Returns the content, None where there is no such file."""


class _Directory:
    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self._path = path

    def has_seed(self) -> bool:
        return (self._path / protocol.SEED_FILE).exists()

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        try:
            return read_limited(self._path / name, max_bytes=max_bytes)
        except FileNotFoundError:
            return None


class _Iso:
    """An ISO 9660 image or disk, with Rock Ridge or Joliet names; read whole at once, as far as it concerns us."""

    def __init__(self, path: Path) -> None:
        import pycdlib  # read at first boot only; a quarter of a second of import that tunnel mode never pays

        self.source = str(path)
        self._content: dict[str, bytes] = {}
        iso = pycdlib.PyCdlib()
        try:
            with path.open("rb") as file:
                iso.open_fp(file)
                try:
                    self._read_all(iso, "rr_path" if iso.has_rock_ridge() else "joliet_path")
                finally:
                    iso.close()
        except Exception as error:  # noqa: BLE001 - foreign bytes: pycdlib raises struct and index errors on damage
            raise SeedError(
                f"{path} can't be read as an ISO image: {error}", hint="write it with `image-builder seed`"
            ) from None

    def _read_all(self, iso: Any, kind: str) -> None:
        for child in iso.list_children(**{kind: "/"}):
            if not child.is_file():
                continue
            raw = child.rock_ridge.name() if kind == "rr_path" else child.file_identifier()
            name = raw.decode("utf-8" if kind == "rr_path" else "utf-16-be").partition(";")[0]
            if name in _FILES:
                content = io.BytesIO()
                # Not more than the limit and a bit, so that `read` can tell: the length is whatever the disk says.
                limited = child.get_data_length() <= _MAX_TRUST_FILE_BYTES
                if limited:
                    iso.get_file_from_iso_fp(content, **{kind: f"/{name}"})
                self._content[name] = content.getvalue() if limited else bytes(_MAX_TRUST_FILE_BYTES + 1)

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        content = self._content.get(name)
        if content is not None and len(content) > max_bytes:
            raise SeedError(f"{name} on {self.source} is too large: at most {max_bytes} bytes are read")
        return content


class _Given:
    source = "the console"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        content = self._files.get(name)
        if content is not None and len(content) > max_bytes:
            raise SeedError(f"{name} from {self.source} has {len(content)} bytes, at most {max_bytes} are read")
        return content


def read_files(path: Path) -> dict[str, bytes]:
    """Returns the files of the seed at `path`, a directory or an ISO, that our own code reads.

    Raises:
        SeedError: there is none, or it can't be read.
    """
    if not path.exists():
        raise SeedError(f"{path} is not there", hint="name a seed's directory or ISO, or the device of its disk")
    files, found = _open(path), {}
    try:
        for name, max_bytes in _READ.items():
            content = files.read(name, max_bytes=max_bytes)
            if content is not None:
                found[name] = content
    except OSError as error:
        raise SeedError(f"{path} can't be read: {error.strerror}") from None
    if protocol.SEED_FILE not in found:
        raise SeedError(f"{path} has no {protocol.SEED_FILE}: that is no seed", hint="bake one: `image-builder seed`")
    return found


def load(paths: Paths, *, setting: str, given: Mapping[str, bytes] | None = None) -> LoadedSeed:
    """Finds and verifies the seed.

    Args:
        paths: where the image keeps it.
        setting: `se.seed`, a directory or an ISO; empty searches.
        given: the files of a seed that was given on the console.

    Raises:
        SeedError: none is there, or the image's does not hold.
    """
    notes: list[str] = []
    anchored: _Files | None = None
    local: list[_Files] = []
    told = [_Given(given)] if given else []
    for files in (*told, *_sources(paths, setting, notes)):
        if anchored is None and files.read(protocol.TRUST_FILE, max_bytes=_MAX_TRUST_FILE_BYTES) is not None:
            anchored = files
        elif files.read(protocol.SEED_FILE, max_bytes=protocol.MAX_SEED_BYTES) is not None:
            local.append(files)
    if not setting:
        local += _disks(paths, notes)
    if (wishes := _Directory(paths.root / protocol.WISHES_DIRECTORY)).has_seed():
        local.append(wishes)
    # The last one's word counts, and that of a person at the console counts most.
    local.sort(key=lambda files: files in told)
    if anchored is None:
        looked = f"{setting} and " if setting else ""
        raise SeedError(
            f"no seed with a trust document at {looked}{paths.root / IMAGE_DIRECTORY}"
            + "".join(f"; {note}" for note in notes),
            hint="bake one with `image-builder seed`, or name it in the setting se.seed",
        )
    return _with_local(_verified(anchored, notes), local, notes)


def _open(path: Path) -> _Files:
    return _Directory(path) if path.is_dir() else _Iso(path)


def _sources(paths: Paths, setting: str, notes: list[str]) -> Iterator[_Files]:
    if setting:
        if not Path(setting).exists():
            raise SeedError(f"se.seed names {setting}, which is not there", hint="correct the setting se.seed")
        yield _open(Path(setting))
    image = paths.root / IMAGE_DIRECTORY
    if image.is_dir():
        yield _Directory(image)
    elif not setting:
        notes.append(f"{image} is not there")


def _disks(paths: Paths, notes: list[str]) -> Iterator[_Files]:
    for name in _DISKS:
        disk = paths.root / name
        if disk.exists():
            try:
                yield _open(disk)
            except SeedError as error:
                notes.append(error.message)


def _required(files: _Files, name: str, *, max_bytes: int) -> bytes:
    content = files.read(name, max_bytes=max_bytes)
    if content is None:
        raise SeedError(f"the seed at {files.source} has no {name}", hint="bake it anew with `image-builder seed`")
    return content


def _read_seed(files: _Files) -> protocol.Seed:
    raw = _required(files, protocol.SEED_FILE, max_bytes=protocol.MAX_SEED_BYTES)
    seed = strict_json.decode(raw, protocol.Seed, max_bytes=protocol.MAX_SEED_BYTES)
    protocol.check_schema(seed.schema)
    return seed


def _verified(files: _Files, notes: list[str]) -> LoadedSeed:
    try:
        seed = _read_seed(files)
        root = _required(files, protocol.ROOT_CA_FILE, max_bytes=protocol.MAX_SEED_BYTES).decode("ascii", "replace")
        raw = _required(files, protocol.TRUST_FILE, max_bytes=_MAX_TRUST_FILE_BYTES)
        envelope = strict_json.decode(raw, Envelope, max_bytes=_MAX_TRUST_FILE_BYTES)
        document = verify_trust(envelope, anchors=[root], current=None)
        key = _image_key(files, seed)
    except SeedError:
        raise
    except ApplianceError as error:
        raise SeedError(
            f"the seed at {files.source} doesn't hold: {error.message}",
            hint=error.hint or "bake it anew with `image-builder seed`",
        ) from error
    if document.cluster_id != seed.cluster_id:
        raise SeedError(f"seed.json is of cluster {seed.cluster_id!r}, trust.json of {document.cluster_id!r}")
    return LoadedSeed(
        source=files.source,
        seed=seed,
        envelope=envelope,
        document=document,
        image_key=key,
        controllers=_endpoints(seed.controllers, files.source, notes),
        token=seed.token,
        hints=_hints(seed.hints, files.source, notes),
    )


def _image_key(files: _Files, seed: protocol.Seed) -> Identity | None:
    pem = files.read(protocol.IMAGE_KEY_FILE, max_bytes=protocol.MAX_SEED_BYTES)
    if pem is None or not pem.strip(b"\0"):
        return None  # scrubbed: a cut may have left the zeros
    identity = Identity.from_pkcs8(pem)
    found = image_key_id(identity.public_line)
    if found != seed.image_key_id:
        raise SeedError(f"the image key of the seed is {found}, seed.json says {seed.image_key_id!r}")
    return identity


def _endpoints(texts: list[str], source: str, notes: list[str]) -> tuple[str, ...]:
    found = []
    for text in texts:
        try:
            found.append(format_endpoint(*parse_endpoint(text, default_port=ENROLL_PORT)))
        except UsageError as error:
            notes.append(f"controller address on {source} left out: {error.message}")
    return tuple(dict.fromkeys(found))


def _hints(hints: protocol.Hints, source: str, notes: list[str]) -> protocol.Hints:
    problems = protocol.check_hints(hints)
    if problems:
        notes.append(f"hints on {source} left out: {'; '.join(problems)}")
        return protocol.Hints()
    return hints


def _with_local(loaded: LoadedSeed, local: list[_Files], notes: list[str]) -> LoadedSeed:
    for files in local:
        try:
            seed = _read_seed(files)
        except ApplianceError as error:
            notes.append(f"{files.source} left out: {error.message}")
            continue
        if seed.cluster_id not in {"", loaded.seed.cluster_id}:
            notes.append(f"{files.source} left out: it is for cluster {seed.cluster_id!r}")
            continue
        hints = _hints(seed.hints, files.source, notes)
        merged = protocol.Hints(name=hints.name or loaded.hints.name, labels={**loaded.hints.labels, **hints.labels})
        loaded = dataclasses.replace(
            loaded,
            controllers=(*loaded.controllers, *_endpoints(seed.controllers, files.source, notes)),
            token=seed.token or loaded.token,
            hints=_hints(merged, files.source, notes),
        )
    return dataclasses.replace(loaded, controllers=tuple(dict.fromkeys(loaded.controllers)), notes=tuple(notes))
