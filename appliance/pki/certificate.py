"""Reads certificates: what a certificate of this product says, and nothing that isn't in it.

The cluster and the node stand in a URI name: `appliance://<cluster-id>` on a root and on an issuing CA,
`appliance://<cluster-id>/node/<n>` on a node. Who signed a certificate decides nothing here (`pki.tls`).

Foreign bytes are parsed under `except Exception`: cryptography raises a dozen unrelated kinds for them (a certificate
whose version number is 2 raises `InvalidVersion`, which is no `ValueError`).

`cryptography.x509` is loaded by who reads one: it costs 1.1 MB, and an SE with a link seldom does.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

from appliance.errors import TrustError

if TYPE_CHECKING:
    from cryptography import x509

URI_SCHEME: Final = "appliance://"
CLUSTER_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,53}")
"""Lower case, since a URI's host has no case; at most 54 characters, since a common name holds 64."""

SET_BACK: Final = (
    "if the controller was restored from before a change of root, here: `appliance enroll --anew --seed PATH --token -`"
)
"""What to do where the SE alone knows a root that was changed to (docs/backup.md)."""

_URI: Final = re.compile(rf"{URI_SCHEME}(?P<cluster>{CLUSTER_ID.pattern})(/node/(?P<node>[1-9][0-9]{{0,4}}))?")


class CertificateTerms(NamedTuple):
    """What a certificate says. Times are seconds since 1970 (UTC); digests are SHA-256 in lower-case hex."""

    subject: str
    """RFC 4514 text, for messages."""
    not_before: int
    not_after: int
    cluster_id: str
    """Empty where the certificate names no cluster."""
    node: int | None
    key_id: str
    """Digest of the SubjectPublicKeyInfo."""
    fingerprint: str
    """Digest of the DER certificate."""
    is_authority: bool
    path_length: int | None
    """How many CA certificates may stand between an authority and a leaf; None where it doesn't say."""
    is_self_issued: bool
    """Whether issuer and subject have one name, as of a root, or of a root's key certified by the root before it."""
    serves_tls: bool
    """Whether the extended key usage is there and names serverAuth."""


def key_id(key: CertificatePublicKeyTypes) -> str:
    """Returns the SHA-256 of the SubjectPublicKeyInfo, hex."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def load_pem(pem: str | bytes) -> x509.Certificate:
    """Loads a PEM text that holds exactly one certificate. Raises `TrustError`."""
    from cryptography import x509

    raw = pem.encode() if isinstance(pem, str) else pem
    try:
        found = x509.load_pem_x509_certificates(raw)
    except Exception:  # noqa: BLE001 - foreign bytes, see above
        raise TrustError("no PEM certificate can be read", hint="the file is damaged or of another kind") from None
    if len(found) != 1:
        raise TrustError(f"{len(found)} certificates in one PEM text, exactly 1 expected")
    return found[0]


def first_of(chain_pem: bytes) -> bytes:
    """Returns the first of the PEM certificates in a text, the leaf of a chain. Raises `TrustError`: there is none."""
    end = b"-----END CERTIFICATE-----\n"
    leaf, found, _ = chain_pem.partition(end)
    load_pem(leaf + found)
    return leaf + found


def all_of(chain_pem: bytes) -> list[bytes]:
    """Returns the PEM certificates in a text, one each, in its order. Raises `TrustError`: one can't be read."""
    begin = b"-----BEGIN CERTIFICATE-----"
    found = [begin + part for part in chain_pem.split(begin)[1:]]
    for pem in found:
        load_pem(pem)
    return found


def load_der(der: bytes) -> x509.Certificate:
    """Loads a DER certificate. Raises `TrustError`."""
    from cryptography import x509

    try:
        return x509.load_der_x509_certificate(der)
    except Exception:  # noqa: BLE001 - foreign bytes, see above
        raise TrustError("the certificate can't be read") from None


def key_of(certificate: x509.Certificate) -> CertificatePublicKeyTypes:
    """Returns a certificate's public key; first looked at here. Raises `TrustError`: a point off its curve."""
    try:
        return certificate.public_key()
    except Exception as error:  # noqa: BLE001 - foreign bytes, see above
        raise TrustError(f"the certificate's key can't be read: {error}") from None


def terms_of(certificate: x509.Certificate) -> CertificateTerms:
    """Returns what `certificate` says.

    Raises:
        TrustError: it can't be read, or names two clusters.
    """
    from cryptography import x509

    try:
        extensions = certificate.extensions
        subject = certificate.subject.rfc4514_string()
        is_self_issued = certificate.subject == certificate.issuer
    except Exception as error:  # noqa: BLE001 - foreign bytes, see above
        raise TrustError(f"the certificate can't be read: {error}") from None
    key = key_of(certificate)
    uris: list[str] = []
    is_authority = serves_tls = False
    path_length: int | None = None
    for extension in extensions:
        match extension.value:
            case x509.SubjectAlternativeName() as names:
                uris = [uri for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if _is_ours(uri)]
            case x509.BasicConstraints(ca=ca, path_length=length):
                is_authority, path_length = ca, length
            case x509.ExtendedKeyUsage() as usages:
                serves_tls = x509.oid.ExtendedKeyUsageOID.SERVER_AUTH in usages
    if len(uris) > 1:
        raise TrustError(f"the certificate names {len(uris)} clusters or nodes, at most 1 expected")
    match_ = _URI.fullmatch(uris[0]) if uris else None
    node = match_["node"] if match_ else None
    return CertificateTerms(
        subject=subject,
        not_before=int(certificate.not_valid_before_utc.timestamp()),
        not_after=int(certificate.not_valid_after_utc.timestamp()),
        cluster_id=match_["cluster"] if match_ else "",
        node=int(node) if node else None,
        key_id=key_id(key),
        fingerprint=hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest(),
        is_authority=is_authority,
        path_length=path_length,
        is_self_issued=is_self_issued,
        serves_tls=serves_tls,
    )


def certificate_terms(pem: str | bytes) -> CertificateTerms:
    """Returns what the one certificate in `pem` says. Raises `TrustError`."""
    return terms_of(load_pem(pem))


def is_issued_by(pem: str | bytes, issuer_pem: str | bytes) -> bool:
    """Whether the issuer's name stands in a certificate, and its key signed it. Raises `TrustError`: one can't be read.

    Neither dates nor rights are looked at.
    """
    certificate, issuer = load_pem(pem), load_pem(issuer_pem)
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # noqa: BLE001 - foreign bytes, see above
        return False
    return True


def moment(seconds: float) -> str:
    """Returns a time for messages: `2026-01-31 12:00:00 UTC`."""
    try:
        return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        # A peer's idea of the time may be any number, and a message must not fail over it.
        return f"{seconds} s since 1970"


def _is_ours(uri: str) -> bool:
    return uri.startswith(URI_SCHEME)
