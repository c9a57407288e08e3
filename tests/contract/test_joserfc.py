"""Our strict JWS against a general JOSE library: what we sign it verifies, what it signs we verify.

And where the library is lax, we aren't: each of its lax answers is shown beside our refusal, so that nobody replaces
`protocol.jws` by it (FACTS, trap 15).
"""

from __future__ import annotations

import copy
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jws as jose
from joserfc.errors import BadSignatureError
from joserfc.jwk import GuestProtocol, OKPKey

from appliance.pki import jws as pki_jws
from appliance.pki.identity import Identity
from appliance.pki.image_key import create_image_key
from appliance.protocol import jws
from appliance.protocol.strict_json import MalformedError

ALGORITHMS = ["Ed25519"]
ROLES: tuple[Literal["image", "se"], ...] = ("image", "se")

IMAGE_KEY_ID, IMAGE = create_image_key()
SE = Identity.create()
PUBLIC_LINES = {IMAGE_KEY_ID: IMAGE.public_line, SE.thumbprint: SE.public_line}
KEYS = {
    IMAGE_KEY_ID: OKPKey.import_key(IMAGE.pkcs8().reveal().decode()),
    SE.thumbprint: OKPKey.import_key(SE.pkcs8().reveal().decode()),
}


def key_of(member: GuestProtocol) -> OKPKey:
    return KEYS[member.headers()["kid"]]


def ours(payload: bytes) -> dict[str, Any]:
    raw = pki_jws.sign(payload, [("image", IMAGE_KEY_ID, IMAGE), ("se", SE.thumbprint, SE)])
    document: dict[str, Any] = json.loads(raw)
    return document


def theirs(payload: bytes, *headers: dict[str, Any]) -> dict[str, Any]:
    fields = headers or (
        {"alg": "Ed25519", "kid": IMAGE_KEY_ID, "typ": "image"},
        {"alg": "Ed25519", "kid": SE.thumbprint, "typ": "se"},
    )
    return dict(jose.serialize_json([{"protected": entry} for entry in fields], payload, key_of, algorithms=ALGORITHMS))


def they_verify(document: dict[str, Any]) -> bytes | None:
    value: Any = copy.deepcopy(document)
    found: jose.GeneralJSONSignature = jose.deserialize_json(value, key_of, algorithms=ALGORITHMS)
    return found.payload


def we_verify(document: dict[str, Any]) -> bytes | None:
    found = jws.parse(json.dumps(document).encode(), types=ROLES)
    return (
        found.payload
        if all(pki_jws.verify(entry, PUBLIC_LINES[entry.header.kid]) for entry in found.signatures)
        else None
    )


@given(st.binary(max_size=200))
def test_the_library_verifies_what_we_sign(payload: bytes) -> None:
    assert they_verify(ours(payload)) == payload


@given(st.binary(max_size=200))
def test_we_verify_what_the_library_signs(payload: bytes) -> None:
    document = theirs(payload)
    assert set(document) == {"payload", "signatures"}
    assert we_verify(document) == payload


@given(st.binary(max_size=50), st.integers(0, 1), st.integers(0, 63), st.integers(1, 255))
def test_both_refuse_a_changed_signature(payload: bytes, which: int, position: int, change: int) -> None:
    for document in (ours(payload), theirs(payload)):
        value = bytearray(jws.decode_part(document["signatures"][which]["signature"]))
        value[position] ^= change
        document["signatures"][which]["signature"] = jws.encode_part(bytes(value))
        assert we_verify(document) is None
        with pytest.raises(BadSignatureError):
            they_verify(document)


def test_both_refuse_a_changed_payload() -> None:
    document = ours(b'{"se":1}')
    document["payload"] = jws.encode_part(b'{"se":2}')
    assert we_verify(document) is None
    with pytest.raises(BadSignatureError):
        they_verify(document)


def one_of_two(document: dict[str, Any]) -> None:
    del document["signatures"][1]


def one_twice(document: dict[str, Any]) -> None:
    document["signatures"][1] = document["signatures"][0]


def swapped(document: dict[str, Any]) -> None:
    document["signatures"].reverse()


def extra_names(document: dict[str, Any]) -> None:
    document["signatures"][0]["header"] = {"cty": "admin"}


@pytest.mark.parametrize("change", [one_of_two, one_twice, swapped, extra_names])
def test_what_the_library_takes_and_we_refuse(change: Any) -> None:
    document = ours(b"{}")
    change(document)
    assert they_verify(document) == b"{}"
    with pytest.raises(MalformedError):
        we_verify(document)


def test_a_kid_outside_the_signature_is_taken_by_the_library_and_refused_by_us() -> None:
    members: Any = [
        {"protected": {"alg": "Ed25519", "typ": "image"}, "header": {"kid": IMAGE_KEY_ID}},
        {"protected": {"alg": "Ed25519", "typ": "se"}, "header": {"kid": SE.thumbprint}},
    ]
    document = dict(jose.serialize_json(members, b"{}", key_of, algorithms=ALGORITHMS))
    assert they_verify(document) == b"{}"
    with pytest.raises(MalformedError, match=r"unknown field|missing required field"):
        we_verify(document)


def test_one_key_in_both_roles_is_taken_by_the_library_and_refused_by_us() -> None:
    document = theirs(
        b"{}",
        {"alg": "Ed25519", "kid": IMAGE_KEY_ID, "typ": "image"},
        {"alg": "Ed25519", "kid": IMAGE_KEY_ID, "typ": "se"},
    )
    assert they_verify(document) == b"{}"
    with pytest.raises(MalformedError, match="no key id of the role 'se'"):
        we_verify(document)
