"""Signs the manifest of an OVA: the `.cert` member (DMTF DSP0243, 1.1.1, section 5.1).

The signature is RSA with PKCS #1 v1.5 and SHA-256, since that alone is what importers know.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from appliance.errors import TrustError
from appliance.pki import certificate
from appliance.pki.secret import Secret

_HINT: Final = "give the RSA key that the certificate is for, both as PEM"


def sign_manifest(manifest: bytes, *, name: str, certificate_pem: bytes, key_pem: Secret) -> bytes:
    """Returns the `.cert` file of an OVA.

    Args:
        manifest: content of the `.mf` member.
        name: of that member.
        certificate_pem: exactly one certificate.
        key_pem: its RSA key, not encrypted.

    Raises:
        TrustError: either isn't one, or they don't fit.
    """
    signer = certificate.load_pem(certificate_pem)
    try:
        key = serialization.load_pem_private_key(key_pem.reveal(), password=None)
    except (ValueError, TypeError) as error:
        raise TrustError(f"the key that shall sign the OVA can't be read: {error}", hint=_HINT) from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise TrustError("the key that shall sign the OVA is no RSA key, importers know no other", hint=_HINT)
    if signer.public_key() != key.public_key():
        raise TrustError("the certificate that shall sign the OVA isn't that of the key", hint=_HINT)
    signature = key.sign(manifest, padding.PKCS1v15(), hashes.SHA256())
    pem = signer.public_bytes(serialization.Encoding.PEM)
    return f"SHA256({name})= {signature.hex()}\n".encode() + pem


def check_manifest(manifest: bytes, *, name: str, signed: bytes) -> str:
    """Checks a `.cert` file and returns its certificate's subject; whether anybody trusts that isn't decided here.

    Raises:
        TrustError: the signature isn't one of this manifest.
    """
    line, _, pem = signed.partition(b"\n")
    prefix, _, digits = line.decode("ascii", "replace").rpartition("= ")
    signer = certificate.load_pem(pem)
    key = signer.public_key()
    if prefix != f"SHA256({name})" or not isinstance(key, rsa.RSAPublicKey):
        raise TrustError(f"the OVA's certificate file begins with {line[:60]!r}, 'SHA256({name})= ' expected")
    try:
        key.verify(bytes.fromhex(digits), manifest, padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, ValueError):
        raise TrustError("the OVA's manifest isn't what its certificate signed") from None
    return signer.subject.rfc4514_string()
