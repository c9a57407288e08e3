"""What the disks of one VM, and its hypervisor, may wish for: addresses, a name, labels, a token, network, log-in key.

Bytes in, values out. None of it is an anchor of trust, so whoever attaches a disk can't choose whom the VM believes:

1. `seed.json` on a disk labelled `cidata` gives addresses, a token and hints; its trust files and its user-data are
   left alone and told. One that names another cluster than the image's is left out. The host name is that of its
   meta-data, else the hints' name.
2. `network-config` there is taken in the form that image-builder writes, field by field; any other form is left out.
3. An OVF environment gives what `protocol.ovf` reads. It is heard last, so its word counts.
4. What is wrong is left out and told in a sentence; the rest counts.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from appliance.errors import ApplianceError
from appliance.machine.media import Medium
from appliance.protocol import ovf, strict_json
from appliance.protocol import seed as protocol

LOCAL_HOSTNAME = re.compile(r'^local-hostname: *"?([A-Za-z0-9][A-Za-z0-9-]{0,62})"? *$', re.MULTILINE)
"""In meta-data as image-builder writes them."""
_LABEL = "cidata"
_MANAGEMENT = "eth0"
"""The first card of our own system (net.ifnames=0)."""
NAMES = (
    protocol.SEED_FILE, protocol.TRUST_FILE, protocol.META_DATA_FILE, protocol.NETWORK_CONFIG_FILE, ovf.FILE_NAME,
)  # fmt: skip
"""Files that are looked for on attached disks."""
MAX_BYTES = protocol.MAX_SEED_BYTES


class _Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    to: str
    via: str


class _Servers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    addresses: list[str]


class _Match(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class _Ethernet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    match: _Match | None = None
    dhcp4: bool = False
    addresses: list[str] = []
    routes: list[_Route] = []
    nameservers: _Servers | None = None


class _Vlan(_Ethernet, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    id: int
    link: str


class _Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Network config version 2 of cloud-init, as far as image-builder writes it."""

    version: int
    ethernets: dict[str, _Ethernet]
    vlans: dict[str, _Vlan] = {}


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """All wishes together; empty is: none."""

    controllers: list[str] = []
    token: str = ""
    hints: protocol.Hints = protocol.Hints()
    hostname: str = ""
    operator_key: str = ""
    """One line in OpenSSH's form, checked."""
    network: bytes = b""
    """A whole `network-config`."""
    sources: list[str] = []
    notes: list[str] = []
    """What was left out and why, one sentence each."""

    def __repr__(self) -> str:
        return f"Wishes(from {', '.join(self.sources) or 'nobody'})"

    def seed(self, *, cluster_id: str, at: int) -> protocol.Seed | None:
        """Returns them as a seed without trust for the SE's daemon; None where there is nothing for it."""
        if not (self.controllers or self.token or self.hints != protocol.Hints()):
            return None
        return protocol.Seed(
            schema=protocol.SCHEMA, cluster_id=cluster_id, image_key_id="", image_id="", baked_at=at,
            controllers=self.controllers, token=self.token, hints=self.hints,
        )  # fmt: skip


def gather(media: Sequence[Medium], environments: Sequence[tuple[str, bytes]], *, cluster_id: str) -> Wishes:
    """Reads all sources.

    Args:
        media: attached disks.
        environments: source and document of OVF environments that came another way than on a disk.
        cluster_id: of the image's own seed; "" where that isn't known.
    """
    wishes = Wishes()
    for medium in media:
        if medium.label.lower() == _LABEL:
            wishes = _with_disk(wishes, medium, cluster_id)
    documents = [(medium.source, medium.files[ovf.FILE_NAME]) for medium in media if ovf.FILE_NAME in medium.files]
    for source, document in (*documents, *environments):
        wishes = _with_environment(wishes, source, document)
    return wishes


def _told(wishes: Wishes, source: str, problems: Sequence[str], **changed: Any) -> Wishes:
    notes = [*wishes.notes, *(f"{source}: {problem}" for problem in problems)]
    return msgspec.structs.replace(wishes, notes=notes, sources=[*wishes.sources, source], **changed)


def _with_disk(wishes: Wishes, medium: Medium, cluster_id: str) -> Wishes:
    problems: list[str] = []
    if protocol.TRUST_FILE in medium.files:
        problems.append("its trust document is left alone: the image's own seed says whom to trust")
    changed: dict[str, Any] = {}
    raw = medium.files.get(protocol.NETWORK_CONFIG_FILE)
    if raw is not None:
        try:
            changed["network"] = checked_network(raw)
        except ValueError as error:
            problems.append(f"network-config left out: {error}")
    raw = medium.files.get(protocol.SEED_FILE)
    if raw is not None:
        try:
            seed = strict_json.decode(raw, protocol.Seed, max_bytes=MAX_BYTES)
            protocol.check_schema(seed.schema)
        except ApplianceError as error:
            return _told(
                wishes, medium.source, [*problems, f"{protocol.SEED_FILE} left out: {error.message}"], **changed
            )
        if cluster_id and seed.cluster_id not in {"", cluster_id}:
            return _told(wishes, medium.source, [*problems, f"left out: it is for cluster {seed.cluster_id!r}"])
        wrong = protocol.check_hints(seed.hints)
        problems += [f"hints left out: {one}" for one in wrong]
        changed |= {
            "controllers": list(dict.fromkeys([*wishes.controllers, *seed.controllers])),
            "token": seed.token or wishes.token,
            "hints": wishes.hints if wrong else seed.hints,
        }
        named = meta_host_name(medium.files.get(protocol.META_DATA_FILE, b"")) or host_name(changed["hints"].name)
        changed["hostname"] = named or wishes.hostname
    return _told(wishes, medium.source, problems, **changed)


def _with_environment(wishes: Wishes, source: str, document: bytes) -> Wishes:
    try:
        told, problems = ovf.read_properties(ovf.parse_environment(document))
    except ApplianceError as error:
        return _told(wishes, source, [error.message])
    changed: dict[str, Any] = {
        "controllers": list(dict.fromkeys([*wishes.controllers, *told.controllers])),
        "token": told.token or wishes.token,
    }
    if told.hostname:
        changed["hints"] = protocol.Hints(name=told.hostname, labels=wishes.hints.labels)
        changed["hostname"] = host_name(told.hostname)
    if told.operator_key:
        from appliance.pki import ssh_keys  # no boot without such a key waits for a library of cryptography

        try:
            ssh_keys.parse_public(" ".join(told.operator_key.split()[:2]))
            changed["operator_key"] = told.operator_key
        except ApplianceError as error:
            problems = [*problems, f"OVF property 'operator_key': {error.message}"]
    if told.address or told.dns:
        changed["network"] = _network_of(told)
    return _told(wishes, source, problems, **changed)


def host_name(name: str) -> str:
    """Returns the host name (RFC 1123) that a name gives."""
    return name.replace("_", "-").replace(".", "-").strip("-").lower()


def meta_host_name(meta_data: bytes) -> str:
    """Returns the host name that meta-data give, "" where they give none, or the one that stands for none."""
    found = LOCAL_HOSTNAME.search(meta_data.decode("utf-8", "replace"))
    return "" if found is None or found[1] == protocol.DEFAULT_HOSTNAME else found[1]


def _network_of(told: ovf.Told) -> bytes:
    card = _Ethernet(
        dhcp4=not told.address,
        addresses=[told.address] if told.address else [],
        routes=[_Route("::/0" if ":" in told.gateway else "0.0.0.0/0", told.gateway)] if told.gateway else [],
        nameservers=_Servers(told.dns) if told.dns else None,
    )
    return _rendered(_Network(version=2, ethernets={_MANAGEMENT: card}))


def _rendered(network: _Network) -> bytes:
    """One `name: JSON` a line: every JSON text is a YAML text."""
    parts = msgspec.to_builtins(network)
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in parts.items()).encode()


def checked_network(raw: bytes) -> bytes:
    """Returns a network config with nothing in it but what is known to be harmless: no command, no secret, no renderer.

    Raises:
        ValueError: it has another form than image-builder's, a field that isn't known, or no address where one stands.
    """
    try:
        network = msgspec.convert(read_lines(raw), _Network)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    if network.version != 2:
        raise ValueError(f"version {network.version}, 2 expected")
    for card in (*network.ethernets.values(), *network.vlans.values()):
        for address in card.addresses:
            ipaddress.ip_interface(address)
        for route in card.routes:
            ipaddress.ip_network(route.to)
            ipaddress.ip_address(route.via)
        for server in card.nameservers.addresses if card.nameservers else ():
            ipaddress.ip_address(server)
    return _rendered(network)


def read_lines(raw: bytes) -> dict[str, Any]:
    """Returns what image-builder wrote as one `name: JSON` a line; comments are passed over.

    Raises:
        ValueError: another form.
    """
    found: dict[str, Any] = {}
    for line in raw.decode("utf-8").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        name, colon, value = line.partition(": ")
        if not colon or name in found:
            raise ValueError(f"not as image-builder writes it: {line[:40]!r}")
        found[name] = json.loads(value)
    return found
