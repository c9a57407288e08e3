"""Tokens: their forms, what is kept, and when one is good."""

from __future__ import annotations

import hashlib
import secrets

import pytest

from appliance.errors import UsageError
from appliance.protocol import token
from appliance.protocol.enroll import Refusals
from appliance.protocol.token import Kind, TokenTerms, judge

NOW = 1_700_000_000
SE = "6f6b4c1e-0a6b-4f6c-9d55-0d7c0a3f3a01"
KEY = "ik-0123456789ab"
ENROLL = TokenTerms(image_key_id=KEY, se_id="", instance_id="", expires_at=NOW + 1, revoked=False, taken=False)
REJOIN = ENROLL._replace(image_key_id="", se_id=SE)


def asked(terms: TokenTerms | None, *, image_key_id: str = "", se_id: str = "", instance_id: str = "i-1"):
    return judge(terms, image_key_id=image_key_id, se_id=se_id, instance_id=instance_id, now=NOW)


def made(rejoin: str = "") -> str:
    return token.compose(secrets.token_bytes(token.RANDOM_BYTES), rejoin=rejoin)


def test_a_token_tells_what_it_is_for_and_nothing_else() -> None:
    enroll, rejoin = made(), made(rejoin=SE)
    assert token.parse(enroll) == (Kind.ENROLL, "")
    assert token.parse(rejoin) == (Kind.REJOIN, SE)
    assert len(enroll) == len("enroll-") + 43
    assert len(rejoin) == len("rejoin-") + 64
    assert max(len(enroll), len(rejoin)) <= token.MAX_TOKEN_CHARS


def test_of_a_token_its_digest_is_kept() -> None:
    text = made(rejoin=SE)
    kept = token.digest(text)
    assert kept == hashlib.sha256(text.encode()).hexdigest()
    assert token.token_id(kept) == f"tk-{kept[:12]}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "enroll",
        "enroll-",
        "enroll-AAAA",
        "other-" + "A" * 43,
        "enroll-" + "A" * 64,
        "rejoin-" + "A" * 43,
        "rejoin-" + "A" * 60,
        "rejoin-" + "A" * 64,  # the se_id in it is no random UUID
        "enroll-" + "A" * 42,
        "enroll-" + "A" * 42 + "B",  # not canonical: bits beyond the last byte
        "enroll-" + "A" * 42 + "=",
        "enroll-" + "A" * 42 + "\n",
        "ENROLL-" + "A" * 43,
        "enroll-" + "\u00e4" * 43,
    ],
)
def test_what_is_no_token_is_told_without_being_repeated(text: str) -> None:
    with pytest.raises(UsageError, match="no token") as refused:
        token.parse(text)
    assert len(text) <= len("enroll-") or text not in refused.value.message + refused.value.hint


@pytest.mark.parametrize(
    ("terms", "refusal"),
    [
        (ENROLL, None),
        (None, Refusals.TOKEN_UNKNOWN),
        (ENROLL._replace(revoked=True, taken=True, expires_at=0), Refusals.TOKEN_REVOKED),
        (ENROLL._replace(taken=True, expires_at=0), Refusals.TOKEN_USED),
        (ENROLL._replace(expires_at=NOW), Refusals.TOKEN_EXPIRED),
        (ENROLL._replace(image_key_id="ik-000000000000"), Refusals.TOKEN_BOUND),
        (ENROLL._replace(instance_id="i-1"), None),
        (ENROLL._replace(instance_id="i-2"), Refusals.TOKEN_BOUND),
        (REJOIN, Refusals.TOKEN_BOUND),
    ],
)
def test_a_token_beside_an_image_key(terms: TokenTerms | None, refusal: Refusals | None) -> None:
    assert asked(terms, image_key_id=KEY) is refusal


@pytest.mark.parametrize(
    ("terms", "refusal"),
    [
        (REJOIN, None),
        (None, Refusals.TOKEN_UNKNOWN),
        (REJOIN._replace(taken=True), Refusals.TOKEN_USED),
        (REJOIN._replace(se_id=SE.replace("01", "02")), Refusals.TOKEN_BOUND),
        (REJOIN._replace(instance_id="i-2"), Refusals.TOKEN_BOUND),
        (ENROLL, Refusals.TOKEN_BOUND),
    ],
)
def test_a_token_in_place_of_an_image_key(terms: TokenTerms | None, refusal: Refusals | None) -> None:
    assert asked(terms, se_id=SE) is refusal
