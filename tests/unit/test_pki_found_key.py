"""Whose a private key is that was found."""

from __future__ import annotations

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from appliance.pki import certificate, found_key
from appliance.pki.authority import Authority
from appliance.pki.identity import Identity


def test_an_ed25519_key_is_known_in_both_forms() -> None:
    identity = Identity.create()
    for pem in (identity.pkcs8().reveal(), identity.openssh().reveal()):
        mark = found_key.identify(pem)
        assert mark is not None
        assert mark.ssh_line == identity.public_line


def test_a_root_is_known_by_its_certificate() -> None:
    authority = Authority.create("c-1", now=1_800_000_000)
    mark = found_key.identify(authority.key_file().reveal())
    assert mark is not None
    assert mark.key_id == certificate.certificate_terms(authority.certificate_pem).key_id
    assert mark.ssh_line == ""


def test_other_kinds_have_a_key_id_alone() -> None:
    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        mark = found_key.identify(pem)
        assert mark is not None
        assert len(mark.key_id) == 64


def test_what_cannot_be_loaded_is_nobodys() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    sealed = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    for pem in (sealed, b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        assert found_key.identify(pem) is None
