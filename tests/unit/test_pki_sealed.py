"""pki.sealed: what was sealed comes out again with the passphrase, unchanged, or not at all."""

from __future__ import annotations

import hashlib

import pytest

from appliance.errors import TrustError, UsageError
from appliance.pki import sealed
from appliance.pki.secret import Secret

MAGIC = b"appliance test"
PASSPHRASE = Secret(b"correct horse battery")
PLAIN = b"the keys of the kingdom" * 50


@pytest.fixture(scope="module")
def box() -> bytes:
    return sealed.seal(PLAIN, PASSPHRASE, magic=MAGIC, about={"cluster_id": "c-1"})


def test_what_was_sealed_comes_out_again(box: bytes) -> None:
    assert sealed.open_sealed(box, PASSPHRASE, magic=MAGIC) == PLAIN
    assert b"kingdom" not in box
    assert b'"c-1"' in box
    assert sealed.digest(box) == hashlib.sha256(box).hexdigest()


def test_two_seals_of_one_text_differ(box: bytes) -> None:
    assert sealed.seal(PLAIN, PASSPHRASE, magic=MAGIC, about={"cluster_id": "c-1"}) != box


def test_the_wrong_passphrase_opens_nothing(box: bytes) -> None:
    with pytest.raises(TrustError, match="passphrase is wrong"):
        sealed.open_sealed(box, Secret(b"correct horse batterz"), magic=MAGIC)


@pytest.mark.parametrize("at", [0.2, 0.5, 0.99])
def test_a_changed_byte_is_found(box: bytes, at: float) -> None:
    place = int(len(box) * at)
    changed = bytearray(box)
    changed[place] ^= 1
    with pytest.raises(TrustError):
        sealed.open_sealed(bytes(changed), PASSPHRASE, magic=MAGIC)


def test_what_is_said_about_it_is_sealed_too(box: bytes) -> None:
    with pytest.raises(TrustError, match="was changed"):
        sealed.open_sealed(box.replace(b'"c-1"', b'"c-2"'), PASSPHRASE, magic=MAGIC)


@pytest.mark.parametrize("keep", [0, 3, len(MAGIC), len(MAGIC) + 1, len(MAGIC) + 20, -1, -17])
def test_a_file_that_was_cut_off_opens_nothing(box: bytes, keep: int) -> None:
    with pytest.raises(TrustError):
        sealed.open_sealed(box[:keep], PASSPHRASE, magic=MAGIC)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"scrypt_log2_n":17', b'"scrypt_log2_n":30'), (b'"salt":"', b'"salt":"!'), (b'"salt":"', b'"salt":"AAAA')],
)
def test_a_header_asks_for_no_other_work(box: bytes, old: bytes, new: bytes) -> None:
    """A changed cost would have the reader take all memory before it finds out."""
    assert old in box
    with pytest.raises(TrustError, match="header is damaged"):
        sealed.open_sealed(box.replace(old, new, 1), PASSPHRASE, magic=MAGIC)


def test_another_kind_of_file_is_named(box: bytes) -> None:
    with pytest.raises(TrustError, match="no file of the kind 'other'"):
        sealed.open_sealed(box, PASSPHRASE, magic=b"other")


def test_a_short_passphrase_protects_nothing() -> None:
    with pytest.raises(UsageError, match="shorter than 12"):
        sealed.seal(PLAIN, Secret(b"short"), magic=MAGIC, about={})


def test_more_than_a_box_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "MAX_PLAIN_BYTES", 10)
    with pytest.raises(UsageError, match="can't be sealed"):
        sealed.seal(PLAIN, PASSPHRASE, magic=MAGIC, about={})
