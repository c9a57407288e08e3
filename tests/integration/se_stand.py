"""A controller's two doors made for tests: real TLS and real SSH on loopback, whose behaviour a test may spoil.

`Cluster` makes keys and documents, `EnrollDoor` speaks HTTPS, `Gateway` SSH with the channel API. What they say is
right until a test says otherwise; they keep a record of what was said to them. `Se` is an SE's daemon as a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import msgspec

from appliance.paths import Paths
from appliance.pki import image_key, ssh_keys, tls
from appliance.pki import jws as signatures
from appliance.pki.authority import Authority, Issuer
from appliance.protocol import enroll, jws, strict_json, tunnel
from appliance.protocol.address import se_address
from appliance.protocol.enroll import EnrollRequest, Grant, NonceAnswer, RefreshRequest, Refusals
from appliance.protocol.problem import Problem
from appliance.protocol.seed import SCHEMA, Seed
from appliance.protocol.trust import RECEIPT_TYPE, TRUST_TYPE, Envelope, Receipt, TrustDocument, TrustNode
from appliance.runtime.health import HealthDocument, read_health

NOW = int(time.time())


def until(condition: Callable[[], Any], *, what: str, deadline_s: float = 20.0) -> Any:
    """Polls until `condition` is true, and returns what it gave."""
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.01)
    return found


class Cluster:
    """A root, a node and its keys, below `directory`."""

    def __init__(self, directory: Path, cluster_id: str = "c-1", *, now: int = NOW, days: int = 90) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.cluster_id = cluster_id
        self.authority = Authority.create(cluster_id, now=now)
        self.root_pem = self.authority.certificate_pem.decode()
        node = self.authority.issue_node(node=1, addresses=["127.0.0.1"], now=now, days=days)
        self.certificate, self.key = directory / "node.pem", directory / "node.key"
        self.certificate.write_bytes(node.certificate_pem)
        self.key.write_bytes(node.key.reveal())
        self.host_key, self.host_line = ssh_keys.generate()
        self.image_key_id, self.image_key = image_key.create_image_key()
        self.login_line = ssh_keys.generate()[1]
        self.enroll: list[str] = []
        self.ssh: list[str] = []
        self.version = 1
        self.signed_at = now

    def trust(self, by: Issuer | None = None, **changes: Any) -> Envelope:
        """The signed trust document as things stand, with `changes`; signed by the root unless `by` says who."""
        node = TrustNode(number=1, enroll=self.enroll, ssh=self.ssh, host_keys=[self.host_line])
        terms: dict[str, Any] = {
            "cluster_id": self.cluster_id,
            "version": self.version,
            "epoch": 0,
            "signed_at": self.signed_at,
            "roots": [self.root_pem],
            "nodes": [node],
            "login_keys": [self.login_line],
        }
        return (by or self.authority).sign(TRUST_TYPE, strict_json.encode(TrustDocument(**{**terms, **changes})))

    def grant(self, se_id: str, se_key: str, number: int = 1) -> Grant:
        """A grant for an SE."""
        receipt = Receipt(
            cluster_id=self.cluster_id, se_id=se_id, thumbprint=ssh_keys.fingerprint(se_key), number=number,
            image_key_id=self.image_key_id, epoch=0, issued_at=NOW,
        )  # fmt: skip
        return Grant(
            cluster_id=self.cluster_id, se_id=se_id, name="se-1", number=number, address=se_address(number),
            trust=self.trust(), receipt=self.authority.sign(RECEIPT_TYPE, strict_json.encode(receipt)),
            heartbeat_interval_s=0.3,
        )  # fmt: skip

    def write_seed(self, directory: Path, *, controllers: list[str], image_key: bool = True, **changes: Any) -> Path:
        """Writes a seed directory."""
        directory.mkdir(parents=True, exist_ok=True)
        terms: dict[str, Any] = {
            "schema": SCHEMA, "cluster_id": self.cluster_id, "image_key_id": self.image_key_id, "image_id": "img-1",
            "baked_at": self.signed_at, "controllers": controllers,
        }  # fmt: skip
        (directory / "seed.json").write_bytes(strict_json.encode(Seed(**{**terms, **changes})))
        (directory / "root-ca.pem").write_text(self.root_pem)
        (directory / "trust.json").write_bytes(strict_json.encode(self.trust()))
        if image_key:
            (directory / "image-key.pem").write_bytes(self.image_key.pkcs8().reveal())
        return directory


def problem(refusal: Refusals, *, nonce: str = "", retry_after_s: int = 0) -> tuple[int, Problem]:
    """A refusal as an answer; waits are made short."""
    told = refusal.problem(nonce=nonce)
    return told.status, msgspec.structs.replace(told, retry_after_s=retry_after_s)


Answer = tuple[int, msgspec.Struct | bytes]


class EnrollDoor:
    """HTTPS. `answers` by path may be replaced; `asked` is what came, in order."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.asked: list[str] = []
        self.requests: list[EnrollRequest] = []
        self.answers: dict[str, Callable[[bytes], Answer]] = {
            enroll.NONCE_PATH: self.nonce,
            enroll.ENROLL_PATH: self.enroll,
            enroll.REFRESH_PATH: self.refresh,
        }
        self.time = NOW
        self.keys: dict[str, str] = {}
        """se_id to key: who is enrolled."""
        context = tls.server_context(cluster.certificate, cluster.key)
        door = self

        class Request(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                self.request.settimeout(10)
                self.request = context.wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self) -> None:
                super().finish()
                self.request.close()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                door.asked.append(self.path)
                status, said = door.answers[self.path](body)
                content = said if isinstance(said, bytes) else strict_json.encode(said)
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that breaks off is what some tests are about

        self.server = Server(("127.0.0.1", 0), Request)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def nonce(self, _body: bytes) -> Answer:
        return 200, NonceAnswer(nonce=f"nonce-{len(self.asked)}", time=self.time)

    def enroll(self, body: bytes) -> Answer:
        signed = jws.parse(body, types=("image", "se"))
        wish = strict_json.decode(signed.payload, EnrollRequest, max_bytes=1 << 20)
        assert signatures.verify(signed.signatures[0], self.cluster.image_key.public_line)
        assert signatures.verify(signed.signatures[1], wish.se_key)
        assert wish.audience == self.cluster.cluster_id
        self.requests.append(wish)
        self.keys[wish.se_id] = wish.se_key
        return 201, self.cluster.grant(wish.se_id, wish.se_key)

    def refresh(self, body: bytes) -> Answer:
        signed = jws.parse(body, types=("se",))
        wish = strict_json.decode(signed.payload, RefreshRequest, max_bytes=1 << 20)
        key = self.keys.get(wish.se_id)
        if key is None:
            return problem(Refusals.SE_UNKNOWN)
        assert signatures.verify(signed.signatures[0], key)
        return 200, self.cluster.grant(wish.se_id, key)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@contextlib.contextmanager
def enroll_door(cluster: Cluster) -> Iterator[EnrollDoor]:
    """An open door."""
    door = EnrollDoor(cluster)
    try:
        yield door
    finally:
        door.close()


class _Channel(asyncssh.SSHTCPSession[bytes]):
    """The channel API on one channel."""

    def __init__(self, gateway: Gateway, number: int) -> None:
        self._gateway = gateway
        self._number = number
        self._buffer = b""

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        self._chan = chan

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].decode()
            length = int(head.lower().partition("content-length:")[2].split()[0])
            body = self._buffer[end + 4 : end + 4 + length]
            if len(body) < length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            path = head.split()[1]
            self._gateway.asked.append(path)
            answer = self._gateway.answer(path, body, self)
            if answer is not None:
                self.say(*answer)

    def say(self, status: int, said: msgspec.Struct | bytes) -> None:
        content = said if isinstance(said, bytes) else strict_json.encode(said)
        self._chan.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)

    def close(self) -> None:
        self._chan.close()


class _Session(asyncssh.SSHServerSession[bytes]):
    """A session that grants what it is told to."""

    def __init__(self, doors: set[tunnel.Door]) -> None:
        self._doors = doors

    def shell_requested(self) -> bool:
        return tunnel.Door.SHELL in self._doors

    def exec_requested(self, command: str) -> bool:
        return tunnel.Door.EXEC in self._doors

    def subsystem_requested(self, subsystem: str) -> bool:
        return tunnel.Door.SFTP in self._doors


class _Peer(asyncssh.SSHServer):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._conn = conn
        self._gateway.connections.append(conn)

    def begin_auth(self, username: str) -> bool:
        self._gateway.logins.append(username)
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return self._gateway.admits

    def session_requested(self) -> Any:
        self._gateway.asked.append("session")
        return _Session(self._gateway.doors) if tunnel.Door.SESSION in self._gateway.doors else False

    def server_requested(self, listen_host: str, listen_port: int) -> Any:
        self._gateway.asked.append(f"forward {listen_host}:{listen_port}")
        is_own = listen_host == se_address(1)
        if not (self._gateway.grants_forward if is_own else tunnel.Door.LISTEN in self._gateway.doors):
            return False

        class Listener(asyncssh.SSHListener):
            def close(self) -> None:
                pass

            async def wait_closed(self) -> None:
                pass

        return Listener()

    def connection_requested(self, dest_host: str, dest_port: int, orig_host: str, orig_port: int) -> Any:
        self._gateway.asked.append(f"channel {dest_host}:{dest_port}")
        if (dest_host, dest_port) == tunnel.SELF_TEST_CHANNEL and tunnel.Door.CONNECT not in self._gateway.doors:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "not here")
        self._gateway.channels += 1
        return self._conn.create_tcp_channel(), _Channel(self._gateway, self._gateway.channels)


class Gateway:
    """SSH. `answers` by path may be replaced (None: no answer); `asked` is what came, in order."""

    def __init__(
        self, cluster: Cluster, *, host_key: bytes | None = None, kex: tuple[str, ...] = tunnel.KEX, agent: bool = False
    ) -> None:
        """`agent` lets sessions forward agents."""
        self.cluster = cluster
        self.asked: list[str] = []
        self.logins: list[str] = []
        self.hellos: list[tunnel.Hello] = []
        self.beats: list[tunnel.Heartbeat] = []
        self.connections: list[asyncssh.SSHServerConnection] = []
        self.channels = 0
        self.doors: set[tunnel.Door] = set()
        """What it grants although it must not."""
        self.protocol = tunnel.PROTOCOL_NUMBER
        self.admits = self.grants_forward = True
        self.quarantines = False
        self.spent = True
        self.node = 1
        self.new_trust: Envelope | None = None
        self.interval_s = 0.3
        self.answers: dict[str, Callable[[bytes, _Channel], Answer | None]] = {
            tunnel.HELLO_PATH: self.hello,
            tunnel.CONFIRM_PATH: lambda _body, _channel: (200, tunnel.ConfirmAnswer(spent=self.spent)),
            tunnel.HEARTBEAT_PATH: self.heartbeat,
        }
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        key = asyncssh.import_private_key(host_key or cluster.host_key.reveal())
        self.acceptor = self.run(
            asyncssh.listen(
                "127.0.0.1", 0, server_factory=lambda: _Peer(self), server_host_keys=[key], kex_algs=list(kex),
                encryption_algs=list(tunnel.CIPHERS), signature_algs=["ssh-ed25519"],
                agent_forwarding=agent,
            )
        )  # fmt: skip
        self.address = f"127.0.0.1:{self.acceptor.get_port()}"

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Runs on the gateway's loop."""

        async def go() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(go(), self.loop).result(20)

    def answer(self, path: str, body: bytes, channel: _Channel) -> Answer | None:
        return self.answers[path](body, channel)

    def hello(self, body: bytes, _channel: _Channel) -> Answer:
        said = strict_json.decode(body, tunnel.Hello, max_bytes=1 << 20)
        self.hellos.append(said)
        return 200, tunnel.HelloAnswer(
            protocol=self.protocol, ticket="" if self.quarantines else f"ticket-{len(self.hellos)}",
            quarantined=self.quarantines, reason="test", heartbeat_interval_s=self.interval_s, time=NOW, node=self.node,
            reverse_address="127.1.0.1",
            reverse_port=5097, trust=self.new_trust,
        )  # fmt: skip

    def heartbeat(self, body: bytes, _channel: _Channel) -> Answer:
        said = strict_json.decode(body, tunnel.Heartbeat, max_bytes=1 << 20)
        self.beats.append(said)
        return 200, tunnel.HeartbeatAnswer(
            sequence=said.sequence, interval_s=self.interval_s, accepted=len(said.telemetry), trust=self.new_trust
        )

    def through_reverse(self, content: bytes) -> bytes:
        """Sends `content` to the SE over the newest link, ends its side, and returns what came back until the end."""

        async def go() -> bytes:
            channel, collected = await self.connections[-1].create_connection(_Collect, "127.1.0.1", 5097)
            channel.write(content)
            channel.write_eof()
            await asyncio.wait_for(collected.ended.wait(), 20)
            return collected.content

        return bytes(self.run(go()))

    def close(self) -> None:
        async def end() -> None:
            self.acceptor.close()
            for connection in self.connections:
                connection.abort()
            await self.acceptor.wait_closed()
            for connection in self.connections:
                with contextlib.suppress(Exception):
                    await connection.wait_closed()

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class _Collect(asyncssh.SSHTCPSession[bytes]):
    def __init__(self) -> None:
        self.content = b""
        self.ended = asyncio.Event()

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        self.content += data

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


@contextlib.contextmanager
def gateway(cluster: Cluster, **more: Any) -> Iterator[Gateway]:
    """An open gateway."""
    found = Gateway(cluster, **more)
    try:
        yield found
    finally:
        found.close()


class Se:
    """An SE's root, and its daemon as a process."""

    def __init__(
        self, root: Path, *, settings: dict[str, Any] | None = None, clock: dict[str, Any] | None = None
    ) -> None:
        self.paths = Paths(root)
        self.log = root / "daemon.log"
        terms = {
            "redial_first_s": 0.05, "redial_most_s": 0.2, "connect_timeout_s": 2.0, "telemetry_interval_s": 0.5,
            **(settings or {}),
        }  # fmt: skip
        self.paths.settings_file.parent.mkdir(parents=True)
        lines = ["[log]", 'level = "debug"', "[se]", *(f"{key} = {json.dumps(value)}" for key, value in terms.items())]
        lines += ["[clock]", *(f"{key} = {json.dumps(value)}" for key, value in (clock or {}).items())]
        self.paths.settings_file.write_text("\n".join(lines) + "\n")
        host_key = root / "etc/ssh/ssh_host_ed25519_key.pub"
        host_key.parent.mkdir(parents=True)
        self.host_line = ssh_keys.generate()[1]
        host_key.write_text(self.host_line + " root@se\n")
        self.paths.mode_file.parent.mkdir(parents=True)
        self.process: subprocess.Popen[bytes] | None = None
        done = subprocess.run(
            [sys.executable, "-m", "appliance", "--root", str(root), "mode", "set", "se"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def seed(self) -> Path:
        """Where the image's seed lies."""
        return self.paths.root / "etc/appliance/seed"

    @property
    def command(self) -> list[str]:
        """The daemon's command line."""
        return ["-m", "appliance", "--root", str(self.paths.root), "run"]

    def start(self, *command: str) -> Se:
        """Starts the daemon."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *(command or self.command)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def health(self) -> HealthDocument:
        """Its own view; waits until there is one of this process."""
        assert self.process is not None
        pid = self.process.pid

        def own() -> HealthDocument | None:
            found = read_health(self.paths.health_file)
            return found if found is not None and found.pid == pid else None

        found: HealthDocument = until(own, what="a health file")
        return found

    def logged(self, text: str, *, deadline_s: float = 20.0) -> str:
        """Waits until a line with `text` is logged, and returns it."""

        def line() -> str | None:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            return next((line for line in lines if text in line), None)

        found: str = until(line, what=f"{text!r} in {self.log}", deadline_s=deadline_s)
        return found

    def until_up(self) -> None:
        """Waits for state UP."""
        until(lambda: self.health().state == "UP", what="the SE is up")

    def identity(self) -> dict[str, Any]:
        """The value in identity.json."""
        value: dict[str, Any] = json.loads((self.paths.se_state / "identity.json").read_text())["value"]
        return value

    def stop(self) -> float:
        """Asks it to stop; returns how long that took, seconds. It must end properly."""
        assert self.process is not None
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=20)
        self.process = None
        assert code == 0, self.log.read_text()
        return time.monotonic() - begun

    def end(self) -> None:
        """Makes sure that nothing stays."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def service_engine(root: Path, **more: Any) -> Iterator[Se]:
    """An SE below `root`, not started yet."""
    se = Se(root, **more)
    try:
        yield se
    finally:
        se.end()


class Listener:
    """A TCP port that does with each connection what a test says."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._sock.getsockname()[1]}"
        self.port = self._sock.getsockname()[1]
        self.accepted: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._main = threading.Thread(target=self._accept)
        self._main.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return
            self.accepted.append(sock)
            thread = threading.Thread(target=self._guarded, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _guarded(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self._serve(sock)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._main.join()
        self._sock.close()
        for sock in self.accepted:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self.accepted:
            sock.close()


@contextlib.contextmanager
def listener(serve: Callable[[socket.socket], None]) -> Iterator[Listener]:
    """An open port."""
    found = Listener(serve)
    try:
        yield found
    finally:
        found.close()


def echo(sock: socket.socket) -> None:
    """Sends back what comes, and ends when the peer does."""
    while received := sock.recv(65536):
        sock.sendall(received)
    sock.shutdown(socket.SHUT_WR)


def silent(sock: socket.socket) -> None:
    """Takes everything and says nothing."""
    while sock.recv(65536):
        pass


def garbage(sock: socket.socket) -> None:
    """Says nonsense."""
    sock.sendall(b"\x00\xff\r\n\r\nHTTP/9 garbage\r\n" * 100)
    silent(sock)


def dripping(sock: socket.socket) -> None:
    """Says one byte now and then, for ever."""
    stop = threading.Event()
    while not stop.wait(0.1):
        sock.sendall(b"S")
