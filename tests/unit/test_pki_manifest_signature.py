"""The signature of an OVA's manifest: as OpenSSL checks it, and everything that doesn't fit refused."""

from __future__ import annotations

import datetime as dt
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from appliance.errors import TrustError
from appliance.pki.manifest_signature import check_manifest, sign_manifest
from appliance.pki.secret import Secret

MANIFEST = b"SHA256(a.ovf)= 00\n"
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


def pem_of(key: Key, *, passphrase: bytes | None = None) -> Secret:
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return Secret(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))


def certificate_of(key: Key) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "publisher")])
    begins = dt.datetime(2025, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(begins).not_valid_after(begins + dt.timedelta(days=3650))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture(scope="module")
def certificate_pem(key: rsa.RSAPrivateKey) -> bytes:
    return certificate_of(key)


def test_what_is_signed_holds(tmp_path: Path, key: rsa.RSAPrivateKey, certificate_pem: bytes) -> None:
    signed = sign_manifest(MANIFEST, name="a.mf", certificate_pem=certificate_pem, key_pem=pem_of(key))
    line, _, rest = signed.partition(b"\n")
    assert line.startswith(b"SHA256(a.mf)= ")
    assert rest == certificate_pem
    assert check_manifest(MANIFEST, name="a.mf", signed=signed) == "CN=publisher"
    for name, content in (("mf", MANIFEST), ("signature", bytes.fromhex(line.split()[1].decode())), ("cert", rest)):
        (tmp_path / name).write_bytes(content)
    public = subprocess.run(
        ["openssl", "x509", "-in", "cert", "-pubkey", "-noout"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    (tmp_path / "public").write_bytes(public)
    checking = ["openssl", "dgst", "-sha256", "-verify", "public", "-signature", "signature", "mf"]
    assert b"Verified OK" in subprocess.run(checking, cwd=tmp_path, capture_output=True, check=True).stdout


def test_what_does_not_fit_is_refused(key: rsa.RSAPrivateKey, certificate_pem: bytes) -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    other = rsa.generate_private_key(65537, 2048)
    for pem, certificate, told in (
        (Secret(b"no key"), certificate_pem, "can't be read"),
        (pem_of(key, passphrase=b"x"), certificate_pem, "can't be read"),
        (pem_of(curve), certificate_of(curve), "no RSA key"),
        (pem_of(other), certificate_pem, "isn't that of the key"),
        (pem_of(key), b"no certificate", "no PEM certificate"),
    ):
        with pytest.raises(TrustError, match=told):
            sign_manifest(MANIFEST, name="a.mf", certificate_pem=certificate, key_pem=pem)


def test_what_was_changed_is_refused(key: rsa.RSAPrivateKey, certificate_pem: bytes) -> None:
    signed = sign_manifest(MANIFEST, name="a.mf", certificate_pem=certificate_pem, key_pem=pem_of(key))
    curve = certificate_of(ec.generate_private_key(ec.SECP256R1()))
    for manifest, name, content, told in (
        (MANIFEST + b"\n", "a.mf", signed, "isn't what its certificate signed"),
        (MANIFEST, "b.mf", signed, "certificate file begins with"),
        (MANIFEST, "a.mf", b"SHA256(a.mf)= zz\n" + certificate_pem, "isn't what its certificate signed"),
        (MANIFEST, "a.mf", signed.partition(b"\n")[0] + b"\n" + curve, "certificate file begins with"),
    ):
        with pytest.raises(TrustError, match=told):
            check_manifest(manifest, name=name, signed=content)
