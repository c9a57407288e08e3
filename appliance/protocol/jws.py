"""The one form of JWS (RFC 7515 section 7.2.1, general JSON serialization) that enrollment accepts.

What general JOSE libraries leave to the caller is decided here, before any signature is looked at: how many
signatures, all header fields protected and from a fixed set, the algorithm fixed to Ed25519 (RFC 9864), a `kid`
of its role's one form. Verifying the signatures is the caller's, with keys it chose by `kid` itself; nothing in a
header is ever used as a key or an address. That the two *keys* differ is the caller's to check too: only it has them.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final, Literal

import msgspec

from appliance.protocol import strict_json
from appliance.protocol.strict_json import MalformedError

MAX_JWS_BYTES = 16 * 1024
MAX_HEADER_BYTES = 512

_KID: Final = {
    "image": re.compile(r"ik-[0-9a-f]{12}"),
    "se": re.compile(r"SHA256:[A-Za-z0-9+/]{43}"),
}
"""Per role: the id of an image key, and the fingerprint of an SE's key. The former also names files."""

ALGORITHM: Final = "Ed25519"


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A protected header. No other field is accepted: no `jwk`, `crit`, `b64`, `x5c`."""

    alg: Literal["Ed25519"]
    kid: str
    typ: Literal["image", "se"]


class RawSignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One entry of `signatures`; there is no unprotected header."""

    protected: str
    signature: str


class RawJws(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The document as sent."""

    payload: str
    signatures: list[RawSignature]


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """One signature, ready to be verified: `value` over `signing_input` by the key that `header.kid` names."""

    header: Header
    signing_input: bytes
    value: bytes


class Jws(msgspec.Struct, frozen=True, kw_only=True):
    """A well-formed, still unverified JWS."""

    payload: bytes
    signatures: list[Signature]


def encode_part(raw: bytes) -> str:
    """base64url without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode_part(text: str) -> bytes:
    """The reverse; refuses padding, white space and non-canonical trailing bits, so a text has one meaning."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise MalformedError("a part is no base64url") from None
    if encode_part(raw) != text:
        raise MalformedError("a part is no canonical base64url")
    return raw


def signing_input(header: Header, payload: bytes) -> tuple[str, bytes]:
    """Returns the encoded protected header and the bytes to sign (RFC 7515 section 5.1)."""
    protected = encode_part(strict_json.encode(header))
    return protected, f"{protected}.{encode_part(payload)}".encode()


def parse(raw: bytes, *, types: tuple[Literal["image", "se"], ...]) -> Jws:
    """Parses a JWS that must carry exactly one signature of each of `types`, in that order.

    Raises:
        MalformedError: anything else.
    """
    document = strict_json.decode(raw, RawJws, max_bytes=MAX_JWS_BYTES)
    if len(document.signatures) != len(types):
        raise MalformedError(f"{len(document.signatures)} signatures, exactly {len(types)} expected")
    payload = decode_part(document.payload)
    signatures = []
    for entry, kind in zip(document.signatures, types, strict=True):
        header = strict_json.decode(decode_part(entry.protected), Header, max_bytes=MAX_HEADER_BYTES)
        if header.typ != kind:
            raise MalformedError(f"signature by {header.typ!r}, {kind!r} expected")
        if not _KID[kind].fullmatch(header.kid):
            raise MalformedError(f"the kid is no key id of the role {kind!r}")
        value = decode_part(entry.signature)
        if len(value) != 64:
            raise MalformedError(f"signature of {len(value)} bytes, 64 expected")
        signatures.append(
            Signature(header=header, signing_input=f"{entry.protected}.{document.payload}".encode(), value=value)
        )
    return Jws(payload=payload, signatures=signatures)
