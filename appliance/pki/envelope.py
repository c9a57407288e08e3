"""Signs and verifies DSSE envelopes (shape and encoding: `protocol.trust`) with a cluster's root keys.

Where the caller allows it (receipts and audit heads, never a trust document), an issuing CA signs in its root's name:
its certificate is in the envelope, and counts where it is that of an issuing CA, signed by a trusted root, of the same
cluster, and not revoked. Its dates aren't looked at: what it signed while it lived holds.

ECDSA P-256 with SHA-256. The payload's type is under the signature and must be the one the caller expects, so a signed
receipt never passes as a trust document. Key ids only choose among keys the caller trusts already.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Sequence
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.errors import TrustError
from appliance.pki.certificate import SET_BACK, certificate_terms, is_issued_by, key_id, key_of, load_pem
from appliance.protocol.trust import Envelope, EnvelopeSignature, pre_authentication_encoding

MAX_SIGNATURES: Final = 8
"""Two roots sign during a change of root; the rest is room. Bounds the work an unauthenticated text can cause."""


def sign_envelope(
    key: ec.EllipticCurvePrivateKey, payload_type: str, body: bytes, *, certificate_pem: str = ""
) -> Envelope:
    """Returns `body` in an envelope signed by `key` (P-256); `certificate_pem` is the key's, if it is no root's."""
    signature = key.sign(pre_authentication_encoding(payload_type, body), ec.ECDSA(hashes.SHA256()))
    entry = EnvelopeSignature(
        keyid=key_id(key.public_key()), sig=base64.b64encode(signature).decode(), cert=certificate_pem
    )
    return Envelope(payload=base64.b64encode(body).decode(), payload_type=payload_type, signatures=[entry])


def combine(envelopes: Sequence[Envelope]) -> Envelope:
    """Returns one envelope with the signatures of all; they hold the same payload."""
    first = envelopes[0]
    if any((entry.payload, entry.payload_type) != (first.payload, first.payload_type) for entry in envelopes):
        raise TrustError("envelopes of different payloads can't be combined")
    signatures = [signature for entry in envelopes for signature in entry.signatures]
    return Envelope(payload=first.payload, payload_type=first.payload_type, signatures=signatures)


def verify_envelope(
    envelope: Envelope,
    payload_type: str,
    public_keys: Sequence[str],
    *,
    by_issuing: bool = False,
    revoked: Collection[str] = (),
) -> bytes:
    """Returns the body where one signature is by one of the trusted keys.

    Args:
        envelope: foreign.
        payload_type: the only type that is accepted.
        public_keys: PEM certificates (P-256) whose keys may sign.
        by_issuing: whether an issuing CA that one of them certified may sign in its name.
        revoked: key ids of issuing CAs that count no more.

    Raises:
        TrustError: another type, no signature by a trusted key, a wrong signature.
    """
    if envelope.payload_type != payload_type:
        raise TrustError(f"envelope of type {envelope.payload_type[:80]!r}, {payload_type!r} expected")
    if len(envelope.signatures) > MAX_SIGNATURES:
        raise TrustError(f"envelope with {len(envelope.signatures)} signatures, at most {MAX_SIGNATURES} are accepted")
    keys = dict(_trusted_key(pem) for pem in public_keys)
    body = envelope.body()
    message = pre_authentication_encoding(payload_type, body)
    if by_issuing:
        for entry in envelope.signatures:
            if entry.cert and entry.keyid not in keys and _is_issuing(entry, public_keys, revoked):
                keys.update([_trusted_key(entry.cert)])
    known = [entry for entry in envelope.signatures if entry.keyid in keys]
    if not known:
        raise TrustError(
            "the envelope isn't signed by a root this side trusts",
            hint=f"it comes from another cluster, or is forged; {SET_BACK}",
        )
    if not any(_is_signed(keys[entry.keyid], entry.sig, message) for entry in known):
        raise TrustError("the envelope's signature does not verify", hint="its content was changed on the way")
    return body


def _is_issuing(entry: EnvelopeSignature, roots: Sequence[str], revoked: Collection[str]) -> bool:
    """Whether the entry's certificate is that of its key, and an issuing CA's of the cluster of one of `roots`."""
    terms = certificate_terms(entry.cert)
    if terms.key_id != entry.keyid or terms.key_id in revoked:
        return False
    if not terms.is_authority or terms.path_length != 0 or terms.node is not None:
        return False
    return any(
        is_issued_by(entry.cert, root) and certificate_terms(root).cluster_id == terms.cluster_id for root in roots
    )


def _trusted_key(pem: str) -> tuple[str, ec.EllipticCurvePublicKey]:
    key = key_of(load_pem(pem))
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError("a root's key is of another kind, ECDSA P-256 expected")
    return key_id(key), key


def _is_signed(key: ec.EllipticCurvePublicKey, signature: str, message: bytes) -> bool:
    try:
        key.verify(base64.b64decode(signature, validate=True), message, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True
