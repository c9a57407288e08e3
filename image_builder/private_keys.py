"""Judges private keys that were found on a disk.

Three kinds may be there: the seed's own image key; keys that came with the system and stand in packages, known to the
world (libraries carry some to test themselves); nothing else. A key of the cluster is refused wherever it came from.
"""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from appliance.errors import ImageError
from appliance.pki import certificate, found_key, ssh_keys
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


def note(key: FoundKey) -> KeyNote:
    """Returns the note on a key."""
    mark = found_key.identify(key.pem)
    kind = key.kind or "PKCS #8"
    digest = scan.sha256(b"".join(key.pem.split()))
    return KeyNote(digest=digest, kind=kind, key_id=mark.key_id if mark else "", ssh_line=mark.ssh_line if mark else "")


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
        cluster: from `of_cluster`.
        image_key: id of the seed's; empty where there is none.
        known: digests of keys that came with the system.
    """
    found = []
    for key, offset in notes:
        owner = cluster.get(key.key_id) or cluster.get(key.ssh_line)
        if owner:
            found.append(f"a private key of the cluster lies at byte {offset}: {owner}")
        elif image_key and key.ssh_line and image_key_id(key.ssh_line) == image_key:
            continue
        elif key.digest not in known:
            shown = f", {ssh_keys.fingerprint(key.ssh_line)}" if key.ssh_line else ""
            found.append(f"a private key ({key.kind}{shown}) lies at byte {offset}: only the image key may be there")
    return found
