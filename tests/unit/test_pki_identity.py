"""pki.identity, pki.image_key, pki.jws: keys that stand for somebody, and what they sign."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import TrustError
from appliance.pki import jws as pki_jws
from appliance.pki import ssh_keys
from appliance.pki.identity import Identity, verify
from appliance.pki.image_key import create_image_key, image_key_id
from appliance.protocol import jws
from appliance.protocol.strict_json import MalformedError


def test_an_identity_survives_its_files() -> None:
    identity = Identity.create()
    for secret in (identity.pkcs8(), identity.openssh()):
        again = Identity.from_pkcs8(secret.reveal())
        assert again.public_line == identity.public_line
        assert again.thumbprint == identity.thumbprint == ssh_keys.fingerprint(identity.public_line)
        assert verify(identity.public_line, again.sign(b"m"), b"m")


def test_two_identities_are_two() -> None:
    assert Identity.create().thumbprint != Identity.create().thumbprint


def test_the_thumbprint_is_a_kid() -> None:
    for _ in range(20):
        assert jws._KID["se"].fullmatch(Identity.create().thumbprint)


def test_a_signature_is_by_one_key_over_one_message() -> None:
    one, two = Identity.create(), Identity.create()
    signature = one.sign(b"message")
    assert len(signature) == 64
    assert verify(one.public_line, signature, b"message")
    assert not verify(two.public_line, signature, b"message")
    assert not verify(one.public_line, signature, b"another")
    assert not verify(one.public_line, signature[:-1], b"message")
    assert not verify(one.public_line, b"", b"message")
    with pytest.raises(TrustError):
        verify("ssh-rsa AAAA", signature, b"message")


def test_an_image_key_is_named_after_itself() -> None:
    name, identity = create_image_key()
    raw = ssh_keys.parse_public(identity.public_line)
    assert name == image_key_id(identity.public_line) == "ik-" + hashlib.sha256(raw).hexdigest()[:12]
    assert re.fullmatch(r"ik-[0-9a-f]{12}", name)
    assert jws._KID["image"].fullmatch(name)


IMAGE_KEY_ID, IMAGE = create_image_key()
SE = Identity.create()
OTHER = Identity.create()


def signed(payload: bytes = b"{}") -> bytes:
    return pki_jws.sign(payload, [("image", IMAGE_KEY_ID, IMAGE), ("se", SE.thumbprint, SE)])


@given(st.binary(max_size=200))
def test_what_is_signed_verifies_by_each_key_in_its_role(payload: bytes) -> None:
    found = jws.parse(signed(payload), types=("image", "se"))
    assert found.payload == payload
    image, se = found.signatures
    assert (image.header.kid, se.header.kid) == (IMAGE_KEY_ID, SE.thumbprint)
    assert pki_jws.verify(image, IMAGE.public_line)
    assert pki_jws.verify(se, SE.public_line)
    assert not pki_jws.verify(image, SE.public_line)
    assert not pki_jws.verify(se, IMAGE.public_line)
    assert not pki_jws.verify(se, OTHER.public_line)


def test_a_signature_taken_over_into_the_other_role_does_not_verify() -> None:
    """The role is under the signature: an image key's signature isn't good as an SE's, whatever header is there."""
    found = jws.parse(signed(), types=("image", "se"))
    swapped = jws.Signature(
        header=found.signatures[1].header,
        signing_input=found.signatures[1].signing_input,
        value=found.signatures[0].value,
    )
    assert not pki_jws.verify(swapped, SE.public_line)
    assert not pki_jws.verify(swapped, IMAGE.public_line)


def test_a_changed_payload_verifies_by_neither() -> None:
    changed = signed(b'{"a":1}').replace(jws.encode_part(b'{"a":1}').encode(), jws.encode_part(b'{"a":2}').encode())
    for entry, key in zip(jws.parse(changed, types=("image", "se")).signatures, (IMAGE, SE), strict=True):
        assert not pki_jws.verify(entry, key.public_line)


def test_a_signature_over_another_payload_does_not_verify_here() -> None:
    first, second = (jws.parse(signed(payload), types=("image", "se")) for payload in (b"1", b"2"))
    mixed = jws.Signature(
        header=first.signatures[0].header,
        signing_input=first.signatures[0].signing_input,
        value=second.signatures[0].value,
    )
    assert not pki_jws.verify(mixed, IMAGE.public_line)


@given(st.data())
def test_no_changed_byte_passes(data: st.DataObject) -> None:
    good = signed(b'{"nonce":"n"}')
    position = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(32, 126).filter(lambda byte: byte != good[position]))
    changed = good[:position] + bytes([byte]) + good[position + 1 :]
    try:
        found = jws.parse(changed, types=("image", "se"))
    except MalformedError:
        return
    keys = (IMAGE.public_line, SE.public_line)
    assert not all(pki_jws.verify(entry, key) for entry, key in zip(found.signatures, keys, strict=True))


def test_the_key_is_the_callers_and_malleable_signatures_are_refused() -> None:
    """RFC 8032 section 5.1.7: s must be below the group's order, or a second signature follows from a first."""
    order = 2**252 + 27742317777372353535851937790883648493
    signature = SE.sign(b"m")
    s = int.from_bytes(signature[32:], "little") + order
    assert not verify(SE.public_line, signature[:32] + s.to_bytes(32, "little"), b"m")
    assert base64.b64encode(signature) == base64.b64encode(SE.sign(b"m"))
