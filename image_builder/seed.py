"""Makes the files of a seed from a bundle and the wishes for one image or VM. No file, no clock: bytes in, bytes out.

Rules, all checked before anything is returned, all violations told at once:

1. The bundle is strict JSON of a known schema, and its trust document is signed by the bundle's own root.
2. The image key is one Ed25519 key, fits its id, and has no other role in the cluster (SSH host key, log-in key).
3. No other private key goes in, under whatever name: every string of the bundle, of the trust document inside it and
   of the wishes is looked through, also one layer of base64 down. What is found is named by its field, never shown.
4. `image-key.pem` and `root-ca.pem` are written in the one canonical form, so nothing rides along behind a PEM block.
5. Equal inputs give equal bytes: the only time is `baked_at`, the image id follows from the contents.

Writing the files is `image_builder.output`, the ISO `image_builder.iso`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import Any

import msgspec

from appliance.errors import ApplianceError, SeedError, TrustError
from appliance.pki import image_key, sealed, trust
from appliance.pki.identity import Identity
from appliance.protocol import seed as protocol
from appliance.protocol import strict_json
from appliance.protocol.address import format_endpoint, parse_endpoint
from appliance.protocol.trust import TrustDocument
from image_builder import cloud

ENROLL_PORT = 8443
MAX_CONTROLLERS = 16
FUTURE_LIMIT_S = 86400
"""How far `baked_at` may lie ahead of this machine's clock: it is the floor under the clock of every VM baked."""

_PRIVATE = re.compile(
    rf"PRIVATE\s+KEY|PuTTY-User-Key-File|({sealed.ROOT_KEY.decode()}|{sealed.BACKUP.decode()})\n", re.IGNORECASE
)
_CERTIFICATE = re.compile(r"\s*(-----BEGIN CERTIFICATE-----\r?\n[A-Za-z0-9+/=\r\n]+-----END CERTIFICATE-----)\s*")
_KEY = re.compile(r"\s*-----BEGIN PRIVATE KEY-----\r?\n[A-Za-z0-9+/=\r\n]+-----END PRIVATE KEY-----\s*")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE)


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What one image or VM gets beside its bundle, as the user wrote it."""

    controllers: Sequence[str] = ()
    """`host` or `host:port`; empty takes the bundle's."""
    name: str = ""
    labels: Sequence[str] = ()
    """`key=value` each."""
    hostname: str = ""
    """Host name of the VM; empty derives one from `name`, and sets none where there is no name."""
    token: str = ""
    """Lets one VM in; its form was checked before."""


class SeedFile(msgspec.Struct, frozen=True):
    """One file of a seed."""

    name: str
    content: bytes
    mode: int


class BakedSeed(msgspec.Struct, frozen=True, kw_only=True):
    """A whole seed, ready to be written."""

    seed: protocol.Seed
    hostname: str
    files: list[SeedFile]


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yields every string in `value` with the path it stands at, and what one layer of base64 in it hides."""
    if isinstance(value, str):
        yield path, value
        with contextlib.suppress(binascii.Error, ValueError):
            yield path, base64.b64decode("".join(value.split()), validate=True).decode("latin-1")
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(name, f"{path}, a name in it")
            yield from _strings(inner, f"{path}.{name}" if _DNS_NAME.fullmatch(name) else path)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _strings(inner, f"{path}[{index}]")


def find_private_keys(value: Any, path: str) -> list[str]:
    """Returns the paths under which `value` (builtins) holds anything like a private key, each once."""
    return list(dict.fromkeys(where for where, text in _strings(value, path) if _PRIVATE.search(text)))


def check_wishes(wishes: Wishes, cloud_wishes: cloud.CloudWishes) -> list[str]:
    """Returns what is wrong with wishes, one sentence each, where there is no bundle to bake them with yet."""
    problems: list[str] = []
    _check_wishes(wishes, problems)
    return problems + _check_cloud(cloud_wishes)


def _check_cloud(wishes: cloud.CloudWishes) -> list[str]:
    texts = {"operator_key": wishes.operator_key, "timezone": wishes.timezone}
    texts |= {f"hook {hook.name}": hook.content.decode("latin-1") for hook in wishes.hooks}
    found = [where for where, text in texts.items() if find_private_keys(text, where)]
    if found:
        return [f"{where} holds a private key: only the bundle's image key goes into a seed" for where in found]
    return cloud.check(wishes)


def _check_wishes(wishes: Wishes, problems: list[str]) -> tuple[protocol.Hints, str, list[str]]:
    found = find_private_keys(msgspec.to_builtins(wishes), "wish")
    if found:
        # nothing below may look at these values: its messages quote them
        problems += [f"{where} holds a private key: only the bundle's image key goes into a seed" for where in found]
        return protocol.Hints(), "", []
    labels: dict[str, str] = {}
    for text in wishes.labels:
        key, equals, value = text.partition("=")
        if not equals:
            problems.append(f"label {text!r}: key=value expected")
        elif key in labels:
            problems.append(f"label {key!r} stands twice")
        labels[key] = value
    hints = protocol.Hints(name=wishes.name, labels=labels)
    problems += protocol.check_hints(hints)
    hostname = wishes.hostname or re.sub(r"[._]+", "-", wishes.name).lower()
    if wishes.hostname and not _HOSTNAME.fullmatch(wishes.hostname):
        problems.append(f"host name {hostname!r}: up to 63 letters, digits and '-' expected (RFC 1123)")
    return hints, hostname, _check_controllers(wishes.controllers, "controller", problems)


def _check_controllers(texts: Sequence[str], what: str, problems: list[str]) -> list[str]:
    endpoints = []
    for text in texts:
        try:
            host, port = parse_endpoint(text, default_port=ENROLL_PORT)
        except ApplianceError as error:
            problems.append(f"{what} {text!r}: host:port expected" + (f" ({error.hint})" if error.hint else ""))
            continue
        if not port or not is_host(host):
            problems.append(f"{what} {text!r}: a host name or address and a port from 1 to 65535 expected")
        endpoints.append(format_endpoint(host, port))
    if len(endpoints) > MAX_CONTROLLERS:
        problems.append(f"{len(endpoints)} addresses of {what}s, at most {MAX_CONTROLLERS} are tried")
    return endpoints


def is_host(text: str) -> bool:
    """Whether `text` is an IP address in its one canonical form, or a DNS name."""
    try:
        return ip_address(text).compressed == text
    except ValueError:
        return _DNS_NAME.fullmatch(text) is not None and not text.replace(".", "").isdigit()


def _check_image_key(bundle: protocol.Bundle, document: TrustDocument | None, problems: list[str]) -> Identity | None:
    if not _KEY.fullmatch(bundle.image_key):
        problems.append("the bundle's image_key: one PKCS #8 PEM block ('PRIVATE KEY') and nothing else expected")
        return None
    try:
        identity = Identity.from_pkcs8(bundle.image_key.encode())
    except TrustError as error:
        problems.append(f"the bundle's image_key is no Ed25519 image key: {error.message}")
        return None
    expected = image_key.image_key_id(identity.public_line)
    if bundle.image_key_id != expected:
        problems.append(f"the bundle's image key is {expected}, but the bundle calls it {bundle.image_key_id!r}")
    if document is not None:
        host_keys = {key for node in document.nodes for key in node.host_keys}
        if identity.public_line in {*host_keys, *document.login_keys, document.bundle_key}:
            problems.append("the bundle's image key has another role in the cluster (host, log-in or bundle key)")
    return identity


def _check_trust(bundle: protocol.Bundle, problems: list[str]) -> tuple[str, TrustDocument | None]:
    certificate = _CERTIFICATE.fullmatch(bundle.root_ca)
    if certificate is None:
        problems.append("the bundle's root_ca: one PEM certificate and nothing else expected")
        return "", None
    root_ca = certificate.group(1).replace("\r\n", "\n") + "\n"
    try:
        document = trust.verify_trust(bundle.trust, anchors=[root_ca], current=None)
    except ApplianceError as error:
        problems.append(f"the bundle's trust document does not verify against its root: {error.message}")
        return root_ca, None
    if document.cluster_id != bundle.cluster_id:
        problems.append(
            f"the bundle says cluster {bundle.cluster_id!r}, its trust document says {document.cluster_id!r}"
        )
    found = find_private_keys(msgspec.to_builtins(document), "trust document")
    problems += [f"{where} holds a private key" for where in found]
    return root_ca, document


def _read_bundle(raw: bytes, problems: list[str]) -> tuple[protocol.Bundle, str, Identity] | None:
    try:
        bundle = strict_json.decode(raw, protocol.Bundle, max_bytes=protocol.MAX_BUNDLE_BYTES)
        protocol.check_schema(bundle.schema)
    except ApplianceError as error:
        problems.append(f"the bundle can't be used: {error.message}" + (f"; {error.hint}" if error.hint else ""))
        return None
    builtins = msgspec.to_builtins(bundle)
    builtins.pop("image_key")
    found = find_private_keys(builtins, "bundle")
    if found:
        problems += [f"{where} holds a private key" for where in found]
        return None  # the checks below quote what they find
    before = len(problems)
    root_ca, document = _check_trust(bundle, problems)
    identity = _check_image_key(bundle, document, problems)
    if identity is None or len(problems) > before:
        return None
    return bundle, root_ca, identity


def check_named(raw: bytes, *, cluster: str, key_id: str) -> list[str]:
    """Returns in which way a bundle isn't the one that was meant, one sentence each.

    Args:
        raw: the bundle file's content; what is no bundle is for `bake` to tell.
        cluster: id of the cluster, "" for any.
        key_id: of the image key, "" for any.
    """
    try:
        bundle = msgspec.json.decode(raw, type=protocol.Bundle)
    except strict_json.UNDECODABLE:
        return []
    problems = []
    if cluster and bundle.cluster_id != cluster:
        problems.append(f"the bundle is of cluster {bundle.cluster_id!r}, {cluster!r} was named")
    if key_id and bundle.image_key_id != key_id:
        problems.append(f"the bundle holds the image key {bundle.image_key_id}, {key_id!r} was named")
    return problems


def bake(
    raw_bundle: bytes | None,
    wishes: Wishes,
    *,
    baked_at: int,
    now: int,
    problems: Sequence[str] = (),
    cloud_wishes: cloud.CloudWishes = cloud.NO_WISHES,
    target: cloud.Target = cloud.Target.IMAGE,
    system: str = "",
) -> BakedSeed:
    """Makes the files of a seed.

    Args:
        raw_bundle: the bundle file's content; None where it could not be read (then `problems` says why).
        wishes: hints for this image or VM.
        baked_at: seconds since 1970; the floor under any clock the VM will believe, and the date of every file.
        now: this machine's clock, seconds since 1970.
        problems: mistakes found already, told together with those found here.
        cloud_wishes: what cloud-init does beside starting the agent.
        target: the kind of disk that the seed is for.
        system: digest of what else is on that disk; the image id follows from it too.

    Raises:
        SeedError: with all mistakes, one a line.
    """
    mistakes = list(problems)
    hints, hostname, controllers = _check_wishes(wishes, mistakes)
    mistakes += _check_cloud(cloud_wishes)
    if not 0 < baked_at <= now + FUTURE_LIMIT_S:
        mistakes.append(
            f"baked_at {baked_at}: seconds since 1970, at most a day ahead of this machine's clock ({now}), expected;"
            " a VM would refuse every controller until then"
        )
    read = _read_bundle(raw_bundle, mistakes) if raw_bundle is not None else None
    wants_fresh = raw_bundle is not None and read is None
    if read is not None and 0 < read[0].image_key_expires_at <= now:
        wants_fresh = True
        days = (now - read[0].image_key_expires_at) // 86400
        mistakes.append(
            f"the bundle's image key {read[0].image_key_id} expired {days} days ago: nothing could enroll by it"
        )
    if read is not None and not wishes.controllers:
        controllers = _check_controllers(read[0].controllers, "bundle's controller", mistakes)
        if not controllers:
            mistakes.append("neither the bundle nor --controller names a controller")
    if mistakes or read is None:
        raise SeedError(
            "the seed can't be baked:" + "".join(f"\n  - {mistake}" for mistake in mistakes),
            hint="nothing was written" + "; a fresh bundle comes from `appliance image-key create`" * wants_fresh,
        )
    bundle, root_ca, identity = read
    seed = protocol.Seed(
        schema=protocol.SCHEMA,
        cluster_id=bundle.cluster_id,
        image_key_id=bundle.image_key_id,
        image_id="",
        baked_at=baked_at,
        controllers=controllers,
        hints=hints,
        token=wishes.token,
    )
    trust_json = strict_json.encode(bundle.trust)
    wished = strict_json.encode(msgspec.to_builtins(cloud_wishes))
    parts = [strict_json.encode(seed), trust_json, hostname.encode(), wished, target.value.encode(), system.encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    seed = msgspec.structs.replace(seed, image_id=f"seed-{digest[:16]}")
    meta = (
        f"instance-id: {json.dumps(seed.image_id)}\n"
        f"local-hostname: {json.dumps(hostname or protocol.DEFAULT_HOSTNAME)}\n"
    )
    files = [
        SeedFile(
            protocol.USER_DATA_FILE,
            cloud.user_data(cloud_wishes, target=target, hostname=hostname, mode="se"),
            0o644,
        ),
        SeedFile(protocol.META_DATA_FILE, meta.encode(), 0o644),
        SeedFile(protocol.SEED_FILE, strict_json.encode(seed) + b"\n", 0o600 if seed.token else 0o644),
        SeedFile(protocol.ROOT_CA_FILE, root_ca.encode(), 0o644),
        SeedFile(protocol.TRUST_FILE, trust_json + b"\n", 0o644),
        SeedFile(protocol.IMAGE_KEY_FILE, identity.pkcs8().reveal(), 0o600),
    ]
    network = cloud.network_config(cloud_wishes.network, target=target)
    if network is not None:
        files.append(SeedFile(protocol.NETWORK_CONFIG_FILE, network, 0o644))
    return BakedSeed(seed=seed, hostname=hostname, files=files)
