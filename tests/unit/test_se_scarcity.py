"""An SE without a thread, a descriptor or disk space for a moment goes on afterwards, and loses no key of its own."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_se_forward import Channel, refused, until
from test_se_state import AUTHORITY, NOW, beliefs, paths, reloaded, signed, state  # noqa: F401 - fixtures

from appliance.errors import StorageError
from appliance.paths import Paths
from appliance.pki import ssh_keys
from appliance.protocol import strict_json
from appliance.protocol.enroll import Grant
from appliance.protocol.trust import RECEIPT_TYPE, Receipt
from appliance.runtime.stop import StopToken
from appliance.se import believed as module
from appliance.se.forward import _PAUSE_S, Forward
from appliance.se.identity import SeState
from appliance.se.pump import pump
from appliance.se.reverse import ReversePath


def grant(state: SeState) -> Grant:  # noqa: F811
    se_id = state.require().se_id
    receipt = Receipt(
        cluster_id="c-1", se_id=se_id, thumbprint=state.identity.thumbprint, number=1, image_key_id="k", epoch=0,
        issued_at=NOW,
    )  # fmt: skip
    return Grant(
        cluster_id="c-1", se_id=se_id, name="se-1", number=1, address="127.1.0.1", trust=signed()[0],
        receipt=AUTHORITY.sign(RECEIPT_TYPE, strict_json.encode(receipt)), heartbeat_interval_s=1.0,
    )  # fmt: skip


def none_left(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Threads of that name can't be started, until what this returns is cleared."""
    out, start = [name], threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if out and thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    return out


def test_login_keys_that_could_not_be_written_are_written_with_the_next_answer(
    state: SeState,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    believed, heard = beliefs(state), []
    key = ssh_keys.generate()[1]
    believed.start_from_seed(*signed())
    believed.on_change(lambda document: heard.append(document.version))
    with monkeypatch.context() as full:

        def refuse(*_: object, **__: object) -> None:
            raise StorageError("the disk is full")

        full.setattr(module, "write_atomic", refuse)
        with pytest.raises(StorageError):
            believed.accept(signed(version=2, login_keys=[key])[0])
    assert believed.version == 1, "or the controller would send it no more"
    assert believed.accept(signed(version=2, login_keys=[key])[0])
    assert key in state.authorized_keys_path.read_text()
    assert heard == [2]


def test_a_grant_stored_while_a_key_is_made_loses_no_key(
    paths: Paths,  # noqa: F811
    state: SeState,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state.create(image_id="img-1")
    state.save_grant(grant(state))
    saving, go, save = threading.Event(), threading.Event(), state._identity_document.save

    def slow(record: Any) -> None:
        if threading.current_thread().name == "refresh":
            saving.set()
            go.wait(5)
        save(record)

    monkeypatch.setattr(state._identity_document, "save", slow)
    made: list[str] = []
    refresh = threading.Thread(target=lambda: state.save_grant(grant(state)), name="refresh")
    rotate = threading.Thread(target=lambda: made.append(state.next_identity().thumbprint))
    refresh.start()
    saving.wait(5)
    rotate.start()
    rotate.join(0.3)
    go.set()
    refresh.join(5)
    rotate.join(5)
    state.promote_key()
    assert state.identity.thumbprint == made[0], "the controller knows that one by now"
    assert reloaded(paths).identity.thumbprint == made[0]


def test_two_links_that_ask_for_a_new_key_get_the_same(
    state: SeState,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state.create(image_id="img-1")
    both, save = threading.Barrier(2), state._identity_document.save

    def together(record: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        save(record)

    monkeypatch.setattr(state._identity_document, "save", together)
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(state.next_identity().thumbprint)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert made[0] == made[1]


def test_the_reverse_path_outlives_a_moment_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    path = ReversePath("127.0.0.1", 1, tell=told.append)
    path.start()
    out = none_left(monkeypatch, "reverse")
    first, second = Channel(), Channel()
    path.accepted.put(first)
    until(lambda: first.closed)
    out.clear()
    path.accepted.put(second)
    until(lambda: second.closed and told)
    path.stop()
    first.far.close()
    second.far.close()


def test_the_forward_side_outlives_a_moment_without_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, path = StopToken(), tmp_path / "s"
    forward = Forward(path, {}, open_channel=refused)
    thread = threading.Thread(target=forward.run, args=(stop,))
    thread.start()
    until(path.is_socket)
    none_left(monkeypatch, "forward")
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            assert sock.recv(1) == b""
    assert not forward._connections
    assert thread.is_alive()
    stop.stop("the test ends")
    thread.join(5)


def test_a_pump_without_a_second_thread_lets_both_ends_go(monkeypatch: pytest.MonkeyPatch) -> None:
    none_left(monkeypatch, "pump")
    ours, theirs = socket.socketpair()
    channel = Channel()
    with ours:
        pump(theirs, channel)
        assert ours.recv(1) == b""
    assert channel.closed
    channel.far.close()


def test_the_forward_side_waits_for_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, path = StopToken(), tmp_path / "s"
    forward = Forward(path, {}, open_channel=refused)
    tries, take = [0], forward._take

    def counting(*which: Any) -> None:
        tries[0] += 1
        take(*which)

    monkeypatch.setattr(forward, "_take", counting)
    thread = threading.Thread(target=forward.run, args=(stop,))
    thread.start()
    until(path.is_socket)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as sock:
        highest = max(int(place.name) for place in Path("/proc/self/fd").iterdir())
        held: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            sock.connect(str(path))
            until(lambda: tries[0] > 0)
            begun, before = time.monotonic(), tries[0]
            until(lambda: tries[0] >= before + 3)
            took_s = time.monotonic() - begun
        finally:
            for number in held:
                os.close(number)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert sock.recv(1) == b"", "it is its turn at last"
    stop.stop("the test ends")
    thread.join(5)
    assert took_s > 2 * _PAUSE_S, "it tries again without a pause"
