"""ML-KEM-768 as asyncssh uses it: both halves agree, and only the client makes keys."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

from appliance.errors import TrustError
from appliance.pki.mlkem import MlKem768


def test_both_sides_get_one_secret() -> None:
    client, server = MlKem768(), MlKem768()
    public = client.get_public()
    assert client.get_public() == public
    secret, ciphertext = server.encaps(public)
    assert client.decaps(ciphertext) == secret
    assert (len(public), len(ciphertext), len(secret)) == (
        MlKem768.pubkey_bytes,
        MlKem768.ciphertext_bytes,
        MlKem768.secret_bytes,
    )


def test_a_server_makes_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    public = MlKem768().get_public()

    class Forbidden:
        @staticmethod
        def generate() -> MLKEM768PrivateKey:
            raise AssertionError("a server needs no pair of keys")

    monkeypatch.setattr("appliance.pki.mlkem.MLKEM768PrivateKey", Forbidden)
    MlKem768(b"mlkem768").encaps(public)


def test_what_is_no_key_is_refused() -> None:
    with pytest.raises(ValueError, match="768"):
        MlKem768().encaps(b"short")
    client = MlKem768()
    with pytest.raises(TrustError, match="before any public key"):
        client.decaps(bytes(1088))
    client.get_public()
    with pytest.raises(ValueError, match="ciphertext"):
        client.decaps(b"short")
    with pytest.raises(TrustError, match="mlkem768' expected"):
        MlKem768(b"mlkem1024")
