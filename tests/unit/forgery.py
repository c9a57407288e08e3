"""Makes certificates that `pki.authority` would never issue, each wrong in one chosen way."""

from __future__ import annotations

import datetime as dt
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from appliance.pki.authority import Authority

NOW = 1_790_000_000
DAY_S = 86_400
SERVER_AUTH = (ExtendedKeyUsageOID.SERVER_AUTH,)
CLIENT_AUTH = (ExtendedKeyUsageOID.CLIENT_AUTH,)


class Forged(NamedTuple):
    """A certificate, its key, and both as PEM."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )


def root_of(authority: Authority) -> Forged:
    """The root's own certificate and key: the thief's view."""
    return Forged(authority._certificate, authority._key)


def forge(
    issuer: Forged | None,
    *,
    name: str = "forged",
    uris: tuple[str, ...] = ("appliance://c-1/node/1",),
    usages: tuple[ObjectIdentifier, ...] | None = SERVER_AUTH,
    ca: bool = False,
    path_length: int | None = None,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    critical_oid: str = "",
) -> Forged:
    """Makes a certificate signed by `issuer`, by itself where there is none; it lives a day before and after NOW."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signer = issuer or Forged(None, key)  # type: ignore[arg-type]
    usage = x509.KeyUsage(
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
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(dt.datetime.fromtimestamp(NOW - DAY_S, dt.UTC))
        .not_valid_after(dt.datetime.fromtimestamp(NOW + DAY_S, dt.UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
    )
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if critical_oid:
        unknown = x509.UnrecognizedExtension(ObjectIdentifier(critical_oid), b"\x05\x00")
        builder = builder.add_extension(unknown, critical=True)
    return Forged(builder.sign(signer.key, hashes.SHA256()), key)
