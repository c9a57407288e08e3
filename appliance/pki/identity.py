"""An Ed25519 key pair that stands for somebody: an SE, or the images of one bake."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from appliance.pki import ssh_keys
from appliance.pki.secret import Secret


class Identity:
    """A private key and what follows from it. It shows its fingerprint, never its key."""

    __slots__ = ("_key", "public_line", "thumbprint")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_line: str = ssh_keys.public_line(key.public_key().public_bytes_raw())
        self.thumbprint: str = ssh_keys.fingerprint(self.public_line)

    @classmethod
    def create(cls) -> Identity:
        """Makes a new key pair."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pkcs8(cls, pem: bytes) -> Identity:
        """Loads a private key file (PKCS #8 PEM; OpenSSH's format is read too). Raises `TrustError`."""
        return cls(ssh_keys.load_private(pem))

    def sign(self, message: bytes) -> bytes:
        """Returns the 64-byte signature (RFC 8032, pure Ed25519)."""
        return self._key.sign(message)

    def pkcs8(self) -> Secret:
        """Returns the private key as PKCS #8 PEM."""
        return ssh_keys.to_pkcs8(self._key)

    def openssh(self) -> Secret:
        """Returns the private key as an OpenSSH file."""
        return ssh_keys.to_openssh(self._key)

    def __repr__(self) -> str:
        return f"Identity({self.thumbprint})"


def verify(public_line: str, signature: bytes, message: bytes) -> bool:
    """Whether `signature` over `message` is by the key of `public_line`. Raises `TrustError` where that is no key."""
    key = Ed25519PublicKey.from_public_bytes(ssh_keys.parse_public(public_line))
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True
