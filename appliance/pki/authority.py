"""The cluster's CAs: make them, issue node certificates, sign trust documents, receipts and audit heads.

    root       ECDSA P-256, path length 1 (a root of path length 0 could never be cross-signed by its successor, nor
               have an issuing CA), 20 years. Signs everything where its key has no passphrase.
    issuing    ECDSA P-256, path length 0, one year. Where the root key has a passphrase, it signs what a daemon signs
               by itself: node certificates, receipts, audit heads.
    node       ECDSA P-256, serverAuth only, 90 days.

All certificates start a day back, for machines whose clock runs slow. A root key under a passphrase is a sealed file
(`pki.sealed`): what cryptography would write as PKCS #8 has PBKDF2 with 2,048 rounds, which protects little. Only the
controller's side imports this module; an SE reads certificates with `pki.certificate`.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final, NamedTuple, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.errors import PassphraseError, TrustError, UsageError, WrongPassphraseError
from appliance.pki import certificate, sealed
from appliance.pki.certificate import CertificateTerms, certificate_terms
from appliance.pki.envelope import sign_envelope
from appliance.pki.secret import Secret
from appliance.protocol.address import MAX_NODE_NUMBER
from appliance.protocol.trust import Envelope

__all__ = ["Authority", "CertificateTerms", "IssuedKey", "Issuer", "certificate_terms"]

DAY_S: Final = 86_400
ROOT_DAYS: Final = 20 * 365 + 5
ISSUING_DAYS: Final = 365
NODE_DAYS: Final = 90

_DNS_LABEL: Final = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z){_DNS_LABEL}(\.{_DNS_LABEL})*")


class IssuedKey(NamedTuple):
    """A certificate (PEM) and its private key (PKCS #8 PEM, to be written 0600)."""

    certificate_pem: bytes
    key: Secret


class Issuer:
    """A CA certificate of a cluster with its key: an issuing CA, or a root."""

    __slots__ = (
        "_certificate", "_key", "certificate_pem", "cluster_id", "expires_at", "fingerprint", "key_id", "not_before",
    )  # fmt: skip
    title = "issuing CA"

    def __init__(self, issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey | None) -> None:
        terms = certificate.terms_of(issuer)
        if not terms.is_authority or not terms.cluster_id or terms.node is not None:
            raise TrustError(f"the certificate of the {self.title} is no CA certificate of a cluster")
        if key is not None and terms.key_id != certificate.key_id(key.public_key()):
            raise TrustError(
                f"certificate and key of the {self.title} don't belong together", hint="restore both from one backup"
            )
        self._certificate = issuer
        self._key = key
        self.certificate_pem: bytes = issuer.public_bytes(serialization.Encoding.PEM)
        self.cluster_id: str = terms.cluster_id
        self.fingerprint: str = terms.fingerprint
        self.key_id: str = terms.key_id
        self.not_before: int = terms.not_before
        self.expires_at: int = terms.not_after

    @classmethod
    def load(cls, cert_pem: bytes, key_pem: bytes) -> Self:
        """Loads a CA from its two PEM files. Raises `TrustError`: damaged, of another kind, not belonging together."""
        return cls(certificate.load_pem(cert_pem), _load_key(key_pem, cls.title))

    @property
    def chain_pem(self) -> bytes:
        """What a node sends after its own certificate, so that who trusts the root alone believes it."""
        return self.certificate_pem

    def _signing_key(self) -> ec.EllipticCurvePrivateKey:
        if self._key is None:
            raise PassphraseError(
                f"the {self.title} key is locked: its passphrase is needed",
                hint="give the passphrase: --passphrase-file FILE, or type it when asked",
            )
        return self._key

    def issue_node(self, *, node: int, addresses: Sequence[str], now: int, days: int = NODE_DAYS) -> IssuedKey:
        """Makes a key and a certificate for a node.

        Args:
            node: node number.
            addresses: IP addresses and DNS names for foreign clients; an SE doesn't compare them (NAT).
            now: seconds since 1970.
            days: life; ends with the issuer's at the latest.

        Raises:
            UsageError: a number or address that can't stand in a certificate.
            TrustError: `now` lies outside the issuer's own life.
            PassphraseError: this is a root whose key is locked.
        """
        if not 1 <= node <= MAX_NODE_NUMBER:
            raise UsageError(f"node number {node} is outside 1..{MAX_NODE_NUMBER}")
        self.check_alive(now)
        key = ec.generate_private_key(ec.SECP256R1())
        uri = f"{certificate.URI_SCHEME}{self.cluster_id}/node/{node}"
        names = [*(_general_name(address) for address in addresses), x509.UniformResourceIdentifier(uri)]
        issued = (
            self._issue(f"appliance node {node}", key, now=now, days=days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._signing_key(), hashes.SHA256())
        )
        return IssuedKey(issued.public_bytes(serialization.Encoding.PEM), _pkcs8(key))

    def check_alive(self, now: float) -> None:
        """Raises `TrustError` where `now`, seconds since 1970, lies outside this certificate's life."""
        if not self.not_before <= now < self.expires_at:
            raise TrustError(
                f"the clock says {certificate.moment(now)}, the {self.title} lives from "
                f"{certificate.moment(self.not_before)} to {certificate.moment(self.expires_at)}",
                hint=f"set the clock; a {self.title} at its end must be replaced",
            )

    def _issue(self, name: str, key: ec.EllipticCurvePrivateKey, *, now: int, days: int) -> x509.CertificateBuilder:
        """Begins a certificate by this issuer that lives from a day back for `days`, within the issuer's own life."""
        return _builder(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            self._certificate.subject,
            key.public_key(),
            not_before=max(now - DAY_S, self.not_before),
            not_after=min(now + days * DAY_S, self.expires_at),
        ).add_extension(self._authority_key_id(), critical=False)

    def _authority_key_id(self) -> x509.AuthorityKeyIdentifier:
        known = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known.value)

    def sign(self, payload_type: str, body: bytes) -> Envelope:
        """Returns `body` in a signed envelope, with this certificate in it where a verifier can't have it.

        Raises:
            PassphraseError: this is a root whose key is locked.
        """
        return sign_envelope(self._signing_key(), payload_type, body, certificate_pem=self.chain_pem.decode())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.cluster_id}, {self.fingerprint})"


class Authority(Issuer):
    """A root certificate with its key, which may be locked: then what would need it raises `PassphraseError`."""

    __slots__ = ("_sealed",)
    title = "root CA"

    def __init__(
        self, issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey | None, *, sealed_key: bytes = b""
    ) -> None:
        super().__init__(issuer, key)
        self._sealed = sealed_key

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
        root = (
            _builder(name, name, key.public_key(), not_before=now - DAY_S, not_after=now + ROOT_DAYS * DAY_S)
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(_cluster_uri(cluster_id), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(root, key)

    @classmethod
    def load(cls, cert_pem: bytes, key_pem: bytes) -> Self:
        """Loads a root from its two files; one whose key lies under a passphrase is locked.

        Raises:
            TrustError: damaged, of another kind, not belonging together.
        """
        root = certificate.load_pem(cert_pem)
        if not key_pem.startswith(sealed.ROOT_KEY):
            return cls(root, _load_key(key_pem, cls.title))
        locked = cls(root, None, sealed_key=key_pem)
        if sealed.about(key_pem, magic=sealed.ROOT_KEY).get("key_id") != locked.key_id:
            raise TrustError("the sealed root key is another root's", hint="restore both from one backup")
        return locked

    @property
    def chain_pem(self) -> bytes:
        """Nothing: a root is known to whoever trusts it."""
        return b""

    @property
    def is_locked(self) -> bool:
        """Whether the key lies under a passphrase, and isn't open in this object."""
        return self._key is None

    def check_open(self) -> None:
        """Raises `PassphraseError` where the key is locked."""
        self._signing_key()

    def unlock(self, passphrase: Secret) -> Authority:
        """Returns the same root with its key open; this one when it isn't locked. Takes half a second and 128 MiB.

        Raises:
            WrongPassphraseError: the wrong passphrase, or a changed file.
            TrustError: the box opens, and holds something else.
        """
        if not self.is_locked:
            return self
        try:
            plain = sealed.open_sealed(self._sealed, passphrase, magic=sealed.ROOT_KEY)
        except TrustError:
            raise WrongPassphraseError(
                "the passphrase is wrong, or the root key's file was changed; nothing was done",
                hint="try it again; without it the root key can't be used, by anybody",
            ) from None
        return type(self)(self._certificate, _load_key(plain, self.title), sealed_key=self._sealed)

    def key_file(self, passphrase: Secret | None = None) -> Secret:
        """Returns what its key's file holds: PKCS #8 PEM, or that sealed where a passphrase is given (0.5 s, 128 MiB).

        Raises:
            UsageError: a passphrase that protects nothing.
            PassphraseError: the key is locked.
        """
        plain = _pkcs8(self._signing_key())
        if passphrase is None:
            return plain
        about = {"cluster_id": self.cluster_id, "key_id": self.key_id}
        return Secret(sealed.seal(plain.reveal(), passphrase, magic=sealed.ROOT_KEY, about=about))

    def issue_issuing(self, *, now: int, days: int = ISSUING_DAYS) -> IssuedKey:
        """Makes a key and a certificate for an issuing CA, path length 0.

        It has the cluster's name and no name constraints: whom a node may be called is in its certificate's URI, which
        each SE compares with its own cluster, and nobody else trusts this root.

        Raises:
            TrustError: `now` lies outside the root's own life.
            PassphraseError: the key is locked.
        """
        self.check_alive(now)
        key = ec.generate_private_key(ec.SECP256R1())
        issued = (
            self._issue(f"issuing {self.cluster_id}", key, now=now, days=days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(_cluster_uri(self.cluster_id), critical=False)
            .sign(self._signing_key(), hashes.SHA256())
        )
        return IssuedKey(issued.public_bytes(serialization.Encoding.PEM), _pkcs8(key))

    def cross_sign(self, successor: Authority, *, now: int) -> bytes:
        """Returns the successor's key in a CA certificate by this root, PEM (RFC 4949, cross-certification).

        With it in a node's chain, who still trusts only this root accepts nodes that the successor certified. It says
        the same as the successor's own certificate, but ends with this root's life.

        Raises:
            TrustError: a root of another cluster.
            PassphraseError: the key is locked.
        """
        other = successor._certificate
        if successor.cluster_id != self.cluster_id:
            raise TrustError(f"a root of cluster {successor.cluster_id}, expected {self.cluster_id}")
        builder = _builder(
            other.subject,
            self._certificate.subject,
            successor._signing_key().public_key(),
            not_before=max(now - DAY_S, self.not_before),
            not_after=min(successor.expires_at, self.expires_at),
        )
        for extension in other.extensions:
            if not isinstance(extension.value, x509.AuthorityKeyIdentifier | x509.SubjectKeyIdentifier):
                builder = builder.add_extension(extension.value, critical=extension.critical)
        crossed = builder.add_extension(self._authority_key_id(), critical=False)
        return crossed.sign(self._signing_key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _load_key(raw: bytes, title: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(raw, None)
    except Exception:  # noqa: BLE001 - damaged: ValueError, TypeError, UnsupportedAlgorithm or InternalError
        raise TrustError(f"the {title} key can't be read: it is damaged", hint="restore it from a backup") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError(f"the {title} key is of another kind, ECDSA P-256 expected")
    return key


def _pkcs8(key: ec.EllipticCurvePrivateKey) -> Secret:
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Secret(key.private_bytes(*form))


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _cluster_uri(cluster_id: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{certificate.URI_SCHEME}{cluster_id}")])


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
