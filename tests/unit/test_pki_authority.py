"""pki.authority and pki.certificate: what is issued, and what a certificate is read as."""

from __future__ import annotations

import hashlib
import ipaddress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from forgery import CLIENT_AUTH, DAY_S, NOW, forge
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import PassphraseError, TrustError, UsageError, WrongPassphraseError
from appliance.pki import certificate, sealed
from appliance.pki.authority import Authority, Issuer, certificate_terms
from appliance.pki.secret import Secret
from appliance.protocol.trust import TRUST_TYPE

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
OPEN = serialization.NoEncryption()

AUTHORITY = Authority.create("c-1", now=NOW)


def test_the_root_says_who_it_is_and_may_sign_one_intermediate() -> None:
    root = certificate.load_pem(AUTHORITY.certificate_pem)
    root.verify_directly_issued_by(root)
    assert root.subject.rfc4514_string() == "CN=appliance c-1"
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=1)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    key = root.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    terms = certificate_terms(AUTHORITY.certificate_pem)
    assert (terms.cluster_id, terms.node, terms.is_authority, terms.serves_tls) == ("c-1", None, True, False)
    assert AUTHORITY.cluster_id == "c-1"
    assert terms.not_before == AUTHORITY.not_before == NOW - DAY_S
    assert terms.not_after == AUTHORITY.expires_at
    assert 20 * 365 * DAY_S <= AUTHORITY.expires_at - NOW <= 20 * 366 * DAY_S
    assert AUTHORITY.fingerprint == hashlib.sha256(root.public_bytes(serialization.Encoding.DER)).hexdigest()
    assert repr(AUTHORITY) == f"Authority(c-1, {AUTHORITY.fingerprint})"


def test_a_node_certificate_names_node_and_addresses_and_serves_tls_only() -> None:
    issued = AUTHORITY.issue_node(node=3, addresses=["10.0.0.1", "2001:db8::1", "controller.example"], now=NOW)
    node = certificate.load_pem(issued.certificate_pem)
    node.verify_directly_issued_by(certificate.load_pem(AUTHORITY.certificate_pem))
    names = node.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address("10.0.0.1"),
        ipaddress.ip_address("2001:db8::1"),
    ]
    assert names.get_values_for_type(x509.DNSName) == ["controller.example"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["appliance://c-1/node/3"]
    usages = node.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not node.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    terms = certificate_terms(issued.certificate_pem)
    assert (terms.cluster_id, terms.node, terms.is_authority, terms.serves_tls) == ("c-1", 3, False, True)
    assert terms.not_before == NOW - DAY_S
    assert terms.not_after == NOW + 90 * DAY_S
    key = serialization.load_pem_private_key(issued.key.reveal(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == node.public_key()
    assert certificate.key_id(key.public_key()) == terms.key_id
    assert "PRIVATE" not in repr(issued)


def test_each_node_certificate_has_its_own_key() -> None:
    one, two = (AUTHORITY.issue_node(node=1, addresses=[], now=NOW) for _ in range(2))
    assert certificate_terms(one.certificate_pem).key_id != certificate_terms(two.certificate_pem).key_id


def test_a_node_certificate_stays_within_the_roots_life() -> None:
    first = certificate_terms(AUTHORITY.issue_node(node=1, addresses=[], now=AUTHORITY.not_before).certificate_pem)
    assert first.not_before == AUTHORITY.not_before
    last = AUTHORITY.issue_node(node=1, addresses=[], now=AUTHORITY.expires_at - 1, days=365)
    assert certificate_terms(last.certificate_pem).not_after == AUTHORITY.expires_at
    for now in (AUTHORITY.not_before - 1, AUTHORITY.expires_at):
        with pytest.raises(TrustError, match="the root CA lives from"):
            AUTHORITY.issue_node(node=1, addresses=[], now=now)


@pytest.mark.parametrize("node", [0, -1, 65_536])
def test_a_node_number_out_of_range(node: int) -> None:
    with pytest.raises(UsageError, match=r"outside 1\.\.65535"):
        AUTHORITY.issue_node(node=node, addresses=[], now=NOW)


@pytest.mark.parametrize(
    "address",
    ["", "ä.example", "a b", "*.example", "a..b", ".a", "-a", "a:1", "10.0.0.0/8", "a" * 64, "a.\n", "a." * 130],
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(UsageError, match="can't stand in a certificate"):
        AUTHORITY.issue_node(node=1, addresses=[address], now=NOW)


@pytest.mark.parametrize("cluster_id", ["", "C-1", "c_1", "-c", "c/1", "c.1", "x" * 55, "c\n", "ä"])
def test_a_cluster_id_has_one_form(cluster_id: str) -> None:
    with pytest.raises(UsageError, match="can't be a cluster id"):
        Authority.create(cluster_id, now=NOW)


def test_the_longest_cluster_id_fits() -> None:
    longest = "x" * 54
    assert certificate_terms(Authority.create(longest, now=NOW).certificate_pem).cluster_id == longest


@pytest.mark.parametrize("now", [0, 86_400, 4_102_444_800])
def test_a_root_can_be_made_in_1970_and_in_2099(now: int) -> None:
    authority = Authority.create("c-1", now=now)
    assert authority.not_before == now - DAY_S
    authority.issue_node(node=1, addresses=[], now=now)


def test_a_root_survives_its_files() -> None:
    again = Authority.load(AUTHORITY.certificate_pem, AUTHORITY.key_file().reveal())
    assert not again.is_locked
    assert again.unlock(Secret(b"not needed")) is again
    again.check_open()
    assert again.fingerprint == AUTHORITY.fingerprint
    node = certificate.load_pem(again.issue_node(node=1, addresses=[], now=NOW).certificate_pem)
    node.verify_directly_issued_by(certificate.load_pem(AUTHORITY.certificate_pem))


# A root key under a passphrase.

PASSPHRASE = Secret(b"correct horse battery")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passphrase is tried often here."""
    monkeypatch.setattr(sealed, "SCRYPT_LOG2_N", 4)


@pytest.mark.usefixtures("quick")
def test_a_locked_root_says_who_it_is_and_signs_nothing() -> None:
    text = AUTHORITY.key_file(PASSPHRASE).reveal()
    assert b"PRIVATE KEY" not in text
    assert _raw_key(AUTHORITY) not in text
    locked = Authority.load(AUTHORITY.certificate_pem, text)
    assert locked.is_locked
    assert (locked.cluster_id, locked.fingerprint) == (AUTHORITY.cluster_id, AUTHORITY.fingerprint)
    other = Authority.create("c-1", now=NOW)
    for act in (
        locked.check_open,
        lambda: locked.issue_node(node=1, addresses=[], now=NOW),
        lambda: locked.issue_issuing(now=NOW),
        lambda: locked.sign(TRUST_TYPE, b"x"),
        lambda: locked.cross_sign(other, now=NOW),
        lambda: other.cross_sign(locked, now=NOW),
        locked.key_file,
    ):
        with pytest.raises(PassphraseError, match="is locked: its passphrase is needed") as caught:
            act()
        assert caught.value.code == "TRUST-010"
    opened = locked.unlock(PASSPHRASE)
    assert not opened.is_locked
    assert opened.key_file() == AUTHORITY.key_file()
    assert locked.is_locked


@pytest.mark.usefixtures("quick")
def test_a_wrong_passphrase_opens_no_root() -> None:
    locked = Authority.load(AUTHORITY.certificate_pem, AUTHORITY.key_file(PASSPHRASE).reveal())
    with pytest.raises(WrongPassphraseError, match="the passphrase is wrong, or the root key's file was changed"):
        locked.unlock(Secret(b"correct horse batterz"))
    with pytest.raises(UsageError, match="shorter than"):
        AUTHORITY.key_file(Secret(b"short"))


@pytest.mark.usefixtures("quick")
def test_the_sealed_key_of_another_root_is_found_without_opening_it() -> None:
    other = Authority.create("c-1", now=NOW)
    with pytest.raises(TrustError, match="is another root's"):
        Authority.load(AUTHORITY.certificate_pem, other.key_file(PASSPHRASE).reveal())
    # One that only says that it is ours is found when it is opened.
    about = {"key_id": AUTHORITY.key_id}
    lie = sealed.seal(other.key_file().reveal(), PASSPHRASE, magic=sealed.ROOT_KEY, about=about)
    with pytest.raises(TrustError, match="don't belong together"):
        Authority.load(AUTHORITY.certificate_pem, lie).unlock(PASSPHRASE)
    with pytest.raises(TrustError, match="header is damaged"):
        Authority.load(AUTHORITY.certificate_pem, sealed.ROOT_KEY + b"\nnonsense\n")


def test_guessing_a_passphrase_is_slow() -> None:
    """scrypt with 128 MiB: PKCS #8 as cryptography writes it would be 2,048 rounds of PBKDF2."""
    assert 128 * 8 << sealed.SCRYPT_LOG2_N == 128 << 20


def _raw_key(authority: Authority) -> bytes:
    key = serialization.load_pem_private_key(authority.key_file().reveal(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.private_numbers().private_value.to_bytes(32, "big")


# The issuing CA.


def test_an_issuing_ca_signs_nodes_in_its_roots_name_and_no_other_ca() -> None:
    made = AUTHORITY.issue_issuing(now=NOW)
    issuing = Issuer.load(made.certificate_pem, made.key.reveal())
    certificate.load_pem(made.certificate_pem).verify_directly_issued_by(
        certificate.load_pem(AUTHORITY.certificate_pem)
    )
    terms = certificate_terms(made.certificate_pem)
    assert (terms.cluster_id, terms.node, terms.is_authority, terms.path_length) == ("c-1", None, True, 0)
    assert not terms.is_self_issued
    assert not terms.serves_tls
    assert (terms.not_before, terms.not_after) == (NOW - DAY_S, NOW + 365 * DAY_S)
    assert issuing.expires_at == terms.not_after
    node = issuing.issue_node(node=2, addresses=["10.0.0.1"], now=NOW)
    assert certificate.is_issued_by(node.certificate_pem, made.certificate_pem)
    assert not certificate.is_issued_by(node.certificate_pem, AUTHORITY.certificate_pem)
    assert issuing.chain_pem == made.certificate_pem
    assert AUTHORITY.chain_pem == b""
    assert repr(issuing) == f"Issuer(c-1, {terms.fingerprint})"
    assert not hasattr(issuing, "issue_issuing")


def test_lives_end_with_who_signed() -> None:
    late = AUTHORITY.issue_issuing(now=AUTHORITY.expires_at - DAY_S)
    issuing = Issuer.load(late.certificate_pem, late.key.reveal())
    assert issuing.expires_at == AUTHORITY.expires_at
    made = AUTHORITY.issue_issuing(now=NOW)
    issuing = Issuer.load(made.certificate_pem, made.key.reveal())
    node = issuing.issue_node(node=1, addresses=[], now=issuing.expires_at - 1)
    assert certificate_terms(node.certificate_pem).not_after == issuing.expires_at
    with pytest.raises(TrustError, match="the issuing CA lives from"):
        issuing.issue_node(node=1, addresses=[], now=issuing.expires_at)
    with pytest.raises(TrustError, match="the root CA lives from"):
        AUTHORITY.issue_issuing(now=AUTHORITY.expires_at)


def test_the_longest_cluster_id_has_an_issuing_ca() -> None:
    made = Authority.create("x" * 54, now=NOW).issue_issuing(now=NOW)
    assert certificate_terms(made.certificate_pem).cluster_id == "x" * 54


def test_a_node_or_a_stranger_is_no_issuing_ca() -> None:
    node = AUTHORITY.issue_node(node=1, addresses=[], now=NOW)
    with pytest.raises(TrustError, match="no CA certificate of a cluster"):
        Issuer.load(node.certificate_pem, node.key.reveal())
    named = forge(None, ca=True)
    with pytest.raises(TrustError, match="no CA certificate of a cluster"):
        Issuer.load(named.pem, named.key_pem)
    made, other = (AUTHORITY.issue_issuing(now=NOW) for _ in range(2))
    with pytest.raises(TrustError, match="don't belong together"):
        Issuer.load(made.certificate_pem, other.key.reveal())


def test_all_of_a_chain() -> None:
    pems = [AUTHORITY.certificate_pem, Authority.create("c-9", now=NOW).certificate_pem]
    assert certificate.all_of(b"".join(pems)) == pems
    assert certificate.all_of(b"") == []
    with pytest.raises(TrustError, match="no PEM certificate"):
        certificate.all_of(pems[0] + pems[1][:200])


def test_the_first_of_a_chain() -> None:
    made = AUTHORITY.issue_issuing(now=NOW)
    assert certificate.first_of(made.certificate_pem + AUTHORITY.certificate_pem) == made.certificate_pem
    with pytest.raises(TrustError, match="no PEM certificate"):
        certificate.first_of(b"garbage")


@pytest.mark.parametrize("pem", [b"", b"garbage", AUTHORITY.key_file().reveal()[:60]])
def test_a_damaged_root_key(pem: bytes) -> None:
    with pytest.raises(TrustError, match="can't be read"):
        Authority.load(AUTHORITY.certificate_pem, pem)


@pytest.mark.parametrize(
    "key",
    [
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
    ],
)
def test_a_root_key_of_another_kind(
    key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey,
) -> None:
    with pytest.raises(TrustError, match="another kind, ECDSA P-256 expected"):
        Authority.load(AUTHORITY.certificate_pem, key.private_bytes(PEM, PKCS8, OPEN))


def test_certificate_and_key_of_two_roots() -> None:
    other = Authority.create("c-1", now=NOW)
    with pytest.raises(TrustError, match="don't belong together"):
        Authority.load(AUTHORITY.certificate_pem, other.key_file().reveal())


@pytest.mark.parametrize(
    "fake", [forge(None), forge(None, ca=True, uris=()), forge(None, ca=True, uris=("spiffe://c-1",))]
)
def test_a_certificate_that_is_no_clusters_root(fake: object) -> None:
    with pytest.raises(TrustError, match="no CA certificate of a cluster"):
        Authority.load(fake.pem, fake.key_pem)  # type: ignore[attr-defined]


def test_the_root_signs_envelopes_under_its_key_id() -> None:
    envelope = AUTHORITY.sign(TRUST_TYPE, b"body")
    assert envelope.body() == b"body"
    assert [entry.keyid for entry in envelope.signatures] == [certificate_terms(AUTHORITY.certificate_pem).key_id]


def test_certificates_are_read_one_at_a_time() -> None:
    pem = AUTHORITY.certificate_pem
    assert certificate_terms(pem.decode()) == certificate_terms(pem)
    with pytest.raises(TrustError, match="2 certificates in one PEM text, exactly 1 expected"):
        certificate_terms(pem + pem)


@pytest.mark.parametrize("pem", ["", "garbage", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_text_that_is_no_certificate(pem: str) -> None:
    with pytest.raises(TrustError, match="no PEM certificate can be read"):
        certificate_terms(pem)


@pytest.mark.parametrize(
    ("uris", "expected"),
    [
        ((), ("", None)),
        (("https://c-1/node/1",), ("", None)),
        (("appliance://c-1",), ("c-1", None)),
        (("appliance://c-1/node/65535", "https://example"), ("c-1", 65_535)),
        (("appliance://c-1/",), ("", None)),
        (("appliance://c-1/node/0",), ("", None)),
        (("appliance://c-1/node/01",), ("", None)),
        (("appliance://c-1/node/1/x",), ("", None)),
        (("appliance://c-1/node/",), ("", None)),
        (("appliance://C-1/node/1",), ("", None)),
        (("appliance://c-1@c-2/node/1",), ("", None)),
        (("appliance://c-1/../c-2/node/1",), ("", None)),
        (("APPLIANCE://c-1/node/1",), ("", None)),
    ],
)
def test_only_the_one_form_of_uri_names_a_cluster(uris: tuple[str, ...], expected: tuple[str, int | None]) -> None:
    terms = certificate_terms(forge(None, uris=uris).pem)
    assert (terms.cluster_id, terms.node) == expected


def test_a_certificate_of_two_clusters_is_none() -> None:
    with pytest.raises(TrustError, match="names 2 clusters or nodes"):
        certificate_terms(forge(None, uris=("appliance://c-1/node/1", "appliance://c-2/node/1")).pem)


def test_usages_are_read_as_they_stand() -> None:
    assert certificate_terms(forge(None).pem).serves_tls
    assert not certificate_terms(forge(None, usages=None).pem).serves_tls
    assert not certificate_terms(forge(None, usages=CLIENT_AUTH).pem).serves_tls
    anything = (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)
    assert not certificate_terms(forge(None, usages=anything).pem).serves_tls


DER = forge(None).der


@given(st.integers(0, len(DER) - 1), st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(position: int, byte: int) -> None:
    changed = DER[:position] + bytes([byte]) + DER[position + 1 :]
    try:
        terms = certificate.terms_of(certificate.load_der(changed))
    except TrustError:
        return
    assert terms.fingerprint == hashlib.sha256(changed).hexdigest()


def test_broken_certificates_are_refused_as_untrusted() -> None:
    with pytest.raises(TrustError, match="can't be read"):
        certificate.load_der(b"garbage")
    # The same extension twice: reading the certificate succeeds, reading its extensions doesn't.
    doubled = DER.replace(bytes.fromhex("551d0e"), bytes.fromhex("551d23"), 1)
    with pytest.raises(TrustError, match="can't be read"):
        certificate.terms_of(certificate.load_der(doubled))


def test_times_in_messages() -> None:
    assert certificate.moment(0) == "1970-01-01 00:00:00 UTC"
    assert certificate.moment(4_070_908_800.9) == "2099-01-01 00:00:00 UTC"
    assert certificate.moment(1e30) == "1e+30 s since 1970"
    assert certificate.moment(float("nan")) == "nan s since 1970"
