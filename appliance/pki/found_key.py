"""Says whose a private key is that was found where none should be: by its public half, never by showing it."""

from __future__ import annotations

from typing import NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from appliance.pki import certificate, ssh_keys


class Mark(NamedTuple):
    """What a key can be compared by."""

    key_id: str
    """SHA-256 of the SubjectPublicKeyInfo, hex."""
    ssh_line: str
    """OpenSSH public key line of an Ed25519 key; empty for others."""


def identify(pem: bytes) -> Mark | None:
    """Returns the marks of a private key (PEM or OpenSSH, not encrypted); None where it can't be loaded."""
    for load in (serialization.load_pem_private_key, serialization.load_ssh_private_key):
        try:
            public = load(pem, password=None).public_key()
            spki = certificate.key_id(public)  # type: ignore[arg-type]  # any kind that has a SubjectPublicKeyInfo
        except Exception:  # noqa: BLE001, S112 - foreign bytes: a dozen unrelated kinds
            continue
        line = ssh_keys.public_line(public.public_bytes_raw()) if isinstance(public, Ed25519PublicKey) else ""
        return Mark(spki, line)
    return None
