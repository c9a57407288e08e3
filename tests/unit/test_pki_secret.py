"""pki.secret: the bytes show nowhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import traceback
from collections.abc import Callable

import msgspec
import pytest

from appliance.pki.identity import Identity
from appliance.pki.secret import Secret

BYTES = b"hunter2-hunter2"


def test_every_text_of_it_is_redacted(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(BYTES)
    texts = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret!r:>40}",
        f"{secret:>40}",
        f"{secret} {secret!r}",
    ]
    texts += [f"{[secret]} { {'key': secret} }", format(secret, "x")]
    with caplog.at_level(logging.INFO):
        logging.getLogger("test").info("key %s", secret, extra={"key": secret})
    texts += [caplog.text, str(vars(caplog.records[0]))]
    assert all("<redacted>" in text and "hunter2" not in text for text in texts)


def test_a_traceback_with_locals_does_not_show_it() -> None:
    def fails(secret: Secret) -> None:
        kept = [secret]
        raise ValueError(f"with {kept}")

    with pytest.raises(ValueError, match="redacted") as caught:
        fails(Secret(BYTES))
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    assert "kept = [<redacted>]" in shown
    assert "fails(Secret" in shown
    assert "hunter2" not in shown


@dataclasses.dataclass
class Holder:
    secret: Secret


@pytest.mark.parametrize(
    "leave",
    [
        pickle.dumps,
        lambda secret: pickle.dumps(secret, protocol=0),
        copy.copy,
        copy.deepcopy,
        lambda secret: dataclasses.asdict(Holder(secret)),
        json.dumps,
        msgspec.json.encode,
        msgspec.to_builtins,
        vars,
        hash,
        bytes,
    ],
)
def test_it_does_not_leave_by_a_side_door(leave: Callable[[Secret], object]) -> None:
    with pytest.raises(TypeError) as caught:
        leave(Secret(BYTES))
    assert "hunter2" not in str(caught.value)


def test_it_opens_when_asked_and_compares() -> None:
    assert Secret(BYTES).reveal() == BYTES
    assert Secret(BYTES) == Secret(BYTES)
    assert Secret(BYTES) != Secret(b"other")
    assert Secret(BYTES) != BYTES


def test_an_identity_shows_its_fingerprint_only() -> None:
    identity = Identity.create()
    assert repr(identity) == f"Identity({identity.thumbprint})"
    with pytest.raises(TypeError):
        pickle.dumps(identity)
