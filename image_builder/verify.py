"""Opens a finished image and says what is baked in; refuses what must not be there.

Refused: any private key but the seed's own image key, wherever it lies; a seed that doesn't hold together; a damaged
disk; an OVA that importers refuse. Nothing is compared with a controller: that takes one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from appliance.errors import ApplianceError, ImageError
from appliance.pki import certificate, image_key, trust
from appliance.pki.identity import Identity
from appliance.protocol import seed as protocol
from appliance.protocol import strict_json
from appliance.protocol.trust import Envelope
from image_builder import agent as agent_files
from image_builder import disk, fat, iso, ova_lint, private_keys, scan
from image_builder.disk import Layout
from image_builder.minimal import Description
from image_builder.output import Draft
from image_builder.partition import Partition
from image_builder.steps import Steps

Form = Literal["qcow2", "raw", "vmdk", "ova", "iso"]
MAX_FILE_BYTES = protocol.MAX_BUNDLE_BYTES
_SEED_FILES = (
    protocol.SEED_FILE,
    protocol.ROOT_CA_FILE,
    protocol.TRUST_FILE,
    protocol.IMAGE_KEY_FILE,
    protocol.USER_DATA_FILE,
    protocol.META_DATA_FILE,
)


class Baked(msgspec.Struct, frozen=True, kw_only=True):
    """What is baked into an image."""

    file: str
    form: Form
    sha256: str
    role: str = ""
    """Of our own system; empty where it is another."""
    agent_version: str = ""
    system: str = ""
    """`minimal:<digest>`, `foreign` or empty (a seed alone)."""
    seed_on: str = ""
    """Label of the partition or volume."""
    image_id: str = ""
    cluster_id: str = ""
    root_fingerprint: str = ""
    image_key_id: str = ""
    baked_at: int = 0
    controllers: list[str] = []
    digests: dict[str, str] = {}
    """File of the seed to SHA-256; never that of the image key."""
    ova_properties: list[str] = []
    ova_signer: str = ""
    system_keys: int = 0
    """How many private keys came with the system; packages carry some that are known to the world."""
    problems: list[str] = []
    """Why it is refused; empty where it holds."""


def form_of(path: Path) -> Form:
    """Says what a file is by its content.

    Raises:
        ImageError: it can't be read.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
            stream.seek(32769)
            if stream.read(5) == b"CD001":
                return "iso"
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder, an image is expected") from None
    except OSError as error:
        raise ImageError(f"{path} can't be read: {error.strerror}") from error
    if head[257:262] == b"ustar":
        return "ova"
    return "qcow2" if head[:4] == b"QFI\xfb" else "vmdk" if head[:4] == b"KDMV" else "raw"


def verify(path: Path, *, steps: Steps, scratch: Path | None = None) -> Baked:
    """Reads an image; what is wrong with it stands in `problems`.

    Args:
        path: qcow2, raw, VMDK, OVA or ISO.
        steps: is told what goes on.
        scratch: where room for the unpacked disk is; a temporary folder beside the image by default.

    Raises:
        ImageError: it can't be read at all.
        ChildError: a tool failed or isn't here.
    """
    form = form_of(path)
    baked = Baked(file=path.name, form=form, sha256=disk.sha256_of(path))
    problems: list[str] = []
    with Draft(scratch or path.absolute().parent) as draft:
        if form == "iso":
            files = iso.read(path, max_bytes=MAX_FILE_BYTES)
            baked = _with_seed(baked, files, label=protocol.ISO_LABEL, problems=problems)
            return _with_keys(baked, path, files, known=[], problems=problems, steps=steps)
        content = path
        if form == "ova":
            content = draft / "disk.vmdk"
            with steps.step(f"read {path.name}", watch=content, expected_bytes=path.stat().st_size):
                found = ova_lint.lint(path, vmdk_to=content)
            problems += found.problems
            baked = msgspec.structs.replace(baked, ova_properties=found.properties, ova_signer=found.signer)
        source = disk.inspect(content)
        raw = content
        if source.format != "raw":
            raw = draft / "raw"
            disk.convert_any(source, raw, to="raw", steps=steps, text=f"unpack {path.name}")
        layout = disk.layout_of(raw, name=path.name, size_bytes=source.size_bytes, scratch=draft, form="raw")
        baked = _with_system(baked, layout)
        known = layout.own.published_keys if layout.own is not None else []
        present: dict[str, bytes] = {}
        place = _seed_place(raw, layout, draft)
        if place is not None:
            partition, label = place
            found_files = {name: _file(raw, partition, name, draft) for name in _SEED_FILES}
            present = {name: text for name, text in found_files.items() if text is not None}
            told = _file(raw, partition, agent_files.DESCRIPTION_FILE, draft)
            if told is not None and layout.own is None:
                beside = agent_files.read_description(told)
                baked = msgspec.structs.replace(baked, agent_version=beside.version)
                known = beside.system_keys
            if protocol.SEED_FILE in present:
                baked = _with_seed(baked, present, label=label, problems=problems)
        elif layout.own is None:
            problems.append("there is no seed on it: neither our own system nor a partition CIDATA")
        return _with_keys(baked, raw, present, known=known, problems=problems, steps=steps)


def _file(raw: Path, partition: Partition, name: str, scratch: Path) -> bytes | None:
    return fat.read(raw, name, offset=partition.offset, into=scratch, max_bytes=MAX_FILE_BYTES)


def _with_system(baked: Baked, layout: Layout) -> Baked:
    own: Description | None = layout.own
    if own is None:
        return msgspec.structs.replace(baked, system="foreign")
    return msgspec.structs.replace(
        baked, role=own.role, agent_version=own.agent_version, system=f"minimal:{own.digest}"
    )


def _seed_place(raw: Path, layout: Layout, scratch: Path) -> tuple[Partition, str] | None:
    """Returns the seed's partition: on our own system that of our own type, elsewhere the last FAT with user-data."""
    table = layout.table
    own = [one for one in table.of_type(protocol.OWN_TYPE) if one.name == protocol.OWN_LABEL]
    if own:
        return own[0], protocol.OWN_LABEL
    for partition in sorted(table.partitions, key=lambda one: -one.start):
        if partition.name in {"", protocol.ISO_LABEL} and _file(raw, partition, protocol.USER_DATA_FILE, scratch):
            return partition, protocol.ISO_LABEL
    return None


def _with_seed(baked: Baked, files: dict[str, bytes], *, label: str, problems: list[str]) -> Baked:
    missing = [name for name in _SEED_FILES if name not in files]
    if missing:
        problems.append(f"the seed has no {', '.join(missing)}")
        return msgspec.structs.replace(baked, seed_on=label)
    try:
        found = strict_json.decode(files[protocol.SEED_FILE], protocol.Seed, max_bytes=protocol.MAX_SEED_BYTES)
        protocol.check_schema(found.schema)
        root = files[protocol.ROOT_CA_FILE].decode("ascii", "replace")
        terms = certificate.certificate_terms(root)
        envelope = strict_json.decode(files[protocol.TRUST_FILE], Envelope, max_bytes=MAX_FILE_BYTES)
        document = trust.verify_trust(envelope, anchors=[root], current=None)
        key_id = image_key.image_key_id(Identity.from_pkcs8(files[protocol.IMAGE_KEY_FILE]).public_line)
    except ApplianceError as error:
        problems.append(f"the seed doesn't hold: {error.message}")
        return msgspec.structs.replace(baked, seed_on=label)
    if document.cluster_id != found.cluster_id:
        problems.append(f"seed.json is of cluster {found.cluster_id!r}, trust.json of {document.cluster_id!r}")
    if key_id != found.image_key_id:
        problems.append(f"the image key is {key_id}, seed.json says {found.image_key_id!r}")
    digests = {name: scan.sha256(content) for name, content in sorted(files.items()) if name != protocol.IMAGE_KEY_FILE}
    return msgspec.structs.replace(
        baked,
        seed_on=label,
        image_id=found.image_id,
        cluster_id=found.cluster_id,
        root_fingerprint=terms.fingerprint,
        image_key_id=found.image_key_id,
        baked_at=found.baked_at,
        controllers=found.controllers,
        digests=digests,
    )


def _with_keys(
    baked: Baked, content: Path, seed: dict[str, bytes], *, known: list[str], problems: list[str], steps: Steps
) -> Baked:
    with steps.step("look for private keys"):
        found = scan.look_through(content)
        notes = [(private_keys.note(key), key.offset) for key in found.keys]
    cluster = private_keys.of_certificates(found.certificates)
    if baked.cluster_id:
        root = seed[protocol.ROOT_CA_FILE].decode("ascii", "replace")
        envelope = strict_json.decode(seed[protocol.TRUST_FILE], Envelope, max_bytes=MAX_FILE_BYTES)
        cluster |= private_keys.of_cluster(root, trust.verify_trust(envelope, anchors=[root], current=None))
    problems += private_keys.problems(notes, cluster=cluster, image_key=baked.image_key_id, known=known)
    came = len([key for key, _ in notes if key.digest in known])
    return msgspec.structs.replace(baked, problems=problems, system_keys=came)
