"""protocol.jws: of all a JOSE library would read, only our one form is accepted, before a signature is looked at."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.protocol import jws, strict_json
from appliance.protocol.strict_json import MalformedError

IMAGE_KID = "ik-0123456789ab"
SE_KID = "SHA256:" + "Ab+/" * 10 + "Abc"
BOTH = ("image", "se")


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def header(**changes: Any) -> dict[str, Any]:
    fields = {"alg": "Ed25519", "kid": IMAGE_KID, "typ": "image", **changes}
    return {name: value for name, value in fields.items() if value is not None}


def entry(fields: dict[str, Any] | bytes, value: bytes = bytes(64), **more: Any) -> dict[str, Any]:
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return {"protected": b64(raw), "signature": b64(value), **more}


IMAGE = entry(header(), b"i" * 64)
SE = entry(header(typ="se", kid=SE_KID), b"s" * 64)


def document(*entries: Any, payload: str = b64(b'{"a":1}'), **more: Any) -> bytes:
    return json.dumps({"payload": payload, "signatures": list(entries), **more}).encode()


def test_the_one_form_is_read() -> None:
    found = jws.parse(document(IMAGE, SE), types=("image", "se"))
    assert found.payload == b'{"a":1}'
    assert [item.header.typ for item in found.signatures] == list(BOTH)
    assert [item.header.kid for item in found.signatures] == [IMAGE_KID, SE_KID]
    assert [item.value for item in found.signatures] == [b"i" * 64, b"s" * 64]
    # RFC 7515 section 5.2: the text as sent is what was signed, not a header written anew.
    assert found.signatures[0].signing_input == (IMAGE["protected"] + "." + b64(b'{"a":1}')).encode()


def test_one_signature_by_the_se_is_a_form_of_its_own() -> None:
    assert jws.parse(document(SE), types=("se",)).signatures[0].header.typ == "se"
    with pytest.raises(MalformedError, match="2 signatures, exactly 1 expected"):
        jws.parse(document(IMAGE, SE), types=("se",))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([], "0 signatures, exactly 2"),
        ([IMAGE], "1 signatures, exactly 2"),
        ([SE], "1 signatures, exactly 2"),
        ([IMAGE, SE, SE], "3 signatures, exactly 2"),
        ([SE, IMAGE], "signature by 'se', 'image' expected"),
        ([IMAGE, IMAGE], "signature by 'image', 'se' expected"),
        ([SE, SE], "signature by 'se', 'image' expected"),
        ([IMAGE, entry(header(typ="se"))], "no key id of the role 'se'"),
        ([entry(header(kid=SE_KID)), SE], "no key id of the role 'image'"),
    ],
)
def test_number_order_and_roles_of_signatures(entries: list[Any], says: str) -> None:
    with pytest.raises(MalformedError, match=says):
        jws.parse(document(*entries), types=("image", "se"))


@pytest.mark.parametrize(
    "fields",
    [
        header(alg="none"),
        header(alg="None"),
        header(alg=""),
        header(alg="HS256"),
        header(alg="HS512"),
        header(alg="RS256"),
        header(alg="ES256"),
        header(alg="EdDSA"),
        header(alg="Ed448"),
        header(alg="ed25519"),
        header(alg=None),
        header(alg=["Ed25519"]),
        header(typ=None),
        header(typ="node"),
        header(typ="JWT"),
        header(kid=None),
        header(kid=7),
        header(jwk={"kty": "OKP", "crv": "Ed25519", "x": b64(bytes(32))}),
        header(jku="https://attacker.example/keys"),
        header(x5c=["AAAA"]),
        header(x5u="https://attacker.example/chain"),
        header(crit=["b64"], b64=False),
        header(crit=["exp"], exp=1),
        header(crit=[]),
        header(b64=True),
        header(zip="DEF"),
        header(cty="application/json"),
        header(enc="A128GCM"),
    ],
)
def test_headers_that_other_libraries_would_obey(fields: dict[str, Any]) -> None:
    with pytest.raises(MalformedError, match="not a Header"):
        jws.parse(document(entry(fields), SE), types=("image", "se"))


@pytest.mark.parametrize(
    "kid",
    [
        "",
        "ik-",
        "ik-0123456789a",
        "ik-0123456789abc",
        "ik-0123456789AB",
        "ik-0123456789ab\n",
        " ik-0123456789ab",
        "../../etc/passwd",
        "/etc/passwd",
        "ik-/../root-ca",
        "ik-..\\..\\..\\..",
        "ik-0123456789ab/../x",
        "ik-%2e%2e%2fabcdef",
        "ik-0123456789a*",
        "ik-０123456789ab",
        "' OR 1=1 --",
        "x" * 300,
    ],
)
def test_a_kid_is_an_id_and_never_a_path(kid: str) -> None:
    with pytest.raises(MalformedError, match="no key id of the role 'image'"):
        jws.parse(document(entry(header(kid=kid)), SE), types=("image", "se"))


@pytest.mark.parametrize(
    "kid", ["SHA256:", SE_KID[:-1], SE_KID + "A", SE_KID + "=", SE_KID.replace("+", "-"), "MD5:aa"]
)
def test_an_se_is_named_by_its_fingerprint(kid: str) -> None:
    with pytest.raises(MalformedError, match="no key id of the role 'se'"):
        jws.parse(document(entry(header(typ="se", kid=kid))), types=("se",))


@pytest.mark.parametrize(
    "raw",
    [
        document({**IMAGE, "header": {"kid": IMAGE_KID}}, SE),
        document({"header": header(), "signature": IMAGE["signature"]}, SE),
        document(
            {"protected": b64(b'{"alg":"Ed25519","typ":"image"}'), "header": {"kid": IMAGE_KID}, "signature": ""}, SE
        ),
        document(IMAGE, SE, header={"kid": IMAGE_KID}),
        document(IMAGE, SE, protected=IMAGE["protected"]),
        document(IMAGE, SE, signature=IMAGE["signature"]),
        json.dumps({"payload": "e30", **IMAGE}).encode(),
        f"{IMAGE['protected']}.e30.{IMAGE['signature']}".encode(),
        document(IMAGE["protected"], SE),
        document(IMAGE, None),
        json.dumps({"payload": None, "signatures": [IMAGE, SE]}).encode(),
        json.dumps({"payload": {"a": 1}, "signatures": [IMAGE, SE]}).encode(),
        json.dumps({"payload": "e30", "signatures": {"0": IMAGE, "1": SE}}).encode(),
        b"[]",
        b"",
    ],
)
def test_other_serializations_and_unprotected_headers(raw: bytes) -> None:
    with pytest.raises(MalformedError):
        jws.parse(raw, types=("image", "se"))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"payload":"e30","payload":"e31","signatures":[]}',
        b'{"payload":"e30","signatures":[],"signatures":[]}',
    ],
)
def test_a_name_twice_in_the_document(raw: bytes) -> None:
    with pytest.raises(MalformedError, match="stands twice"):
        jws.parse(raw, types=("image", "se"))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"alg":"none","alg":"Ed25519","kid":"ik-0123456789ab","typ":"image"}',
        b'{"alg":"Ed25519","kid":"ik-0123456789ab","kid":"ik-0123456789ab","typ":"image"}',
        b'{"alg":"Ed25519","\\u0061lg":"HS256","kid":"ik-0123456789ab","typ":"image"}',
    ],
)
def test_a_name_twice_in_a_header(raw: bytes) -> None:
    with pytest.raises(MalformedError, match="stands twice"):
        jws.parse(document(entry(raw), SE), types=("image", "se"))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"alg":"Ed25519","kid":"ik-0123456789ab\\u0000","typ":"image"}',
        b'{"alg":"Ed25519","ki\\u0000d":"ik-0123456789ab","typ":"image"}',
        b'{"alg":"Ed25519","ki\\ud800d":"ik-0123456789ab","typ":"image"}',
        b"[" * 400,
        b'{"alg":"Ed25519","kid":"ik-0123456789ab","typ":"image"}' + b" " * 600,
        b"\xff\xfe",
        b"",
    ],
)
def test_headers_with_foul_text(raw: bytes) -> None:
    with pytest.raises(MalformedError):
        jws.parse(document(entry(raw), SE), types=("image", "se"))


@pytest.mark.parametrize("hostile", [b"[" * 10_000, b'{"payload":' * 1_000, b'{"signatures":[' * 1_000])
def test_deep_nesting(hostile: bytes) -> None:
    with pytest.raises(MalformedError, match="nested deeper"):
        jws.parse(hostile, types=("image", "se"))


def test_a_document_over_the_limit() -> None:
    with pytest.raises(MalformedError, match="at most 16384"):
        jws.parse(document(IMAGE, SE, payload="A" * 16_384), types=("image", "se"))


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_a_signature_of_another_length(length: int) -> None:
    with pytest.raises(MalformedError, match=f"signature of {length} bytes, 64 expected"):
        jws.parse(document(entry(header(), bytes(length)), SE), types=("image", "se"))


@pytest.mark.parametrize(
    "text",
    [
        "e30=",
        "e3 0",
        "e30\n",
        "e31",
        "a",
        "e+30",
        "e/30",
        "+/+/",
        "=",
        "====",
        "é",
        "e30.",
        "e30%3D",
        "\N{FULLWIDTH DIGIT ZERO}",
    ],
)
def test_a_part_has_one_spelling(text: str) -> None:
    with pytest.raises(MalformedError, match="base64url"):
        jws.decode_part(text)
    for raw in (
        document(IMAGE, SE, payload=text),
        document({**IMAGE, "protected": text}, SE),
        document({**IMAGE, "signature": text}, SE),
    ):
        with pytest.raises(MalformedError):
            jws.parse(raw, types=("image", "se"))


@given(st.binary(max_size=100))
def test_parts_survive_their_encoding(raw: bytes) -> None:
    text = jws.encode_part(raw)
    assert "=" not in text
    assert jws.decode_part(text) == raw


@given(st.text(alphabet=st.sampled_from("AZaz09-_+/= \n"), max_size=12))
def test_no_two_texts_mean_the_same_bytes(text: str) -> None:
    try:
        raw = jws.decode_part(text)
    except MalformedError:
        return
    assert jws.encode_part(raw) == text


def test_the_signing_input_is_that_of_rfc_7515() -> None:
    protected, signed = jws.signing_input(jws.Header(alg="Ed25519", kid=IMAGE_KID, typ="image"), b"{}")
    assert json.loads(jws.decode_part(protected)) == header()
    assert signed == f"{protected}.e30".encode()


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_as_malformed(raw: bytes) -> None:
    with pytest.raises(MalformedError):
        jws.parse(raw, types=("image", "se"))


GOOD = document(IMAGE, SE)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_one_changed_byte_is_another_document_or_none(position: int, byte: int) -> None:
    changed = GOOD[:position] + bytes([byte]) + GOOD[position + 1 :]
    good = jws.parse(GOOD, types=("image", "se"))
    try:
        found = jws.parse(changed, types=("image", "se"))
    except MalformedError:
        return
    # White space between the parts is the only change that may mean the same.
    assert found != good or json.loads(changed) == json.loads(GOOD)


@given(
    st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "jwk", "crit", "b64", "x5c"]),
        st.sampled_from(["Ed25519", "none", "image", "se", IMAGE_KID, SE_KID]) | st.none() | st.integers(),
    )
)
def test_only_the_three_fields_make_a_header(fields: dict[str, Any]) -> None:
    wanted = fields == header()
    try:
        jws.parse(document(entry(fields), SE), types=("image", "se"))
    except MalformedError:
        assert not wanted
    else:
        assert wanted


def test_encode_gives_what_parse_reads() -> None:
    raw = jws.RawJws(
        payload="e30",
        signatures=[jws.RawSignature(protected=part["protected"], signature=part["signature"]) for part in (IMAGE, SE)],
    )
    assert jws.parse(strict_json.encode(raw), types=("image", "se")).payload == b"{}"
