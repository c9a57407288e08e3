"""Nonces: fresh to the second, used once, forgotten when they are stale anyway."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.controller.nonce import Nonces
from appliance.protocol import jws
from appliance.protocol.enroll import NONCE_LIFE_S

KEY = b"k" * 32
NOW = 1_800_000_000
times = st.integers(0, 2**40)


@given(issued=times, age=st.integers(-400, 800))
def test_fresh_to_the_second(issued: int, age: int) -> None:
    nonces = Nonces(KEY)
    assert nonces.is_fresh(nonces.issue(issued), issued + age) == (0 <= age <= NONCE_LIFE_S)


@pytest.mark.parametrize(("age", "fresh"), [(-1, False), (0, True), (NONCE_LIFE_S, True), (NONCE_LIFE_S + 1, False)])
def test_the_edges(age: int, fresh: bool) -> None:
    nonces = Nonces(KEY)
    assert nonces.is_fresh(nonces.issue(NOW), NOW + age) is fresh


def test_any_node_with_the_clusters_key_takes_it_and_no_other() -> None:
    nonce = Nonces(KEY).issue(NOW)
    assert Nonces(KEY).is_fresh(nonce, NOW)
    assert not Nonces(b"K" * 32).is_fresh(nonce, NOW)


def test_each_is_another() -> None:
    nonces = Nonces(KEY)
    assert len({nonces.issue(NOW) for _ in range(1000)}) == 1000


@given(place=st.integers(0, 39), flip=st.integers(1, 255))
def test_no_bit_can_be_changed(place: int, flip: int) -> None:
    nonces = Nonces(KEY)
    raw = bytearray(jws.decode_part(nonces.issue(NOW)))
    raw[place] ^= flip
    assert not nonces.is_fresh(jws.encode_part(bytes(raw)), NOW)


@given(st.one_of(st.text(max_size=80), st.binary(max_size=60).map(jws.encode_part)))
def test_garbage_is_never_fresh(text: str) -> None:
    assert not Nonces(KEY).is_fresh(text, NOW)


@pytest.mark.parametrize("spelling", ["{}=", "{}\n", " {}", "{}A"])
def test_a_nonce_has_one_spelling(spelling: str) -> None:
    """Another spelling of a used nonce would be another nonce."""
    nonces = Nonces(KEY)
    assert not nonces.is_fresh(spelling.format(nonces.issue(NOW)), NOW)


def test_used_once() -> None:
    nonces = Nonces(KEY)
    one, two = nonces.issue(NOW), nonces.issue(NOW)
    assert nonces.use(one, NOW)
    assert not nonces.use(one, NOW)
    assert nonces.use(two, NOW)
    assert not nonces.use(one, NOW + NONCE_LIFE_S)


@given(issued=st.integers(0, 300), used=st.integers(0, 300), again=st.integers(0, 1000))
def test_never_both_fresh_and_forgotten(issued: int, used: int, again: int) -> None:
    nonces = Nonces(KEY)
    nonce = nonces.issue(NOW + issued)
    at = NOW + issued + used
    later = at + again
    assert nonces.use(nonce, at)
    assert not (nonces.is_fresh(nonce, later) and nonces.use(nonce, later))


def test_what_is_stale_is_forgotten() -> None:
    nonces = Nonces(KEY)
    for second in range(2000):
        assert nonces.use(nonces.issue(NOW + second), NOW + second)
        assert len(nonces._used) <= NONCE_LIFE_S + 1
