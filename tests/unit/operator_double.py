"""A controller's operator API as far as a client can see it: HTTP/1.1 on a unix socket, answers set by the test.

It stands at the system's border: that the real controller answers in the same shapes is tests/contract's to show.
"""

from __future__ import annotations

import os
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import msgspec

from appliance.protocol.enroll import InstanceFacts, Policy
from appliance.protocol.fleet import Reason, SeSummary, State
from appliance.protocol.operator import ControllerView, ImageKeyView, SeDetail, StatusView
from appliance.protocol.problem import CONTENT_TYPE, Problem


class Request(NamedTuple):
    """What a client asked."""

    method: str
    path: str
    query: dict[str, str]
    body: bytes


Answer = Callable[[Request], Any]


class OperatorDouble:
    """Answers by `METHOD /path`: a value, a Problem, raw bytes, or a function of the request that gives one."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.requests: list[Request] = []

    def answer(self, request: Request) -> tuple[int, str, bytes]:
        """Returns status, content type and body."""
        self.requests.append(request)
        found = self.answers.get(
            f"{request.method} {request.path}",
            Problem(type="/problems/NOTFOUND-001", title="no such thing", status=404, code="NOTFOUND-001"),
        )
        if callable(found):
            found = found(request)
        if isinstance(found, Problem):
            return found.status, CONTENT_TYPE, msgspec.json.encode(found)
        if isinstance(found, bytes):
            return 200, "application/json", found
        return 201 if request.method == "POST" else 200, "application/json", msgspec.json.encode(found)


@contextmanager
def serve(path: Path) -> Iterator[OperatorDouble]:
    """Serves an `OperatorDouble` at `path` until the end of the block."""
    double = OperatorDouble()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            target = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(target.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, kind, raw = double.answer(Request(self.command, target.path, query, body))
            except ConnectionAbortedError:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = _serve  # noqa: N815

        def log_message(self, *_args: object) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = False
        block_on_close = True

    path.parent.mkdir(parents=True, exist_ok=True)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        server = Server(f"/proc/self/fd/{directory}/{path.name}", Handler)
    finally:
        os.close(directory)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        path.unlink()


def controller_view(**changes: Any) -> ControllerView:
    """A controller."""
    view = ControllerView(
        cluster_id="0f7c2c56-6f35-4a52-9d09-3d4c4a0e8a11",
        node=1,
        epoch=1,
        version="0.1.0",
        root_fingerprint="ab" * 32,
        root_expires_at=2_400_000_000,
        node_certificate_expires_at=2_400_000_000,
        trust_version=3,
        addresses=["controller.example", "2001:db8::1"],
        enroll_port=8443,
        ssh_port=22,
        reverse_port=5097,
        metrics_port=9101,
        pid=4711,
        started_at=1000.0,
    )
    return msgspec.structs.replace(view, **changes)


def status_view(**changes: Any) -> StatusView:
    """A fleet."""
    view = StatusView(
        controller=controller_view(),
        states={"UP": 2, "DOWN": 1},
        links=2,
        heartbeat_interval_s=5.0,
        enrolled=3,
        refusals={"ENROLL-007": 12},
        problems=["SE se-3 is DOWN: no heartbeat for 9 s"],
    )
    return msgspec.structs.replace(view, **changes)


def summary(number: int, **changes: Any) -> SeSummary:
    """An SE that is UP."""
    view = SeSummary(
        se_id=f"0f7c2c56-6f35-4a52-9d09-{number:012x}",
        name=f"se-{number}",
        number=number,
        address=f"127.1.0.{number}",
        state=State.UP,
        reason=Reason.OK,
        text="link, heartbeat and reverse path work",
        since=1000.0,
        rtt_s=0.00042,
        cpu_pct=3.4,
        memory_used_bytes=430 * 1024 * 1024,
        memory_total_bytes=2 * 1024**3,
        uptime_s=93_600.0,
        labels={"site": "berlin"},
        agent_version="0.1.0",
        image_key_id="ik-0123456789ab",
        enrolled_at=900.0,
        source="192.0.2.7",
    )
    return msgspec.structs.replace(view, **changes)


def down(number: int, **changes: Any) -> SeSummary:
    """An SE that went silent."""
    gone = {"state": State.DOWN, "reason": Reason.HEARTBEAT_MISSED, "text": "no heartbeat for 9 s", "rtt_s": None}
    return summary(number, **{**gone, **changes})


def detail(of: SeSummary, **changes: Any) -> SeDetail:
    """All of an SE."""
    view = SeDetail(
        summary=of,
        status="enrolled",
        thumbprint="SHA256:Xq0",
        se_key="ssh-ed25519 AAAA",
        host_keys=["ssh-ed25519 BBBB"],
        facts=InstanceFacts(dmi_uuid="d-1", instance_id="i-1", macs=["52:54:00:12:34:56"]),
        confirmed_at=950.0,
        last_heartbeat_at=1100.0,
        drift=[],
        alarms=[],
    )
    return msgspec.structs.replace(view, **changes)


def image_key(key_id: str = "ik-0123456789ab", **changes: Any) -> ImageKeyView:
    """An image key."""
    view = ImageKeyView(
        image_key_id=key_id,
        policy=Policy.OPEN,
        created_at=1000,
        expires_at=4_000_000_000,
        max_uses=500,
        uses=3,
        networks=["192.0.2.0/24"],
        note="edge",
        status="active",
    )
    return msgspec.structs.replace(view, **changes)
