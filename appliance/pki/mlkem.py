"""ML-KEM-768 (FIPS 203) as SSH's hybrid key exchange needs it, with keys made only where they are used.

In `mlkem768x25519-sha256` the client makes a pair of keys, and the server encapsulates with the client's public one
(draft-ietf-sshm-mlkem-hybrid, section 2.3). A pair costs more than all of the server's signatures, and a server that
makes one for each log-in makes it for nothing. What the exchange does with the secret is the SSH library's business.
"""

from __future__ import annotations

from typing import ClassVar

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey

from appliance.errors import TrustError


class MlKem768:
    """One key exchange, either side. Has the attributes and methods that asyncssh asks of a `PQKey`."""

    NAME: ClassVar = b"mlkem768"
    pubkey_bytes = 1184
    privkey_bytes = 2400
    ciphertext_bytes = 1088
    secret_bytes = 32

    def __init__(self, alg_name: bytes = NAME) -> None:
        """Raises `TrustError` for any other algorithm."""
        if alg_name != self.NAME:
            raise TrustError(f"key encapsulation {alg_name!r}, {self.NAME!r} expected")
        self._private: MLKEM768PrivateKey | None = None

    def get_public(self) -> bytes:
        """The client's public key; the pair is made with the first call."""
        if self._private is None:
            self._private = MLKEM768PrivateKey.generate()
        return self._private.public_key().public_bytes_raw()

    def encaps(self, peer_public: bytes) -> tuple[bytes, bytes]:
        """The server's half: returns secret and ciphertext. Raises `ValueError` where `peer_public` is no key."""
        return MLKEM768PublicKey.from_public_bytes(peer_public).encapsulate()

    def decaps(self, ciphertext: bytes) -> bytes:
        """The client's other half: returns the secret. Raises `ValueError` where `ciphertext` is none."""
        if self._private is None:
            raise TrustError("a ciphertext before any public key was sent")
        return self._private.decapsulate(ciphertext)
