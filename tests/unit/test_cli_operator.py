"""The operator API's client: every way in which asking can go wrong says what to do."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import operator_double as doubles
import pytest
from operator_double import OperatorDouble

from appliance.cli import operator as operator_module
from appliance.cli import this_machine
from appliance.cli.operator import DEADLINE_S, Operator
from appliance.errors import (
    ApplianceError,
    EnrollError,
    NotFoundError,
    StorageError,
    StoreError,
    UnreachableError,
    UsageError,
)
from appliance.paths import Paths
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.problem import Problem
from appliance.runtime.clock import SystemClock
from appliance.runtime.health import Health


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run/appliance/controller.sock"


def operator_at(path: Path, *, deadline_s: float = DEADLINE_S, say: Callable[[str], None] | None = None) -> Operator:
    return Operator(Paths(path.parents[2]), deadline_s=deadline_s, say=say)


@pytest.fixture
def double(path: Path) -> Iterator[OperatorDouble]:
    with doubles.serve(path) as served:
        yield served


def problem(status: int, code: str, **more: object) -> Problem:
    return Problem(type=f"/problems/{code}", title="It can't be", status=status, code=code, **more)  # type: ignore[arg-type]


def test_answers_are_decoded(double: OperatorDouble, path: Path) -> None:
    double.answers["GET /v1/ses"] = [doubles.summary(1), doubles.down(2)]
    double.answers["GET /v1/controller"] = doubles.controller_view()
    operator = operator_at(path)
    assert operator.ses() == [doubles.summary(1), doubles.down(2)]
    assert operator.controller().cluster_id.startswith("0f7c")


def test_a_subject_is_one_path_segment_whatever_it_holds(double: OperatorDouble, path: Path) -> None:
    double.answers["GET /v1/ses/..%2Fstatus%3Fx%20%C3%A4"] = doubles.detail(doubles.summary(1))
    assert operator_at(path).se("../status?x ä").summary.number == 1
    for nothing in ("", ".", ".."):
        with pytest.raises(UsageError):
            operator_at(path).se(nothing)


def test_bodies_and_queries_are_sent(double: OperatorDouble, path: Path) -> None:
    double.answers["POST /v1/ses/7/revoke"] = doubles.detail(doubles.summary(7))
    double.answers["GET /v1/events"] = []
    double.answers["POST /v1/drain"] = {"links": 4}
    operator = operator_at(path)
    operator.revoke_se("7", reason="stolen")
    assert operator.events(after=12, wait_s=2.5) == []
    assert operator.drain().links == 4
    revoke, events, drain = double.requests
    assert revoke.body == b'{"reason":"stolen"}'
    assert events.query == {"after": "12", "wait_s": "2.5"}
    assert (drain.body, drain.method) == (b"", "POST")


@pytest.mark.parametrize(
    ("status", "code", "kind", "exit_code"),
    [
        (404, "NOTFOUND-001", NotFoundError, 10),
        (500, "STORE-001", StoreError, 4),
        (500, "STORAGE-099", StorageError, 4),
        (403, "ENROLL-007", EnrollError, 7),
        (400, "USAGE-001", UsageError, 2),
        (409, "HTTP-409", UsageError, 2),
        (404, "HTTP-404", NotFoundError, 10),
        (418, "TEA-001", ApplianceError, 1),
    ],
)
def test_a_problem_becomes_the_error_of_its_code(
    double: OperatorDouble, path: Path, status: int, code: str, kind: type[ApplianceError], exit_code: int
) -> None:
    double.answers["GET /v1/status"] = problem(status, code, detail="got 1, expected 2", advice="do this")
    with pytest.raises(ApplianceError) as caught:
        operator_at(path).status()
    error = caught.value
    assert type(error) is kind
    assert (error.code, error.hint, error.exit_code) == (code, "do this", exit_code)
    assert error.message == "It can't be: got 1, expected 2"
    assert not error.retryable


def test_a_problem_that_waiting_helps_is_retryable(double: OperatorDouble, path: Path) -> None:
    double.answers["GET /v1/status"] = problem(503, "STORE-001")
    with pytest.raises(StoreError) as caught:
        operator_at(path).status()
    assert caught.value.retryable


def test_a_refusal_that_is_no_problem_document_is_told_all_the_same(double: OperatorDouble, path: Path) -> None:
    double.answer = lambda request: (502, "text/html", b"<html>")  # type: ignore[method-assign]
    with pytest.raises(ApplianceError, match="the controller answered 502"):
        operator_at(path).status()


@pytest.mark.parametrize("raw", [b"{", b"{}", b"[]"])
def test_an_answer_of_another_shape_names_the_version(double: OperatorDouble, path: Path, raw: bytes) -> None:
    double.answers["GET /v1/status"] = raw
    with pytest.raises(ApplianceError, match="another shape") as caught:
        operator_at(path).status()
    assert "version" in caught.value.hint


def test_no_daemon(path: Path) -> None:
    with pytest.raises(UnreachableError, match="no controller runs here") as caught:
        operator_at(path).status()
    assert f"`appliance --root {path.parents[2]} run`" in caught.value.hint
    assert "`systemctl start appliance`" in this_machine.how_to_start(Paths(Path("/")))
    assert "journalctl" in this_machine.how_to_start(Paths(Path("/")))


def test_an_se_sends_whoever_asks_to_a_controller(path: Path) -> None:
    path.parent.mkdir(parents=True)
    Health(path.with_name("health.json"), "se", SystemClock()).line("se", "UP", "node 1 up", [])
    with pytest.raises(UnreachableError, match="this machine is an SE") as caught:
        operator_at(path).ses()
    assert (caught.value.code, caught.value.retryable) == ("REACH-007", False)
    assert "`appliance why`" in caught.value.hint


def test_a_stale_socket(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with pytest.raises(UnreachableError, match="no controller runs here"):
        operator_at(path).status()


def test_no_permission(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: socket.socket, _address: object) -> None:
        raise PermissionError(13, "Permission denied")

    class Refusing(socket.socket):
        connect = refuse  # type: ignore[assignment]

    monkeypatch.setattr("socket.socket", Refusing)
    path.parent.mkdir(parents=True)
    with pytest.raises(UnreachableError, match="may not be opened") as caught:
        operator_at(path).status()
    assert "usermod -aG" in caught.value.hint
    assert not caught.value.retryable


def silent(path: Path, said: bytes) -> Iterator[None]:
    """A daemon that takes one connection, says `said`, and nothing more until the client has left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(said)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join()


def test_whoever_waits_is_told_for_what(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_module, "PATIENCE_S", 0.0)
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    for _ in silent(path, b""):
        with pytest.raises(UnreachableError):
            operator_at(path, deadline_s=0.2, say=told.put).status()
        assert told.get(timeout=10) == "waiting for the controller, at most 0.2 s"


def test_a_stopped_controller_is_named(path: Path) -> None:
    for _ in silent(path, b""):
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stopped:
            health = Health(path.with_name("health.json"), "controller", SystemClock())
            health.line("controller", "ready", "", [])
            told = path.with_name("health.json").read_text().replace(f'"pid":{os.getpid()}', f'"pid":{stopped.pid}')
            path.with_name("health.json").write_text(told)
            stopped.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
            try:
                with pytest.raises(UnreachableError) as caught:
                    operator_at(path, deadline_s=0.2).status()
            finally:
                stopped.kill()
    assert f"process {stopped.pid} is stopped" in caught.value.message
    assert f"kill -CONT {stopped.pid}" in caught.value.message


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_a_frozen_daemon_meets_the_deadline(path: Path, said: bytes) -> None:
    for _ in silent(path, said):
        with pytest.raises(UnreachableError, match="did not answer within") as caught:
            operator_at(path, deadline_s=0.2).status()
        assert caught.value.retryable


def test_a_dribbling_daemon_meets_the_deadline(double: OperatorDouble, path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                try:
                    while True:
                        connection.sendall(b" ")
                except OSError:
                    pass

        thread = threading.Thread(target=run)
        thread.start()
        with pytest.raises(UnreachableError, match="did not answer within"):
            operator_at(path, deadline_s=0.1).status()
        thread.join()


def test_a_connection_broken_off(double: OperatorDouble, path: Path) -> None:
    def fail(_request: object) -> None:
        raise ConnectionAbortedError

    double.answers["GET /v1/status"] = fail
    with pytest.raises(UnreachableError, match="broke the connection off"):
        operator_at(path).status()


def test_an_answer_cut_short(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}")

        thread = threading.Thread(target=run)
        thread.start()
        with pytest.raises(UnreachableError, match="broke the connection off"):
            operator_at(path).status()
        thread.join()


def test_a_root_deeper_than_a_socket_path(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 100) / "run/appliance/controller.sock"
    with doubles.serve(path) as double:
        double.answers["GET /v1/ses"] = []
        assert operator_at(path).ses() == []
    opened = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert str(path.parent) not in opened


def test_every_operation_asks_the_path_of_the_protocol(double: OperatorDouble, path: Path) -> None:
    operator = operator_at(path)
    calls = {
        "POST /v1/ses/1/delete": lambda: operator.delete_se("1", reason="r"),
        "GET /v1/ses/1/telemetry": lambda: operator.telemetry("1", since=5.0),
        "GET /v1/why/1": lambda: operator.why("1"),
        "GET /v1/image-keys": lambda: operator.image_keys(),
        "POST /v1/image-keys": lambda: operator.create_image_key(ImageKeyTermsWish()),
        "POST /v1/image-keys/ik-1/revoke": lambda: operator.revoke_image_key("ik-1", reason="r"),
        "GET /v1/audit": lambda: operator.audit(after=3, limit=4),
        "GET /v1/audit/verify": lambda: operator.verify_audit(),
    }
    for call in calls.values():
        with pytest.raises(NotFoundError):
            call()
    assert [f"{request.method} {request.path}" for request in double.requests] == list(calls)
    assert double.requests[1].query == {"since": "5.0"}
    assert double.requests[6].query == {"after": "3", "limit": "4"}
