"""protocol.trust: shapes of trust documents and envelopes, and which document replaces which."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import TrustError
from appliance.protocol import strict_json
from appliance.protocol.strict_json import MalformedError
from appliance.protocol.trust import (
    MAX_TRUST_BYTES,
    Envelope,
    EnvelopeSignature,
    TrustDocument,
    TrustNode,
    outlasts,
    pre_authentication_encoding,
    replaces,
)


def document(version: int, cluster_id: str = "c-1") -> TrustDocument:
    return TrustDocument(cluster_id=cluster_id, version=version, epoch=0, signed_at=0, roots=["pem"], nodes=[])


@pytest.mark.parametrize(("new", "current", "expected"), [(2, 1, True), (1, 1, False), (1, 2, False)])
def test_only_a_newer_version_replaces(new: int, current: int, expected: bool) -> None:
    assert replaces(document(new), document(current)) is expected


def test_anything_replaces_nothing() -> None:
    assert replaces(document(1), None)


def test_another_cluster_never_replaces() -> None:
    with pytest.raises(TrustError, match="cluster c-2, expected c-1") as caught:
        replaces(document(9, "c-2"), document(1))
    assert "controller address" in caught.value.hint


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (["a"], ["a"], True),
        (["a"], ["a", "b"], True),
        (["a", "b"], ["b"], False),
        (["a"], ["b"], False),
    ],
)
def test_what_was_signed_outlasts_new_roots_and_no_root_that_is_gone(
    before: list[str], now: list[str], expected: bool
) -> None:
    earlier, later = (msgspec.structs.replace(document(1), roots=roots) for roots in (before, now))
    assert outlasts(earlier, later) is expected


def test_what_was_signed_does_not_outlast_a_revocation() -> None:
    earlier = msgspec.structs.replace(document(1), revoked_node_keys=["00"])
    assert outlasts(earlier, msgspec.structs.replace(earlier, version=2))
    assert not outlasts(earlier, msgspec.structs.replace(earlier, revoked_node_keys=["00", "11"]))
    assert outlasts(earlier, document(2))


def test_pre_authentication_encoding_is_that_of_the_dsse_specification() -> None:
    # The example of the protocol document: github.com/secure-systems-lab/dsse, protocol.md, "Test vectors".
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == expected


@given(st.text(max_size=8), st.binary(max_size=8), st.text(max_size=8), st.binary(max_size=8))
def test_two_pairs_never_share_an_encoding(kind: str, body: bytes, kind2: str, body2: bytes) -> None:
    same = pre_authentication_encoding(kind, body) == pre_authentication_encoding(kind2, body2)
    assert same is ((kind, body) == (kind2, body2))


@given(st.binary(max_size=64))
def test_the_body_is_the_payload(body: bytes) -> None:
    assert Envelope(payload=base64.b64encode(body).decode(), payload_type="t", signatures=[]).body() == body


@pytest.mark.parametrize("payload", ["a", "Zg", "Zg=", "Z\ng==", " Zg==", "Zg==!", "Z-_=", "ä", "Zg==Zg=="])
def test_a_payload_that_is_no_base64_is_refused(payload: str) -> None:
    with pytest.raises(TrustError, match="no base64"):
        Envelope(payload=payload, payload_type="t", signatures=[]).body()


def test_an_envelope_is_spelled_as_dsse_says() -> None:
    envelope = Envelope(payload="Zg==", payload_type="t", signatures=[EnvelopeSignature(keyid="k", sig="s")])
    raw = strict_json.encode(envelope)
    assert raw == b'{"payload":"Zg==","payloadType":"t","signatures":[{"keyid":"k","sig":"s"}]}'
    assert strict_json.decode(raw, Envelope, max_bytes=1000) == envelope
    for text in (b'{"payload":"","payload_type":"t","signatures":[]}', raw[:-1] + b',"x":1}'):
        with pytest.raises(MalformedError):
            strict_json.decode(text, Envelope, max_bytes=1000)


def test_a_document_survives_its_encoding() -> None:
    node = TrustNode(number=1, enroll=["a:8443"], ssh=["a:22"], host_keys=["ssh-ed25519 AAAA"])
    full = msgspec.structs.replace(document(3), nodes=[node], revoked_node_keys=["00"], login_keys=["k"])
    assert strict_json.decode(strict_json.encode(full), TrustDocument, max_bytes=MAX_TRUST_BYTES) == full


@given(st.binary(max_size=100))
def test_foreign_bytes_are_refused_as_malformed(raw: bytes) -> None:
    for kind in (Envelope, TrustDocument):
        with pytest.raises(MalformedError):
            strict_json.decode(raw, kind, max_bytes=MAX_TRUST_BYTES)
