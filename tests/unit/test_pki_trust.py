"""pki.envelope and pki.trust: who may speak for a cluster, and what is believed."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from forgery import NOW, Forged, forge, root_of
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import ApplianceError, TrustError
from appliance.pki.authority import Authority, Issuer
from appliance.pki.certificate import certificate_terms
from appliance.pki.envelope import combine, sign_envelope, verify_envelope
from appliance.pki.identity import Identity
from appliance.pki.trust import verify_audit_head, verify_receipt, verify_trust
from appliance.protocol import strict_json
from appliance.protocol.strict_json import MalformedError
from appliance.protocol.trust import (
    AUDIT_HEAD_TYPE,
    RECEIPT_TYPE,
    TRUST_TYPE,
    AuditHead,
    Envelope,
    EnvelopeSignature,
    Receipt,
    TrustDocument,
    TrustNode,
    replaces,
)

OURS = Authority.create("c-1", now=NOW)
NEXT = Authority.create("c-1", now=NOW)
THEIRS = Authority.create("c-2", now=NOW)
IMPOSTOR = Authority.create("c-1", now=NOW)
LINE = Identity.create().public_line


def pem(authority: Authority) -> str:
    return authority.certificate_pem.decode()


NODE = TrustNode(number=1, enroll=["10.0.0.1:8443"], ssh=["[2001:db8::1]:22"], host_keys=[LINE])
DOCUMENT = TrustDocument(
    cluster_id="c-1",
    version=2,
    epoch=1,
    signed_at=NOW,
    roots=[pem(OURS)],
    nodes=[NODE],
    revoked_node_keys=["0" * 64],
    login_keys=[LINE],
    bundle_key=LINE,
)
RECEIPT = Receipt(
    cluster_id="c-1",
    se_id="6f3b7c1a-2b4d-4e5f-8a9b-0c1d2e3f4a5b",
    thumbprint="SHA256:x",
    number=7,
    image_key_id="ik-0123456789ab",
    epoch=1,
    issued_at=NOW,
)


def signed(document: object, by: Authority = OURS, kind: str = TRUST_TYPE) -> Envelope:
    return by.sign(kind, document if isinstance(document, bytes) else strict_json.encode(document))


def changed(**fields: Any) -> TrustDocument:
    return msgspec.structs.replace(DOCUMENT, **fields)


# ----------------------------------------------------------------------------------------------- envelope


@given(st.binary(max_size=100), st.text(max_size=20))
def test_an_envelope_gives_back_what_was_signed(body: bytes, kind: str) -> None:
    assert verify_envelope(OURS.sign(kind, body), kind, [pem(THEIRS), pem(OURS)]) == body


def test_an_envelope_over_another_kind_is_refused() -> None:
    receipt = signed(RECEIPT, kind=RECEIPT_TYPE)
    for kind in (TRUST_TYPE, AUDIT_HEAD_TYPE, "", RECEIPT_TYPE.upper()):
        with pytest.raises(TrustError, match="envelope of type"):
            verify_envelope(receipt, kind, [pem(OURS)])
        relabelled = msgspec.structs.replace(receipt, payload_type=kind)
        with pytest.raises(TrustError, match="does not verify"):
            verify_envelope(relabelled, kind, [pem(OURS)])


def test_an_envelope_by_a_stranger_is_refused() -> None:
    for envelope in (signed(b"x", THEIRS), signed(b"x", IMPOSTOR)):
        with pytest.raises(TrustError, match="isn't signed by a root this side trusts"):
            verify_envelope(envelope, TRUST_TYPE, [pem(OURS), pem(NEXT)])
    with pytest.raises(TrustError, match="isn't signed by a root"):
        verify_envelope(signed(b"x"), TRUST_TYPE, [])
    with pytest.raises(TrustError, match="isn't signed by a root"):
        verify_envelope(Envelope(payload="", payload_type=TRUST_TYPE, signatures=[]), TRUST_TYPE, [pem(OURS)])


def test_a_strangers_signature_under_our_key_id_is_refused() -> None:
    borrowed = EnvelopeSignature(keyid=signed(b"x").signatures[0].keyid, sig=signed(b"x", IMPOSTOR).signatures[0].sig)
    with pytest.raises(TrustError, match="does not verify"):
        verify_envelope(msgspec.structs.replace(signed(b"x"), signatures=[borrowed]), TRUST_TYPE, [pem(OURS)])


@pytest.mark.parametrize("sig", ["", "!", "AAAA", "ä", base64.b64encode(b"\x30\x06\x02\x01\x00\x02\x01\x00").decode()])
def test_a_signature_that_is_none(sig: str) -> None:
    entry = msgspec.structs.replace(signed(b"x").signatures[0], sig=sig)
    with pytest.raises(TrustError, match="does not verify"):
        verify_envelope(msgspec.structs.replace(signed(b"x"), signatures=[entry]), TRUST_TYPE, [pem(OURS)])


def test_one_good_signature_among_others_is_enough_but_not_among_too_many() -> None:
    good = signed(b"x")
    noise = EnvelopeSignature(keyid="00", sig="")
    broken = msgspec.structs.replace(good.signatures[0], sig="AAAA")
    mixed = msgspec.structs.replace(good, signatures=[noise, broken, *good.signatures])
    assert verify_envelope(mixed, TRUST_TYPE, [pem(OURS)]) == b"x"
    crowd = msgspec.structs.replace(good, signatures=[noise] * 8 + good.signatures)
    with pytest.raises(TrustError, match="9 signatures, at most 8"):
        verify_envelope(crowd, TRUST_TYPE, [pem(OURS)])


@given(st.data())
def test_no_changed_payload_verifies(data: st.DataObject) -> None:
    good = signed(DOCUMENT)
    position = data.draw(st.integers(0, len(good.payload) - 1))
    char = data.draw(st.characters(codec="ascii").filter(lambda char: char != good.payload[position]))
    payload = good.payload[:position] + char + good.payload[position + 1 :]
    with pytest.raises(TrustError):
        verify_trust(msgspec.structs.replace(good, payload=payload), anchors=[pem(OURS)], current=None)


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)])
def test_an_anchor_of_another_kind_of_key(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    anchor = forge(None, ca=True, uris=("appliance://c-1",), key=key).pem.decode()
    with pytest.raises(TrustError, match="another kind, ECDSA P-256 expected"):
        verify_envelope(signed(b"x"), TRUST_TYPE, [anchor])


# ----------------------------------------------------------------------------------------------- trust document


def test_a_first_document_is_believed_by_the_seeds_root_alone() -> None:
    assert verify_trust(signed(DOCUMENT), anchors=[pem(OURS)], current=None) == DOCUMENT
    bare = changed(nodes=[], revoked_node_keys=[], login_keys=[], bundle_key="")
    assert verify_trust(signed(bare), anchors=[pem(OURS)], current=None) == bare


def test_roots_change_hands_step_by_step() -> None:
    both = changed(version=3, roots=[pem(OURS), pem(NEXT)])
    after = changed(version=4, roots=[pem(NEXT)])
    # The next root is believed only once the root in force has named it.
    with pytest.raises(TrustError, match="isn't signed by a root"):
        verify_trust(signed(both, NEXT), anchors=DOCUMENT.roots, current=DOCUMENT)
    step = verify_trust(signed(both), anchors=DOCUMENT.roots, current=DOCUMENT)
    assert replaces(step, DOCUMENT)
    last = verify_trust(signed(after, NEXT), anchors=step.roots, current=step)
    assert replaces(last, step)
    # And from then on the old root signs nothing.
    with pytest.raises(TrustError, match="isn't signed by a root"):
        verify_trust(signed(changed(version=5)), anchors=last.roots, current=last)


def test_an_older_document_is_genuine_but_replaces_nothing() -> None:
    for version in (1, 2):
        old = verify_trust(signed(changed(version=version)), anchors=[pem(OURS)], current=DOCUMENT)
        assert not replaces(old, DOCUMENT)
    new = verify_trust(signed(changed(version=3)), anchors=[pem(OURS)], current=DOCUMENT)
    assert replaces(new, DOCUMENT)


def test_a_document_of_another_cluster_is_refused_whoever_signs_it() -> None:
    foreign = changed(cluster_id="c-2", roots=[pem(THEIRS)])
    with pytest.raises(TrustError, match="isn't signed by a root"):
        verify_trust(signed(foreign, THEIRS), anchors=[pem(OURS)], current=None)
    with pytest.raises(TrustError, match="trust document of cluster 'c-2', expected 'c-1'"):
        verify_trust(signed(foreign), anchors=[pem(OURS)], current=None)
    # Anchors given from elsewhere don't move an SE to another cluster either.
    with pytest.raises(TrustError, match="trust document of cluster 'c-2', expected 'c-1'"):
        verify_trust(signed(foreign, THEIRS), anchors=[pem(THEIRS)], current=DOCUMENT)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"version": 0}, "version 0"),
        ({"epoch": -1}, "epoch -1"),
        ({"roots": []}, "0 roots, 1 to 4 expected"),
        ({"roots": [pem(OURS)] * 5}, "5 roots, 1 to 4 expected"),
        ({"roots": ["garbage"]}, "no PEM certificate"),
        ({"roots": [pem(OURS) + pem(NEXT)]}, "2 certificates in one PEM"),
        ({"roots": [pem(OURS), pem(THEIRS)]}, "root certificate of cluster 'c-2', expected 'c-1'"),
        ({"roots": [forge(None, uris=("appliance://c-1",)).pem.decode()]}, "is no CA certificate"),
        ({"roots": [forge(None, ca=True).pem.decode()]}, "root certificate of cluster 'c-1'"),
        ({"roots": [forge(None, ca=True, uris=()).pem.decode()]}, "root certificate of cluster ''"),
        ({"nodes": [NODE, NODE]}, "each once"),
        ({"nodes": [msgspec.structs.replace(NODE, number=0)]}, "each once within"),
        ({"nodes": [msgspec.structs.replace(NODE, host_keys=["ssh-rsa AAAA"])]}, "'ssh-rsa'"),
        ({"nodes": [msgspec.structs.replace(NODE, enroll=["host:99999"])]}, "node 1: 'host:99999' is no address"),
        ({"nodes": [msgspec.structs.replace(NODE, ssh=[""])]}, "node 1: '' is no address"),
        ({"revoked_node_keys": ["AB" * 32]}, "revoked node key"),
        ({"login_keys": [LINE + "\n" + LINE]}, "base64"),
        ({"login_keys": ['command="x" ' + LINE]}, "of type"),
        ({"bundle_key": "x"}, "of type 'x'"),
    ],
)
def test_a_signed_document_that_breaks_a_rule(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(TrustError, match=says):
        verify_trust(signed(changed(**fields)), anchors=[pem(OURS)], current=None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        strict_json.encode(DOCUMENT)[:-1] + b',"extra":1}',
        strict_json.encode(DOCUMENT)[:-1] + b',"version":9}',
        strict_json.encode(DOCUMENT) + b" " * (256 * 1024),
    ],
)
def test_a_signed_body_that_is_no_such_document(body: bytes) -> None:
    with pytest.raises(MalformedError):
        verify_trust(signed(body), anchors=[pem(OURS)], current=None)


def test_a_node_certificate_signs_nothing() -> None:
    node = forge(root_of(OURS), uris=("appliance://c-1/node/1",))
    assert isinstance(node.key, ec.EllipticCurvePrivateKey)
    envelope = sign_envelope(node.key, TRUST_TYPE, strict_json.encode(DOCUMENT))
    with pytest.raises(TrustError, match="isn't signed by a root"):
        verify_trust(envelope, anchors=[pem(OURS)], current=None)


def test_an_anchor_without_a_cluster_vouches_for_none() -> None:
    nameless = forge(None, ca=True, uris=())
    assert isinstance(nameless, Forged)
    assert isinstance(nameless.key, ec.EllipticCurvePrivateKey)
    envelope = sign_envelope(nameless.key, TRUST_TYPE, strict_json.encode(DOCUMENT))
    with pytest.raises(TrustError, match="expected ''"):
        verify_trust(envelope, anchors=[nameless.pem.decode()], current=None)


# ----------------------------------------------------------------------------------------------- receipt


def test_a_receipt_is_believed_by_its_own_cluster() -> None:
    assert verify_receipt(signed(RECEIPT, kind=RECEIPT_TYPE), [pem(OURS)]) == RECEIPT
    assert verify_receipt(signed(RECEIPT, kind=RECEIPT_TYPE), [pem(NEXT), pem(OURS)]) == RECEIPT


@pytest.mark.parametrize(
    ("envelope", "kind"),
    [
        (signed(RECEIPT, THEIRS, RECEIPT_TYPE), TrustError),
        (signed(msgspec.structs.replace(RECEIPT, cluster_id="c-2"), kind=RECEIPT_TYPE), TrustError),
        (signed(msgspec.structs.replace(RECEIPT, se_id="../../x"), kind=RECEIPT_TYPE), TrustError),
        (signed(msgspec.structs.replace(RECEIPT, number=0), kind=RECEIPT_TYPE), TrustError),
        (signed(msgspec.structs.replace(RECEIPT, number=1 << 30), kind=RECEIPT_TYPE), TrustError),
        (signed(msgspec.structs.replace(RECEIPT, name="../x"), kind=RECEIPT_TYPE), TrustError),
        (signed(RECEIPT), TrustError),
        (signed(DOCUMENT), TrustError),
        (signed(DOCUMENT, kind=RECEIPT_TYPE), MalformedError),
        (signed(strict_json.encode(RECEIPT) + b" " * 5000, kind=RECEIPT_TYPE), MalformedError),
    ],
)
def test_a_receipt_that_is_none(envelope: Envelope, kind: type[ApplianceError]) -> None:
    with pytest.raises(kind):
        verify_receipt(envelope, [pem(OURS)])


HEAD = AuditHead(cluster_id="c-1", node=1, epoch=1, sequence=9, hash="ab" * 32, time=NOW)


def head(**fields: Any) -> bytes:
    return strict_json.encode(msgspec.structs.replace(HEAD, **fields))


def test_an_audit_head_is_believed_by_its_own_cluster() -> None:
    assert verify_audit_head(signed(HEAD, kind=AUDIT_HEAD_TYPE), [pem(OURS)]) == HEAD


@pytest.mark.parametrize(
    ("envelope", "kind"),
    [
        (signed(HEAD, THEIRS, AUDIT_HEAD_TYPE), TrustError),
        (signed(HEAD, IMPOSTOR, AUDIT_HEAD_TYPE), TrustError),
        (signed(HEAD, kind=RECEIPT_TYPE), TrustError),
        (signed(head(cluster_id="c-2"), kind=AUDIT_HEAD_TYPE), TrustError),
        (signed(head(node=0), kind=AUDIT_HEAD_TYPE), TrustError),
        (signed(head(node=1 << 20), kind=AUDIT_HEAD_TYPE), TrustError),
        (signed(head(epoch=-1), kind=AUDIT_HEAD_TYPE), TrustError),
        (signed(head(sequence=-1), kind=AUDIT_HEAD_TYPE), TrustError),
        (signed(head(hash="ab"), kind=AUDIT_HEAD_TYPE), TrustError),
        (signed(RECEIPT, kind=AUDIT_HEAD_TYPE), MalformedError),
    ],
)
def test_an_audit_head_that_is_none(envelope: Envelope, kind: type[ApplianceError]) -> None:
    with pytest.raises(kind):
        verify_audit_head(envelope, [pem(OURS)])


# ------------------------------------------------------------------------------------------ a change of root


# --------------------------------------------------------------------------------------- an issuing CA's signature


def issuing(authority: Authority = OURS) -> Issuer:
    made = authority.issue_issuing(now=NOW)
    return Issuer.load(made.certificate_pem, made.key.reveal())


def receipt_by(issuer: Issuer) -> Envelope:
    return issuer.sign(RECEIPT_TYPE, strict_json.encode(RECEIPT))


def test_an_issuing_ca_signs_receipts_and_audit_heads_in_its_roots_name() -> None:
    issuer = issuing()
    assert verify_receipt(receipt_by(issuer), [pem(OURS)]) == RECEIPT
    head = issuer.sign(AUDIT_HEAD_TYPE, strict_json.encode(HEAD))
    assert verify_audit_head(head, [pem(OURS)]) == HEAD
    # A root's own signature carries no certificate, as it always did.
    assert b"cert" not in strict_json.encode(OURS.sign(RECEIPT_TYPE, b"{}"))


def test_an_issuing_ca_signs_no_trust_document() -> None:
    """It lies on a disk in the clear: who takes it must not say whom SEs believe."""
    signed_ = issuing().sign(TRUST_TYPE, strict_json.encode(DOCUMENT))
    with pytest.raises(TrustError, match="isn't signed by a root"):
        verify_trust(signed_, anchors=[pem(OURS)], current=None)


def test_a_revoked_issuing_ca_signs_nothing_more() -> None:
    issuer = issuing()
    with pytest.raises(TrustError, match="isn't signed by a root"):
        verify_receipt(receipt_by(issuer), [pem(OURS)], [issuer.key_id])
    assert verify_receipt(receipt_by(issuing()), [pem(OURS)], [issuer.key_id]) == RECEIPT
    head = issuer.sign(AUDIT_HEAD_TYPE, strict_json.encode(HEAD))
    with pytest.raises(TrustError, match="isn't signed by a root"):
        verify_audit_head(head, [pem(OURS)], {issuer.key_id})


def by(forged: Forged, *, cert: bytes | None = None) -> Envelope:
    assert isinstance(forged.key, ec.EllipticCurvePrivateKey)
    text = (cert or forged.pem).decode()
    return sign_envelope(forged.key, RECEIPT_TYPE, strict_json.encode(RECEIPT), certificate_pem=text)


CA = {"name": "issuing", "uris": ("appliance://c-1",), "usages": None, "ca": True, "path_length": 0}


def _below_an_issuing_ca() -> Envelope:
    first = forge(root_of(OURS), **CA)  # type: ignore[arg-type]
    return by(forge(first, **CA))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "envelope",
    [
        receipt_by(issuing(THEIRS)),
        receipt_by(issuing(Authority.create("c-1", now=NOW))),
        by(forge(root_of(OURS))),  # a node's certificate
        by(forge(root_of(OURS), **{**CA, "ca": False, "path_length": None})),  # type: ignore[arg-type]
        by(forge(root_of(OURS), **{**CA, "path_length": None})),  # type: ignore[arg-type]
        by(forge(root_of(OURS), **{**CA, "path_length": 1})),  # type: ignore[arg-type]
        by(forge(root_of(OURS), **{**CA, "uris": ("appliance://c-2",)})),  # type: ignore[arg-type]
        by(forge(root_of(OURS), **{**CA, "uris": ("appliance://c-1/node/1",)})),  # type: ignore[arg-type]
        _below_an_issuing_ca(),
        by(forge(None, **CA)),  # type: ignore[arg-type]
        by(forge(None, **CA), cert=issuing().certificate_pem),  # type: ignore[arg-type]
    ],
    ids=[
        "another cluster", "another root", "node", "no CA", "no path length", "path length 1", "names another cluster",
        "names a node", "below an issuing CA", "self-signed", "somebody else's certificate",
    ],
)  # fmt: skip
def test_a_certificate_in_an_envelope_that_counts_for_nothing(envelope: Envelope) -> None:
    with pytest.raises(TrustError, match="isn't signed by a root"):
        verify_receipt(envelope, [pem(OURS)])


def test_a_certificate_in_an_envelope_that_is_none() -> None:
    garbage = sign_envelope(root_of(THEIRS).key, RECEIPT_TYPE, b"{}", certificate_pem="garbage")  # type: ignore[arg-type]
    with pytest.raises(TrustError, match="no PEM certificate"):
        verify_receipt(garbage, [pem(OURS)])


def test_an_issuing_cas_certificate_over_anothers_signature_does_not_verify() -> None:
    issuer = issuing()
    entry = receipt_by(issuer).signatures[0]
    stolen = msgspec.structs.replace(receipt_by(issuing()).signatures[0], keyid=entry.keyid, cert=entry.cert)
    envelope = msgspec.structs.replace(receipt_by(issuer), signatures=[stolen])
    with pytest.raises(TrustError, match="signature does not verify"):
        verify_receipt(envelope, [pem(OURS)])


def test_two_roots_sign_one_document() -> None:
    body = strict_json.encode(DOCUMENT)
    both = combine([OURS.sign(TRUST_TYPE, body), NEXT.sign(TRUST_TYPE, body)])
    for root in (OURS, NEXT):
        assert verify_envelope(both, TRUST_TYPE, [pem(root)]) == body
    with pytest.raises(TrustError, match="different payloads"):
        combine([OURS.sign(TRUST_TYPE, body), NEXT.sign(TRUST_TYPE, b"{}")])


def test_a_root_certifies_its_successor_and_no_stranger() -> None:
    crossed = certificate_terms(OURS.cross_sign(NEXT, now=NOW))
    own = certificate_terms(NEXT.certificate_pem)
    assert crossed.is_authority
    assert (crossed.key_id, crossed.cluster_id) == (own.key_id, own.cluster_id)
    assert crossed.fingerprint != own.fingerprint
    with pytest.raises(TrustError, match="a root of cluster c-2"):
        OURS.cross_sign(THEIRS, now=NOW)
