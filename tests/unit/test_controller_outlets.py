"""Outlets: events leave the node by a hook and a webhook, in order, and nobody ever waits for them."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rig import until

from appliance.controller import outlets as module
from appliance.controller.events import Events
from appliance.controller.outlets import Outlet, hook, outlets, webhook
from appliance.errors import ApplianceError, ChildError, UnreachableError
from appliance.protocol.operator import Event


def event(number: int) -> Event:
    return Event(id=number, time=1.0, stage="tunnel", kind="se.state", subject="s-1", text=f"event {number}")


class Far:
    """The far end of an outlet, in the test's hands."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.errors: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()

    def send(self, body: bytes) -> None:
        assert self.gate.wait(20)
        if self.errors:
            raise self.errors.pop(0)
        self.got.append(msgspec.json.decode(body))

    @property
    def ids(self) -> list[int]:
        return [notice["event"]["id"] for notice in self.got]


@pytest.fixture
def far() -> Far:
    return Far()


def started(far: Far, *, tries: int = 1, queue_size: int = 1000) -> Outlet:
    outlet = Outlet("the outlet", far.send, tries=tries, cluster_id="c-1", node=1, queue_size=queue_size)
    outlet.start()
    return outlet


def test_events_go_out_in_order_with_whose_they_are(far: Far) -> None:
    outlet = started(far)
    log = Events(lambda: 5.0)
    log.listeners.append(outlet.offer)
    for number in range(20):
        log.emit("tunnel", "se.state", "s-1", f"text {number}")
    until(lambda: len(far.got) == 20, what="all went out")
    outlet.close()
    assert far.ids == list(range(far.ids[0], far.ids[0] + 20))
    assert far.got[0] == {
        "cluster_id": "c-1", "node": 1, "dropped": 0,
        "event": {
            "id": far.ids[0], "time": 5.0, "stage": "tunnel", "kind": "se.state", "subject": "s-1", "text": "text 0",
        },
    }  # fmt: skip
    assert (outlet.sent, outlet.dropped, outlet.problem) == (20, 0, "")


def test_a_far_end_that_hangs_delays_nobody_and_is_told_what_it_missed(far: Far) -> None:
    far.gate.clear()
    outlet = started(far, queue_size=5)
    for number in range(1, 10_001):  # any of them that waited would wait for ever: the gate is shut
        outlet.offer(event(number))
    assert outlet.dropped >= 10_000 - 7
    far.gate.set()
    until(lambda: outlet.sent >= 5, what="what waited went out")
    outlet.offer(event(20_000))
    until(lambda: far.ids[-1] == 20_000, what="the newest went out")
    outlet.close()
    assert sum(notice["dropped"] for notice in far.got) == outlet.dropped
    assert outlet.sent + outlet.dropped == 10_001


def test_a_failure_is_tried_again_and_then_given_up(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Backoff", lambda **_: type("Quick", (), {"next_s": lambda _self: 0.001})())
    far.errors = [UnreachableError("gone away") for _ in range(5)]
    outlet = started(far, tries=3)
    outlet.offer(event(1))
    until(lambda: outlet.dropped == 1, what="given up after three tries")
    assert "gone away" in outlet.problem
    assert "1 dropped" in outlet.problem
    outlet.offer(event(2))
    until(lambda: outlet.sent == 1, what="the third try gets through")
    assert outlet.problem == ""
    assert far.got[0]["dropped"] == 1
    outlet.close()


def test_a_defect_ends_one_event_and_not_the_outlet(far: Far, caplog: pytest.LogCaptureFixture) -> None:
    far.errors = [RuntimeError("a bug")]
    outlet = started(far, tries=3)
    outlet.offer(event(1))
    outlet.offer(event(2))
    until(lambda: far.ids == [2], what="the next one goes out")
    assert "a bug" in caplog.text
    outlet.close()


def test_a_stop_waits_for_no_far_end(far: Far) -> None:
    far.errors = [UnreachableError("gone") for _ in range(100)]
    outlet = started(far, tries=100, queue_size=1)
    for number in range(5):
        outlet.offer(event(number))
    began = time.monotonic()
    outlet.close()
    assert time.monotonic() - began < 10.0  # a hundred tries take minutes


# ------------------------------------------------------------------------------------------------ hook, webhook


def test_a_hook_gets_the_event_on_stdin_and_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_SECRET", "x")
    program = tmp_path / "hook"
    program.write_text(f"#!/bin/sh\ncat > {tmp_path}/got\nenv > {tmp_path}/env\n")
    program.chmod(0o755)
    hook(str(program))(b'{"event":1}\n')
    assert (tmp_path / "got").read_bytes() == b'{"event":1}\n'
    assert "APPLIANCE" not in (tmp_path / "env").read_text()


@pytest.mark.parametrize("body", ["exit 3", "sleep 60"])
def test_a_hook_that_fails_or_hangs_is_an_error(tmp_path: Path, body: str) -> None:
    program = tmp_path / "hook"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    with pytest.raises(ChildError):
        hook(str(program), deadline_s=0.5)(b"{}")


class _Sink(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, self.headers["Content-Type"], json.loads(body)))  # type: ignore[attr-defined]
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 204)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def sink() -> Iterator[Any]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Sink)
    server.got, server.statuses = [], []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_webhook_posts_json(sink: Any) -> None:
    webhook(f"http://127.0.0.1:{sink.server_port}/in?key=1")(b'{"event":1}')
    assert sink.got == [("/in?key=1", "application/json", {"event": 1})]


@pytest.mark.parametrize("status", [302, 400, 500])
def test_only_a_2xx_is_an_answer(sink: Any, status: int) -> None:
    sink.statuses.append(status)
    with pytest.raises(UnreachableError, match=f"answered {status}"):
        webhook(f"http://127.0.0.1:{sink.server_port}/")(b"{}")


def test_a_webhook_has_a_deadline_even_for_a_peer_that_drips() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def drip() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"HTTP/1.1 200 OK\r\n")
                while not done.wait(0.05):
                    try:
                        peer.sendall(b"X: y\r\n")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        with pytest.raises(UnreachableError):
            webhook(f"http://127.0.0.1:{listener.getsockname()[1]}/", deadline_s=0.5)(b"{}")
        assert time.monotonic() - began < 5.0
        done.set()
        thread.join()


def test_a_webhook_without_a_listener_or_tls_is_an_error(sink: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UnreachableError, match="refused"):
        webhook(f"http://127.0.0.1:{port}/")(b"{}")
    with pytest.raises(ApplianceError):
        webhook(f"https://127.0.0.1:{sink.server_port}/", deadline_s=2.0)(b"{}")


def test_outlets_are_those_of_the_settings() -> None:
    assert outlets(program="", url="", cluster_id="c", node=1) == []
    names = [outlet.name for outlet in outlets(program="/x", url="http://h/", cluster_id="c", node=1)]
    assert names == ["the events hook", "the events webhook"]
