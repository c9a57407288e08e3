"""Judges private keys that were found on a disk.

Two kinds may be there: the seed's own image key; keys that came with the system and stand in packages, known to the
world (libraries carry some to test themselves). A key of the cluster is refused wherever it came from, and so is a key
whose certificate lies beside it and names any cluster of ours, and whatever a controller sealed under a passphrase.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import msgspec

from appliance.errors import ApplianceError, ImageError, TrustError
from appliance.pki import certificate, found_key, sealed, ssh_keys
from appliance.pki.image_key import image_key_id
from appliance.protocol.trust import TrustDocument
from image_builder import scan
from image_builder.scan import FoundKey

_PUBLISHED = ("./usr/", "./lib/", "./bin/", "./sbin/")
"""Where packages put what everybody gets; a key elsewhere was made while the system was installed."""


class KeyNote(msgspec.Struct, frozen=True, kw_only=True):
    """A private key, by what can be told of it without telling it."""

    digest: str
    """SHA-256 of its PEM, hex."""
    kind: str
    key_id: str
    ssh_line: str
    is_sealed: bool = False


def note(key: FoundKey) -> KeyNote:
    """Returns the note on a key."""
    kind = key.kind or "PKCS #8"
    digest = scan.sha256(b"".join(key.pem.split()))
    if key.is_sealed:
        return KeyNote(digest=digest, kind=kind, key_id=_sealed_key_id(key.pem), ssh_line="", is_sealed=True)
    mark = found_key.identify(key.pem)
    return KeyNote(digest=digest, kind=kind, key_id=mark.key_id if mark else "", ssh_line=mark.ssh_line if mark else "")


def _sealed_key_id(head: bytes) -> str:
    """Returns whose key a sealed file says it is, "" where it doesn't: a backup holds many."""
    try:
        return str(sealed.about(head, magic=sealed.ROOT_KEY).get("key_id", ""))
    except TrustError:
        return ""


def of_certificates(ders: Iterable[bytes]) -> dict[str, str]:
    """Returns whose a private key is, by key id, for all keys that certificates of clusters tell of."""
    found = {}
    for der in ders:
        try:
            terms = certificate.terms_of(certificate.load_der(der))
        except ApplianceError:
            continue
        if terms.cluster_id:
            who = "a CA's" if terms.is_authority else f"node {terms.node}'s"
            found[terms.key_id] = f"{who}, of cluster {terms.cluster_id}"
    return found


def published(tree: Path) -> list[str]:
    """Returns the digests of keys in the packages of an installed tree (tar).

    Raises:
        ImageError: a key lies where installing must have made it.
    """
    keys = scan.look_through(tree).keys
    if not keys:
        return []
    with tarfile.open(tree) as archive:
        places = [(one.offset_data, one.offset_data + one.size, one.name) for one in archive if one.isreg()]
    for key in keys:
        name = next((name for start, end, name in places if start <= key.offset < end), "no file")
        if not name.startswith(_PUBLISHED):
            raise ImageError(
                f"the system that was installed holds a private key in {name}", hint="build it with --fresh"
            )
    return sorted({note(key).digest for key in keys})


def of_cluster(root_pem: str, document: TrustDocument) -> dict[str, str]:
    """Returns whose a private key is, by key id or OpenSSH public line, for all keys that the cluster tells of."""
    found = {certificate.certificate_terms(pem).key_id: "a root CA's" for pem in (root_pem, *document.roots)}
    found |= dict.fromkeys(document.revoked_node_keys, "a revoked node's")
    found |= {line: f"the SSH host key of node {node.number}" for node in document.nodes for line in node.host_keys}
    found |= dict.fromkeys(document.login_keys, "a key that may log in to SEs")
    if document.bundle_key:
        found[document.bundle_key] = "the key that signs upgrades"
    return found


def problems(
    notes: Sequence[tuple[KeyNote, int]], *, cluster: dict[str, str], image_key: str, known: Collection[str]
) -> list[str]:
    """Says which keys may not be there, one sentence each.

    Args:
        notes: keys with their offset in bytes.
        cluster: from `of_cluster` and `of_certificates`.
        image_key: id of the seed's; empty where there is none.
        known: digests of keys that came with the system.
    """
    found = []
    for key, offset in notes:
        owner = cluster.get(key.key_id) or cluster.get(key.ssh_line)
        if owner:
            found.append(f"a private key of the cluster lies at byte {offset}: {owner}")
        elif key.is_sealed:
            found.append(f"a {key.kind} lies at byte {offset}: it opens with its passphrase, and belongs on no image")
        elif image_key and key.ssh_line and image_key_id(key.ssh_line) == image_key:
            continue
        elif key.digest not in known:
            shown = f", {ssh_keys.fingerprint(key.ssh_line)}" if key.ssh_line else ""
            found.append(f"a private key ({key.kind}{shown}) lies at byte {offset}: only the image key may be there")
    return found
