"""The cluster's root CA: makes it, issues node certificates, signs trust documents and receipts.

Root: ECDSA P-256, path length 1 (a root of path length 0 could never be cross-signed by its successor), 20 years.
Node: ECDSA P-256, serverAuth only, 90 days. All certificates start a day back, for machines whose clock runs slow.
Only the controller's side imports this module; an SE reads certificates with `pki.certificate`.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.errors import TrustError, UsageError
from appliance.pki import certificate
from appliance.pki.certificate import CertificateTerms, certificate_terms
from appliance.pki.envelope import sign_envelope
from appliance.pki.secret import Secret
from appliance.protocol.address import MAX_NODE_NUMBER
from appliance.protocol.trust import Envelope

__all__ = ["Authority", "CertificateTerms", "NodeCertificate", "certificate_terms"]

DAY_S: Final = 86_400
ROOT_DAYS: Final = 20 * 365 + 5
NODE_DAYS: Final = 90

_DNS_LABEL: Final = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z){_DNS_LABEL}(\.{_DNS_LABEL})*")


class NodeCertificate(NamedTuple):
    """A node's certificate (PEM) and its private key (PKCS #8 PEM, to be written 0600)."""

    certificate_pem: bytes
    key: Secret


class Authority:
    """A root certificate with its key."""

    __slots__ = ("_certificate", "_key", "certificate_pem", "cluster_id", "expires_at", "fingerprint", "not_before")

    def __init__(self, root: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        terms = certificate.terms_of(root)
        if not terms.is_authority or not terms.cluster_id:
            raise TrustError("the root certificate is no CA certificate of a cluster")
        if terms.key_id != certificate.key_id(key.public_key()):
            raise TrustError(
                "the root certificate and the root key don't belong together", hint="restore both from one backup"
            )
        self._certificate = root
        self._key = key
        self.certificate_pem: bytes = root.public_bytes(serialization.Encoding.PEM)
        self.cluster_id: str = terms.cluster_id
        self.fingerprint: str = terms.fingerprint
        self.not_before: int = terms.not_before
        self.expires_at: int = terms.not_after

    @classmethod
    def create(cls, cluster_id: str, *, now: int) -> Authority:
        """Makes the root of a new cluster.

        Args:
            cluster_id: lower-case letters, digits and `-`, at most 54.
            now: seconds since 1970; the certificate starts a day earlier.
        """
        if not certificate.CLUSTER_ID.fullmatch(cluster_id):
            raise UsageError(
                f"{cluster_id!r} can't be a cluster id", hint="use 1 to 54 lower-case letters, digits and '-'"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"appliance {cluster_id}")])
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        uri = x509.UniformResourceIdentifier(f"{certificate.URI_SCHEME}{cluster_id}")
        root = (
            _builder(name, name, key.public_key(), not_before=now - DAY_S, not_after=now + ROOT_DAYS * DAY_S)
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(root, key)

    @classmethod
    def load(cls, cert_pem: bytes, key_pem: bytes, passphrase: Secret | None = None) -> Authority:
        """Loads a root from its two PEM files.

        Raises:
            TrustError: damaged, of another kind, not belonging together, or the passphrase is missing or wrong.
        """
        root = certificate.load_pem(cert_pem)
        try:
            key = serialization.load_pem_private_key(key_pem, passphrase.reveal() if passphrase else None)
        except Exception:  # noqa: BLE001 - damaged: ValueError, TypeError, UnsupportedAlgorithm or InternalError
            raise TrustError(
                "the root key can't be read: damaged, or the passphrase is missing, wrong or not needed",
                hint="give the passphrase that was set when the cluster was made",
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise TrustError("the root key is of another kind, ECDSA P-256 expected")
        return cls(root, key)

    def key_pem(self, passphrase: Secret | None = None) -> Secret:
        """Returns the root key as PKCS #8 PEM, encrypted where a passphrase is given."""
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase is not None:
            encryption = serialization.BestAvailableEncryption(passphrase.reveal())
        return Secret(
            self._key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        )

    def issue_node(self, *, node: int, addresses: Sequence[str], now: int, days: int = NODE_DAYS) -> NodeCertificate:
        """Makes a key and a certificate for a node.

        Args:
            node: node number.
            addresses: IP addresses and DNS names for foreign clients; an SE doesn't compare them (NAT).
            now: seconds since 1970.
            days: life; ends with the root's at the latest.

        Raises:
            UsageError: a number or address that can't stand in a certificate.
            TrustError: `now` lies outside the root's own life.
        """
        if not 1 <= node <= MAX_NODE_NUMBER:
            raise UsageError(f"node number {node} is outside 1..{MAX_NODE_NUMBER}")
        if not self.not_before <= now < self.expires_at:
            raise TrustError(
                f"the clock says {certificate.moment(now)}, the root CA lives from "
                f"{certificate.moment(self.not_before)} to {certificate.moment(self.expires_at)}",
                hint="set the clock; a root at its end must be replaced",
            )
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self._certificate
        uri = f"{certificate.URI_SCHEME}{self.cluster_id}/node/{node}"
        names = [*(_general_name(address) for address in addresses), x509.UniformResourceIdentifier(uri)]
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=False,
            crl_sign=False,
            encipher_only=False,
            decipher_only=False,
        )
        issued = (
            _builder(
                x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"appliance node {node}")]),
                issuer.subject,
                key.public_key(),
                not_before=max(now - DAY_S, self.not_before),
                not_after=min(now + days * DAY_S, self.expires_at),
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pkcs8 = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return NodeCertificate(issued.public_bytes(serialization.Encoding.PEM), Secret(pkcs8))

    def cross_sign(self, successor: Authority, *, now: int) -> bytes:
        """Returns the successor's key in a CA certificate by this root, PEM (RFC 4949, cross-certification).

        With it in a node's chain, who still trusts only this root accepts nodes that the successor certified. It says
        the same as the successor's own certificate, but ends with this root's life.

        Raises:
            TrustError: a root of another cluster.
        """
        other = successor._certificate
        if successor.cluster_id != self.cluster_id:
            raise TrustError(f"a root of cluster {successor.cluster_id}, expected {self.cluster_id}")
        public_key = successor._key.public_key()
        builder = _builder(
            other.subject,
            self._certificate.subject,
            public_key,
            not_before=max(now - DAY_S, self.not_before),
            not_after=min(successor.expires_at, self.expires_at),
        )
        for extension in other.extensions:
            if not isinstance(extension.value, x509.AuthorityKeyIdentifier | x509.SubjectKeyIdentifier):
                builder = builder.add_extension(extension.value, critical=extension.critical)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        crossed = builder.add_extension(issuer, critical=False).sign(self._key, hashes.SHA256())
        return crossed.public_bytes(serialization.Encoding.PEM)

    def sign(self, payload_type: str, body: bytes) -> Envelope:
        """Returns `body` in an envelope signed by the root."""
        return sign_envelope(self._key, payload_type, body)

    def __repr__(self) -> str:
        return f"Authority({self.cluster_id}, {self.fingerprint})"


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, not_before: int, not_after: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(dt.datetime.fromtimestamp(not_before, dt.UTC))
        .not_valid_after(dt.datetime.fromtimestamp(not_after, dt.UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(address))
    except ValueError:
        if not _DNS_NAME.fullmatch(address):
            raise UsageError(
                f"{address!r} can't stand in a certificate", hint="use an IP address or an ASCII DNS name"
            ) from None
        return x509.DNSName(address)
