"""Image keys: baked into images, good for enrolling and for nothing else."""

from __future__ import annotations

import hashlib

from appliance.pki import ssh_keys
from appliance.pki.identity import Identity


def image_key_id(public_line: str) -> str:
    """Returns the id of an image key: `ik-` and the first 12 hex digits of the raw public key's SHA-256."""
    return "ik-" + hashlib.sha256(ssh_keys.parse_public(public_line)).hexdigest()[:12]


def create_image_key() -> tuple[str, Identity]:
    """Makes an image key. Returns its id and the key pair."""
    identity = Identity.create()
    return image_key_id(identity.public_line), identity
