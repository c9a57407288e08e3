"""Reads an OVA as an importer would, and says what importers refuse.

The descriptor comes first, the archive is plain ustar without folders, the manifest is of SHA-256, lists every member
but itself and the signature, and is right; what the descriptor names is there, with its size; the disk is a
streamOptimized VMDK of the capacity it says.
"""

from __future__ import annotations

import hashlib
import re
import struct
import tarfile
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec

from appliance.errors import ApplianceError, ImageError
from appliance.pki.manifest_signature import check_manifest
from image_builder import ovf_structure
from image_builder.ovf_structure import OVF, RASD

MAX_TEXT_BYTES = 1024 * 1024

_LINE = re.compile(r"SHA256\(([^()]+)\)= ([0-9a-f]{64})")
_STREAM_OPTIMIZED_FLAGS = 0x30000
"""Compressed grains and markers (Virtual Disk Format 5.0, hosted sparse extent header)."""


class Ova(msgspec.Struct, frozen=True, kw_only=True):
    """What an OVA holds."""

    members: list[str]
    vmdk: str
    signer: str
    """Subject of the certificate; empty where it isn't signed."""
    transports: list[str]
    properties: list[str]
    problems: list[str]


def lint(path: Path, *, vmdk_to: Path) -> Ova:
    """Reads an OVA and puts its disk into `vmdk_to`.

    Raises:
        ImageError: it is no OVA at all; whatever else is wrong stands in `problems`.
    """
    problems: list[str] = []
    texts: dict[str, bytes] = {}
    digests: dict[str, str] = {}
    sizes: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                problems += _member_problems(member)
                stream = archive.extractfile(member)
                if stream is None:
                    continue
                digest = hashlib.sha256()
                with vmdk_to.open("wb") if member.name.endswith(".vmdk") else _nowhere() as sink:
                    kept = b""
                    while chunk := stream.read(1 << 20):
                        digest.update(chunk)
                        sink.write(chunk)
                        kept = kept + chunk if len(kept) < MAX_TEXT_BYTES else kept
                texts[member.name] = kept
                digests[member.name], sizes[member.name] = digest.hexdigest(), member.size
    except (OSError, tarfile.TarError) as error:
        raise ImageError(f"{path} can't be read as an OVA: {error}") from error
    names = list(sizes)
    if not names or not names[0].endswith(".ovf"):
        raise ImageError(f"{path} is no OVA an importer takes: the descriptor (.ovf) must be its first member")
    disks = [name for name in names if name.endswith(".vmdk")]
    if len(disks) != 1:
        raise ImageError(f"{path} holds {len(disks)} disks, one expected")
    problems += _manifest_problems(texts, digests)
    transports, properties = _read_descriptor(texts[names[0]], sizes, _capacity(texts[disks[0]], problems), problems)
    signer = _signer(texts, problems)
    return Ova(
        members=names, vmdk=disks[0], signer=signer, transports=transports, properties=properties, problems=problems
    )


class _nowhere:  # noqa: N801 - used like open()
    """A sink."""

    def __enter__(self) -> _nowhere:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def write(self, content: bytes) -> int:
        """Takes it."""
        return len(content)


def _member_problems(member: tarfile.TarInfo) -> list[str]:
    problems = []
    if not member.isreg() or "/" in member.name or not re.fullmatch(r"[ -~]+", member.name):
        problems.append(f"member {member.name!r}: plain files with plain ASCII names, outside of folders, expected")
    if member.pax_headers:
        problems.append(f"member {member.name!r} has pax headers, importers read plain ustar")
    return problems


def _manifest_problems(texts: dict[str, bytes], digests: dict[str, str]) -> list[str]:
    manifests = [name for name in texts if name.endswith(".mf")]
    if len(manifests) != 1:
        return [f"{len(manifests)} manifests (.mf), one expected"]
    name = manifests[0]
    problems, listed = [], {}
    for line in texts[name].decode("ascii", "replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(f"manifest line {line[:80]!r}: exactly 'SHA256(name)= hex' expected")
        else:
            listed[match[1]] = match[2]
    expected = {one for one in texts if not one.endswith((".mf", ".cert"))}
    problems += [f"the manifest lists {one!r}, which isn't to be listed" for one in sorted(set(listed) - expected)]
    problems += [f"the manifest doesn't list {one!r}" for one in sorted(expected - set(listed))]
    problems += [
        f"{one!r} has the SHA-256 {digests[one]}, the manifest says {digest}"
        for one, digest in listed.items()
        if one in digests and digests[one] != digest
    ]
    return problems


def _capacity(vmdk: bytes, problems: list[str]) -> int:
    if len(vmdk) < 512 or vmdk[:4] != b"KDMV":
        problems.append("the disk is no VMDK")
        return 0
    _, _, flags, sectors = struct.unpack_from("<4sIIQ", vmdk)
    if flags & _STREAM_OPTIMIZED_FLAGS != _STREAM_OPTIMIZED_FLAGS:
        problems.append("the disk's VMDK is not streamOptimized")
    return int(sectors) * 512


def _read_descriptor(
    raw: bytes, sizes: dict[str, int], capacity: int, problems: list[str]
) -> tuple[list[str], list[str]]:
    if b"<!DOCTYPE" in raw or len(raw) > MAX_TEXT_BYTES:
        problems.append("the descriptor has a DOCTYPE or is too long")
        return [], []
    try:
        envelope = ET.fromstring(raw)  # noqa: S314 - see the import
    except ET.ParseError as error:
        problems.append(f"the descriptor is no XML: {error}")
        return [], []
    if envelope.tag != f"{OVF}Envelope":
        problems.append(f"the descriptor's root is {envelope.tag}, an OVF 1.x Envelope expected")
        return [], []
    problems += ovf_structure.check(envelope)
    _check_disks(envelope, sizes, capacity, problems)
    hardware = next(envelope.iter(f"{OVF}VirtualHardwareSection"), None)
    transports = (hardware.get(f"{OVF}transport", "") if hardware is not None else "").split()
    properties = [one.get(f"{OVF}key", "") for one in envelope.iter(f"{OVF}Property")]
    if len(set(properties)) != len(properties):
        problems.append("a property stands twice in the descriptor")
    if properties and not transports:
        problems.append("the descriptor has properties and no transport that brings them into the VM")
    return transports, properties


def _check_disks(envelope: ET.Element, sizes: dict[str, int], capacity: int, problems: list[str]) -> None:
    files = {one.get(f"{OVF}id"): one for one in envelope.iter(f"{OVF}File")}
    for one in files.values():
        href, size = one.get(f"{OVF}href", ""), one.get(f"{OVF}size", "")
        if str(sizes.get(href, "absent")) != size:
            problems.append(f"the descriptor says {href!r} has {size} bytes, in the archive it is {sizes.get(href)}")
    disks = {one.get(f"{OVF}diskId"): one for one in envelope.iter(f"{OVF}Disk")}
    for name, one in disks.items():
        if one.get(f"{OVF}fileRef") not in files:
            problems.append(f"disk {name!r} refers to a file that the descriptor doesn't list")
        if capacity and one.get(f"{OVF}capacity") != str(capacity):
            problems.append(f"disk {name!r} has the capacity {one.get(f'{OVF}capacity')}, its VMDK has {capacity}")
    attached = [one.text or "" for one in envelope.iter(f"{RASD}HostResource")]
    problems += [f"{text!r} is no disk of the descriptor" for text in attached if text.rpartition("/")[2] not in disks]
    ids = [one.text for one in envelope.iter(f"{RASD}InstanceID")]
    if len(set(ids)) != len(ids):
        problems.append("two items of the virtual hardware have the same InstanceID")
    if {one.text for one in envelope.iter(f"{RASD}Parent")} - set(ids):
        problems.append("an item of the virtual hardware has a Parent that isn't there")


def _signer(texts: dict[str, bytes], problems: list[str]) -> str:
    certificates = [name for name in texts if name.endswith(".cert")]
    manifest = next((name for name in texts if name.endswith(".mf")), None)
    if not certificates or manifest is None:
        return ""
    try:
        return check_manifest(texts[manifest], name=manifest, signed=texts[certificates[0]])
    except ApplianceError as error:
        problems.append(error.message)
        return ""
