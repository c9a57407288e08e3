"""Tokens: single-use words that let one VM in. Their two forms, what is kept of them, and when one is good.

    enroll-<43 characters>   256 random bits; beside an image key of the policy `token`, to which it is bound
    rejoin-<64 characters>   the se_id (16 bytes) and 256 random bits; stands in for the image key of an SE that lost
                             its state, and tells the VM who it was

Characters are base64url without padding. Only the SHA-256 of the whole text is kept: who reads the store has no token.
The rules know no clock and no store.
"""

from __future__ import annotations

import enum
import hashlib
from typing import NamedTuple

from appliance.errors import UsageError
from appliance.protocol import jws
from appliance.protocol.enroll import Refusals, is_se_id
from appliance.protocol.strict_json import MalformedError

RANDOM_BYTES = 32
MAX_TOKEN_CHARS = 128
ID_PREFIX = "tk-"


class Kind(enum.StrEnum):
    """What a token is for; the word it begins with."""

    ENROLL = "enroll"
    REJOIN = "rejoin"


class Token(NamedTuple):
    """A well-formed token. `se_id` is "" but for a rejoin."""

    kind: Kind
    se_id: str


class TokenTerms(NamedTuple):
    """A token as the store has it at this moment."""

    image_key_id: str
    """Which image key it goes with, "" for a rejoin."""
    se_id: str
    """Whose place it gives, "" but for a rejoin."""
    instance_id: str
    """The one instance-id that may bring it, "" for any."""
    expires_at: int
    revoked: bool
    taken: bool
    """Used, or reserved by a request that waits for approval."""


def compose(secret: bytes, *, rejoin: str = "") -> str:
    """Returns the token of `RANDOM_BYTES` random bytes, for the se_id `rejoin` where one is named."""
    if rejoin:
        return f"{Kind.REJOIN.value}-{jws.encode_part(bytes.fromhex(rejoin.replace('-', '')) + secret)}"
    return f"{Kind.ENROLL.value}-{jws.encode_part(secret)}"


def parse(text: str) -> Token:
    """Reads a token's form, which tells nothing of whether it is good.

    Raises:
        UsageError: it has none of the two forms; the text is not repeated.
    """
    word, _, rest = text.partition("-")
    try:
        kind, raw = Kind(word), jws.decode_part(rest)
    except (ValueError, MalformedError):
        raise _no_token() from None
    head, secret = raw[:-RANDOM_BYTES], raw[-RANDOM_BYTES:]
    if len(secret) != RANDOM_BYTES or len(head) != (16 if kind is Kind.REJOIN else 0):
        raise _no_token()
    if kind is Kind.ENROLL:
        return Token(kind, "")
    digits = head.hex()
    se_id = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    if not is_se_id(se_id):
        raise _no_token()
    return Token(kind, se_id)


def _no_token() -> UsageError:
    return UsageError(
        "that is no token: enroll-… or rejoin-… expected, whole and without spaces",
        hint="copy it as `appliance token create` printed it, or create another one",
    )


def digest(text: str) -> str:
    """What is kept of a token: SHA-256 of its text, hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def token_id(kept: str) -> str:
    """The name by which operators speak of a token; `kept` is its digest."""
    return ID_PREFIX + kept[:12]


def judge(terms: TokenTerms | None, *, image_key_id: str, se_id: str, instance_id: str, now: int) -> Refusals | None:
    """Returns why a token isn't good for a request, None where it is.

    Args:
        terms: those of the token the request brings, None where it isn't known.
        image_key_id: whose signature was verified; "" for a rejoin.
        se_id: who wants to rejoin; "" for an enrollment.
        instance_id: as the request says.
        now: the controller's time, seconds since 1970.
    """
    if terms is None:
        return Refusals.TOKEN_UNKNOWN
    if terms.revoked:
        return Refusals.TOKEN_REVOKED
    if terms.taken:
        return Refusals.TOKEN_USED
    if now >= terms.expires_at:
        return Refusals.TOKEN_EXPIRED
    bound_to = (terms.image_key_id, terms.se_id, terms.instance_id or instance_id)
    if bound_to != (image_key_id, se_id, instance_id):
        return Refusals.TOKEN_BOUND
    return None
