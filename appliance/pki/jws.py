"""Signs and verifies the one form of JWS that enrollment uses; its shape and rules are in `protocol.jws`.

Verifying takes a key the caller chose (by `kid` from its store, or out of the payload for the SE's own key); nothing
in a header is ever used as a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from appliance.pki.identity import Identity
from appliance.pki.identity import verify as verify_signature
from appliance.protocol import jws, strict_json


def sign(payload: bytes, signers: Sequence[tuple[Literal["image", "se"], str, Identity]]) -> bytes:
    """Signs `payload` and returns the JWS (UTF-8 JSON), one signature per signer in the given order.

    Args:
        payload: the bytes to sign.
        signers: role, key id and key of each.
    """
    signatures = []
    for role, kid, identity in signers:
        protected, signed = jws.signing_input(jws.Header(alg=jws.ALGORITHM, kid=kid, typ=role), payload)
        signatures.append(jws.RawSignature(protected=protected, signature=jws.encode_part(identity.sign(signed))))
    return strict_json.encode(jws.RawJws(payload=jws.encode_part(payload), signatures=signatures))


def verify(signature: jws.Signature, public_line: str) -> bool:
    """Whether `signature` is by the key of `public_line`. Raises `TrustError` where that is no key."""
    return verify_signature(public_line, signature.value, signature.signing_input)
