"""The guarded HTTP listener over real sockets and real TLS: limits, deadlines, caps, and nobody delays anybody else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import socket
import ssl
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from appliance.controller import listener
from appliance.controller.descriptors import Descriptors
from appliance.controller.listener import FrontEnd, GuardedProtocol, HttpLimits, TlsListener, Turns, peer_address
from appliance.controller.web import Endpoint, Request, Response, application
from appliance.pki import tls
from appliance.pki.authority import Authority

LIMITS = HttpLimits(
    max_header_bytes=1024, max_body_bytes=4096, header_timeout_s=0.3, body_timeout_s=0.4, keep_alive_s=1, max_queued=16
)
HANDSHAKE_S = 0.4
PATIENT = HttpLimits(
    max_header_bytes=1024, max_body_bytes=4096, header_timeout_s=60, body_timeout_s=60, keep_alive_s=60, max_queued=16
)
"""For what isn't about deadlines: a busy machine must not meet one."""


class Pems:
    """A node's certificate, and the root that signed it."""

    def __init__(self, directory: Path) -> None:
        now = int(time.time())
        authority = Authority.create("c-1", now=now)
        issued = authority.issue_node(node=1, addresses=["127.0.0.1"], now=now)
        self.certificate, self.key = directory / "node.pem", directory / "node.key"
        self.certificate.write_bytes(issued.certificate_pem)
        self.key.write_bytes(issued.key.reveal())
        self.root = authority.certificate_pem.decode()


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Pems:
    return Pems(tmp_path_factory.mktemp("pems"))


class Server:
    """A listener with three endpoints, and what it was told."""

    def __init__(
        self, pems: Pems, *, hurry: bool = False, most: int = 1000, per_source: int = 1000, limits: HttpLimits = PATIENT
    ) -> None:
        self.pems = pems
        self.handled: list[str] = []
        self.handshakes: list[tuple[str, str]] = []
        self.release = asyncio.Event()
        self.task: asyncio.Task[None]
        endpoints = [
            Endpoint("GET", "/hello", self._hello, "", {200: None}),
            Endpoint("GET", "/slow", self._slow, "", {200: None}),
            Endpoint("POST", "/echo", self._echo, "", {200: None}, bytes),
        ]
        self.front = FrontEnd(
            application("test", endpoints, max_body=LIMITS.max_body_bytes), LIMITS if hurry else limits
        )
        self.sock = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.listener = TlsListener(
            self.sock, tls.server_context(pems.certificate, pems.key), self.front,
            descriptors=Descriptors(time.monotonic),
            handshake_timeout_s=HANDSHAKE_S if hurry else 60.0,
            max_connections=most, max_per_source=per_source,
            on_handshake=lambda source, error: self.handshakes.append((source, error)),
        )  # fmt: skip

    async def _hello(self, request: Request, _body: None) -> Response:
        self.handled.append("hello")
        return Response(f"hello {request.state.source}")

    async def _slow(self, _request: Request, _body: None) -> Response:
        self.handled.append("slow")
        await self.release.wait()
        return Response("slow")

    async def _echo(self, _request: Request, body: bytes) -> Response:
        self.handled.append("echo")
        return Response(body)

    @property
    def address(self) -> tuple[str, int]:
        address: tuple[str, int] = self.sock.getsockname()
        return address

    async def client(self, *, source: str = "127.0.0.1") -> Client:
        """A client that has shaken hands."""
        context = tls.client_context([self.pems.root])
        reader, writer = await asyncio.open_connection(*self.address, ssl=context, local_addr=(source, 0))
        return Client(reader, writer)

    async def plain(self, *, source: str = "127.0.0.1") -> Client:
        """A client that has only connected."""
        return Client(*await asyncio.open_connection(*self.address, local_addr=(source, 0)))


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of the next answer."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)).decode().lower()
        length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length:"))
        return int(head.split(" ")[1]), await self.reader.readexactly(length)

    async def ended(self, *, within_s: float) -> float:
        """Waits for the end of the connection and returns how long that took."""
        began = time.monotonic()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert await asyncio.wait_for(self.reader.read(), within_s) == b""
        return time.monotonic() - began

    async def trickle(self, byte: bytes, *, every_s: float = 0.05, most: int = 200) -> float:
        """Sends byte after byte until the other side says or ends something; returns how long that took."""
        began = time.monotonic()
        for _ in range(most):
            if self.reader._buffer or self.reader.at_eof() or self.writer.is_closing():  # type: ignore[attr-defined]
                break
            self.say(byte)
            await asyncio.sleep(every_s)
        return time.monotonic() - began

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    server.task = asyncio.create_task(server.listener.run())
    try:
        yield server
    finally:
        server.release.set()
        server.task.cancel()
        await asyncio.gather(server.task, return_exceptions=True)
        server.sock.close()


async def until(condition: Callable[[], object], *, within_s: float = 5.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.01)


Act = Callable[[Server], Coroutine[Any, Any, None]]


def descriptors() -> int:
    """Open descriptors of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def runner(pems: Pems, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> Callable[..., None]:
    """Runs a test's coroutine against a server; nothing may be left behind."""

    def go(act: Act, **terms: Any) -> None:
        async def whole() -> None:
            async with serving(Server(pems, **terms)) as server:
                await act(server)
            await until(lambda: len(asyncio.all_tasks()) == 1)

        with asyncio.Runner(loop_factory=loop_factory) as first:
            first.run(asyncio.sleep(0))  # a first loop may open what the process keeps
        before = descriptors()
        with asyncio.Runner(loop_factory=loop_factory) as second:
            second.run(whole())
        gc.collect()
        assert descriptors() <= before

    return go


@pytest.fixture
def run(pems: Pems) -> Callable[..., None]:
    """In the daemon's kind of loop."""
    return runner(pems, uvloop.new_event_loop)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run_in_both(request: pytest.FixtureRequest, pems: Pems) -> Callable[..., None]:
    """In both kinds of loop: they accept differently."""
    return runner(pems, request.param)


HELLO = b"GET /hello HTTP/1.1\r\nhost: c\r\n\r\n"
SLOW = b"GET /slow HTTP/1.1\r\nhost: c\r\n\r\n"


def echo(body: bytes) -> bytes:
    return b"POST /echo HTTP/1.1\r\nhost: c\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def chunked(*chunks: bytes, trailers: bytes = b"") -> bytes:
    head = b"POST /echo HTTP/1.1\r\nhost: c\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailers + b"\r\n"


# What must work.


def test_several_requests_over_one_connection(run_in_both: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        for number in range(20):
            client.say(HELLO)
            assert await client.answer() == (200, b"hello 127.0.0.1")
            body = bytes([number]) * 200 * number
            client.say(echo(body))
            assert await client.answer() == (200, body)
        assert server.handshakes == [("127.0.0.1", "")]
        await client.close()

    run_in_both(act)


def test_a_connection_that_ended_is_gone_without_the_collector(run: Callable[..., None]) -> None:
    """Two hundred enrollments a second would give it work that heartbeats wait for."""

    async def act(server: Server) -> None:
        client = await server.client()
        client.say(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer())[0] == 200
        made = [weakref.ref(protocol) for protocol in server.front.server_state.connections]
        assert len(made) == 1
        gc.disable()
        try:
            await client.close()
            await until(lambda: made[0]() is None)
        finally:
            gc.enable()

    run(act)


def test_a_handshake_that_failed_leaves_nothing_for_the_collector(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[GuardedProtocol]] = []
    make = FrontEnd.protocol

    def noted(front: FrontEnd, **terms: Any) -> GuardedProtocol:
        protocol = make(front, **terms)
        made.append(weakref.ref(protocol))
        return protocol

    async def act(server: Server) -> None:
        gc.disable()
        try:
            client = await server.plain()
            client.say(b"GET / HTTP/1.1\r\n\r\n")
            await until(lambda: server.handshakes)
            await until(lambda: made[0]() is None)
        finally:
            gc.enable()
        assert server.front.refusals["handshake"] == 1
        await client.close()

    monkeypatch.setattr(FrontEnd, "protocol", noted)
    run(act)


def test_pipelined_requests_are_answered_in_order(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        client.say(SLOW, echo(b"one"), HELLO, chunked(b"tw", b"o"))
        await until(lambda: server.handled == ["slow"])
        client.say(echo(b"three"))
        server.release.set()
        answers = [await client.answer() for _ in range(5)]
        assert [body for _, body in answers] == [b"slow", b"one", b"hello 127.0.0.1", b"two", b"three"]
        await client.close()

    run(act)


def test_as_many_requests_as_may_wait_are_answered_and_one_more_ends_the_connection(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        for more in (0, 1):
            server.release.clear()
            server.handled.clear()
            client = await server.client()
            client.say(SLOW)
            await until(lambda: server.handled == ["slow"])
            client.say(*[HELLO] * (LIMITS.max_queued + more))
            if more:
                assert await client.answer() == (429, b"")
                await client.ended(within_s=10)
            else:
                server.release.set()
                assert {(await client.answer())[0] for _ in range(LIMITS.max_queued + 1)} == {200}
            assert server.front.refusals["429"] == more, more
            await client.close()

    run(act)


def test_a_request_in_single_bytes_is_a_request(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        for byte in echo(b"x" * 30):
            client.say(bytes([byte]))
            await asyncio.sleep(0)
        assert await client.answer() == (200, b"x" * 30)
        await client.close()

    run(act)


def test_up_to_the_limits_all_is_well(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        client.say(echo(b"b" * LIMITS.max_body_bytes))
        assert await client.answer() == (200, b"b" * LIMITS.max_body_bytes)
        client.say(chunked(*[b"b" * 64] * 64))
        assert await client.answer() == (200, b"b" * LIMITS.max_body_bytes)
        client.say(b"GET /hello HTTP/1.1\r\nhost: c\r\nx: ", b"h" * (LIMITS.max_header_bytes - 60), b"\r\n\r\n")
        assert (await client.answer())[0] == 200
        await client.close()

    run(act)


def test_a_handler_may_take_longer_than_any_deadline(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        client.say(SLOW)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reader.read(1), LIMITS.keep_alive_s + 0.3)
        server.release.set()
        other = await server.client()
        await other.close()
        await client.close()

    run(act, hurry=True)


# Limits.


@pytest.mark.parametrize(
    "head",
    [
        b"GET /hello HTTP/1.1\r\nhost: c\r\nx: " + b"h" * 1100 + b"\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nhost: c\r\n" + b"a: b\r\n" * 300 + b"\r\n",
        b"GET /hello?" + b"u" * 1100 + b" HTTP/1.1\r\nhost: c\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nhost: c\r\nx: " + b"h" * 1100,
        b"GET /" + b"u" * 1100,
        b"GET /hello HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
    ],
    ids=["one long", "many", "address", "no end", "address without end", "flood"],
)
def test_headers_over_the_limit_are_refused_at_once(run: Callable[..., None], head: bytes) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        client.say(HELLO)
        await client.answer()
        client.say(head)
        assert await client.answer() == (431, b"")
        await client.ended(within_s=10)
        assert server.handled == ["hello"]
        await client.close()

    run(act)


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        client.say(b"POST /echo HTTP/1.1\r\nhost: c\r\ncontent-length: %d\r\n\r\n" % (LIMITS.max_body_bytes + 1))
        assert await client.answer() == (413, b"")
        await client.ended(within_s=10)
        assert server.handled == []
        await client.close()

    run(act)


ENDLESS = {
    "chunks": b"200\r\n" + b"b" * 512 + b"\r\n",
    "chunk extensions": b"1;" + b"e" * 600 + b"\r\nb\r\n",
    "trailers": b"0\r\n" + b"t: v\r\n" * 200,
    "one trailer": b"0\r\nt: " + b"v" * 1500,
}


@pytest.mark.parametrize("part", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_body_without_an_end_is_cut_by_its_bytes(run: Callable[..., None], part: bytes) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        client.say(b"POST /echo HTTP/1.1\r\nhost: c\r\ntransfer-encoding: chunked\r\n\r\n")
        sent, rest = 0, part[part.startswith(b"0\r\n") * 3 :]
        client.say(part)
        while not client.reader._buffer and not client.reader.at_eof():  # type: ignore[attr-defined]
            client.say(rest)
            sent += len(rest)
            await asyncio.sleep(0.002)
            assert sent < 20 * LIMITS.max_body_bytes, "nobody stopped it"
        assert (await client.answer())[0] == 413
        await client.close()

    run(act)


def test_nothing_that_follows_a_refused_request_is_carried_out(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        client.say(b"GET /hello HTTP/1.1\r\nhost: c\r\nx: " + b"h" * 1100 + b"\r\n\r\n", HELLO, echo(b"x"))
        assert (await client.answer())[0] == 431
        await client.ended(within_s=10)
        assert server.handled == []
        await client.close()

    run(act)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"garbage\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nhost: c\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello", 400),
        (b"POST /echo HTTP/1.1\r\nhost: c\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nhost: c\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nhost: c\r\ncontent-length: 99999999999999999999999999\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nhost: c\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /nowhere HTTP/1.1\r\nhost: c\r\n\r\n", 404),
        (b"DELETE /hello HTTP/1.1\r\nhost: c\r\n\r\n", 405),
        (b"GET /hello HTTP/1.1\r\nhost: c\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 200),
        (b"GET /hello HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_odd_requests_get_a_clear_answer_and_end(run: Callable[..., None], raw: bytes, status: int) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        client.say(raw)
        found = await client.answer()
        assert found[0] == status
        if status == 400:
            await client.ended(within_s=10)
        await client.close()
        client = await server.client()
        client.say(HELLO)
        assert (await client.answer())[0] == 200
        await client.close()

    run(act)


# Deadlines.


def test_who_says_nothing_after_the_handshake_is_cut_off(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        began = time.monotonic()
        assert await client.answer() == (408, b"")
        assert time.monotonic() - began > LIMITS.header_timeout_s * 0.9
        await client.ended(within_s=10)
        await client.close()

    run(act, hurry=True)


@pytest.mark.parametrize(
    ("before", "byte", "limit_s"),
    [
        (b"GET /hello HTTP/1.1\r\nx: ", b"a", LIMITS.header_timeout_s),
        (b"", b"\r\n", LIMITS.header_timeout_s),
        (HELLO + b"GET /", b"a", LIMITS.header_timeout_s),
        (HELLO, b"\r\n", LIMITS.header_timeout_s),
        (b"POST /echo HTTP/1.1\r\ncontent-length: 4000\r\n\r\n", b"b", LIMITS.body_timeout_s),
        (
            b"POST /echo HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n",
            b"1\r\nb\r\n",
            LIMITS.body_timeout_s,
        ),
    ],
    ids=["headers", "empty lines", "second headers", "empty lines after an answer", "body", "chunks"],
)
def test_who_trickles_is_cut_off_by_the_whole_not_by_the_byte(
    run: Callable[..., None], before: bytes, byte: bytes, limit_s: float
) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        client.say(before)
        if before.startswith(HELLO):
            assert (await client.answer())[0] == 200
        assert await client.trickle(byte) > limit_s * 0.9
        assert await client.answer() == (408, b"")
        await client.close()

    run(act, hurry=True)


def test_of_too_many_requests_in_part_the_first_is_read_no_further(run: Callable[..., None]) -> None:
    """And ends at its deadline: given up at once, it would be back at once."""

    async def act(server: Server) -> None:
        slow = [await server.client() for _ in range(3)]
        whole = await server.client()
        for client in slow:
            client.say(b"GET /hello HTTP/1.1\r\nX")
            # Said one after the other: the order is what is judged.
            whole.say(HELLO)
            assert (await whole.answer())[0] == 200
        assert server.front.refusals["begun"] == 1
        slow[0].say(b": y\r\n\r\n")
        slow[1].say(b": y\r\n\r\n")
        assert (await slow[1].answer())[0] == 200
        slow.append(await server.client())
        slow[3].say(b"POST /echo HTTP/1.1\r\nContent-Length: 2\r\n\r\nx")
        whole.say(HELLO)
        assert (await whole.answer())[0] == 200
        slow[3].say(b"y")
        assert await slow[3].answer() == (200, b"xy")
        slow[2].say(b": y\r\n\r\n")
        assert (await slow[2].answer())[0] == 200, "a whole one counts no more"
        assert await slow[0].answer() == (408, b"")
        assert server.front.refusals["begun"] == 1
        assert not server.front._begun
        for client in (*slow, whole):
            await client.close()

    run(act, limits=PATIENT._replace(header_timeout_s=4.0, max_begun=2))


def test_a_quiet_connection_is_closed_without_a_word(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        client = await server.client()
        client.say(HELLO)
        assert (await client.answer())[0] == 200
        assert await client.ended(within_s=30) > LIMITS.keep_alive_s * 0.9
        await client.close()

    run(act, hurry=True)


@pytest.mark.parametrize("said", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
def test_a_handshake_has_its_own_deadline(run: Callable[..., None], said: bytes) -> None:
    async def act(server: Server) -> None:
        client = await server.plain()
        client.say(said)
        await client.ended(within_s=30)
        await until(lambda: server.handshakes)
        ((source, error),) = server.handshakes
        assert source == "127.0.0.1"
        assert error
        assert error.startswith("nothing was said within") == (not said)
        assert not server.listener._open
        await client.close()

    run(act, hurry=True)


def test_silence_is_taken_from_the_time_for_the_handshake(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        server.listener._handshake_timeout_s = 4.0
        client = await server.plain()
        await asyncio.sleep(2.0)  # the silence that is judged
        client.say(b"\x16")
        await client.ended(within_s=30)
        await until(lambda: server.handshakes)
        ((_, error),) = server.handshakes
        took_s = re.search(r"taking longer than ([\d.]+) seconds", error)
        assert took_s is not None, error
        assert float(took_s[1]) <= 2.0
        await client.close()

    run(act)


@pytest.mark.parametrize("said", [HELLO, b"SSH-2.0-OpenSSH_9.2\r\n", b"\x16\x03\x01\x00\x02xx", os.urandom(500)])
def test_what_is_no_handshake_is_told_with_its_source(run: Callable[..., None], said: bytes) -> None:
    async def act(server: Server) -> None:
        client = await server.plain(source="127.0.0.3")
        client.say(said)
        await client.reader.read(100)
        await until(lambda: server.handshakes)
        assert [source for source, error in server.handshakes if error] == ["127.0.0.3"]
        await client.close()

    run(act, hurry=True)


def test_who_turns_away_within_the_handshake_is_told(run: Callable[..., None], tmp_path: Path) -> None:
    async def act(server: Server) -> None:
        other = Authority.create("c-2", now=int(time.time()))
        context = tls.client_context([other.certificate_pem.decode()])
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection(*server.address, ssl=context)
        await until(lambda: server.handshakes)
        # With TLS 1.3 the server is done before the client looks at the certificate; either way it is told once.
        assert len(server.handshakes) == 1
        await until(lambda: not server.listener._open)

    run(act, hurry=True)


# Nobody delays anybody else.


def test_silent_clients_of_every_kind_delay_nobody(run_in_both: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        silent = [await server.plain() for _ in range(60)]
        silent += [await server.client() for _ in range(20)]
        half = [await server.client() for _ in range(20)]
        for client in half:
            client.say(b"POST /echo HTTP/1.1\r\ncontent-length: 10\r\n\r\nhalf")
        began = time.monotonic()
        for _ in range(5):
            client = await server.client()
            client.say(HELLO)
            assert (await client.answer())[0] == 200
            await client.close()
        assert time.monotonic() - began < 5  # one after the other they would cost 30
        for client in silent + half:
            await client.close()

    run_in_both(act, hurry=True)


def test_one_slow_request_does_not_delay_another(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        slow = await server.client()
        slow.say(SLOW)
        await until(lambda: server.handled == ["slow"])
        client = await server.client()
        client.say(HELLO)
        assert (await client.answer())[0] == 200
        server.release.set()
        assert await slow.answer() == (200, b"slow")
        await client.close()
        await slow.close()

    run(act, hurry=True)


# Caps.


def test_a_source_has_a_cap_and_others_still_get_in(run_in_both: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        held = [await server.plain(source="127.0.0.2") for _ in range(3)]
        await until(lambda: server.listener._open["127.0.0.2"] == 3)
        extra = await server.plain(source="127.0.0.2")
        await extra.ended(within_s=30)  # at once: the deadline of a handshake is later than that
        assert server.listener.refused == 1
        client = await server.client(source="127.0.0.4")
        client.say(HELLO)
        assert await client.answer() == (200, b"hello 127.0.0.4")
        for each in (*held, extra, client):
            await each.close()
        await until(lambda: not server.listener._open)
        again = await server.client(source="127.0.0.2")
        await again.close()

    run_in_both(act, per_source=3)


def test_there_is_a_cap_in_all(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        held = [await server.plain(source=f"127.0.0.{number}") for number in range(2, 7)]
        await until(lambda: server.listener._open.total() == 5)
        extra = await server.plain(source="127.0.0.9")
        await extra.ended(within_s=30)  # at once: the deadline of a handshake is later than that
        await held[0].close()
        await until(lambda: server.listener._open.total() < 5)
        client = await server.client()
        await client.close()
        for each in (*held[1:], extra):
            await each.close()

    run(act, most=5)


def test_caps_hold_in_a_burst(run_in_both: Callable[..., None]) -> None:
    """All wait in the backlog before the first is accepted."""

    async def act(server: Server) -> None:
        socks = []
        for _ in range(100):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(server.address)
            socks.append(sock)
        await until(lambda: server.listener.refused + server.listener._open.total() == 100)
        assert server.listener.refused == 90
        for sock in socks:
            sock.close()
        await until(lambda: not server.listener._open)

    run_in_both(act, per_source=10)


def test_who_rests_makes_room_for_who_comes(run_in_both: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """At a cap the one that rested the longest goes; who is being answered, or has not asked yet, stays."""
    monkeypatch.setattr(listener, "MIN_REST_S", 0.0)

    async def act(server: Server) -> None:
        resting = []
        for _ in range(2):
            resting.append(await server.client(source="127.0.0.2"))
            resting[-1].say(HELLO)
            await resting[-1].answer()
        busy = await server.client(source="127.0.0.2")
        busy.say(SLOW)
        await until(lambda: server.handled[-1] == "slow")
        other = await server.client(source="127.0.0.3")
        other.say(HELLO)
        await other.answer()
        newcomer = await server.client(source="127.0.0.2")
        newcomer.say(HELLO)
        assert await newcomer.answer() == (200, b"hello 127.0.0.2")
        await resting[0].ended(within_s=10)  # long before it rested for so long that it would be closed anyway
        resting[1].say(HELLO)
        assert await resting[1].answer() == (200, b"hello 127.0.0.2")
        server.release.set()
        assert await busy.answer() == (200, b"slow")
        assert (server.listener.shed, server.listener.refused) == (1, 0)
        for each in (*resting, busy, other, newcomer):
            await each.close()
        await until(lambda: not server.listener._open)
        assert not server.listener._resting
        assert not server.listener._resting_in

    run_in_both(act, per_source=3)


def test_who_rests_makes_room_for_another_source_at_the_cap_in_all(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "MIN_REST_S", 0.0)

    async def act(server: Server) -> None:
        rests, busy = await server.client(source="127.0.0.2"), await server.client(source="127.0.0.2")
        rests.say(HELLO)
        await rests.answer()
        busy.say(SLOW)
        await until(lambda: server.handled[-1] == "slow")
        newcomer = await server.client(source="127.0.0.3")
        newcomer.say(SLOW)
        await rests.ended(within_s=10)
        await until(lambda: server.handled[-2:] == ["slow", "slow"])
        extra = await server.plain(source="127.0.0.4")
        await extra.ended(within_s=10)
        assert (server.listener.shed, server.listener.refused) == (1, 1)
        for each in (rests, busy, newcomer, extra):
            await each.close()

    run(act, most=2)


def test_who_has_rested_for_a_moment_only_stays(run: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        asked = await server.client()
        asked.say(HELLO)
        await asked.answer()
        extra = await server.plain()
        await extra.ended(within_s=30)  # at once: the deadline of a handshake is later than that
        asked.say(HELLO)
        assert await asked.answer() == (200, b"hello 127.0.0.1")
        assert (server.listener.shed, server.listener.refused) == (0, 1)
        for each in (asked, extra):
            await each.close()

    run(act, per_source=1)


def test_a_stop_closes_what_is_open(run_in_both: Callable[..., None]) -> None:
    async def act(server: Server) -> None:
        clients = [await server.client(), await server.plain(), await server.client()]
        clients[0].say(HELLO)
        await clients[0].answer()
        clients[2].say(SLOW)
        await until(lambda: server.handled == ["hello", "slow"])
        server.task.cancel()
        for client in clients:
            await client.ended(within_s=10)
            await client.close()

    run_in_both(act)


def test_a_few_begin_in_one_turn_of_the_loop_in_the_order_of_their_coming() -> None:
    async def go() -> None:
        turns, begun = Turns(2), []
        turn_now = 0

        async def begin(number: int) -> None:
            await turns.mine()
            begun.append((turn_now, number))

        tasks = [asyncio.create_task(begin(number)) for number in range(7)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        while not all(task.done() for task in tasks):
            turn_now += 1
            await asyncio.sleep(0)
        assert [number for _, number in begun] == [0, 1, 2, 4, 5, 6]
        counts = Counter(turn for turn, _ in begun)
        assert set(counts.values()) <= {1, 2}, "no more than two a turn"
        await asyncio.wait_for(turns.mine(), 5)

    asyncio.run(go())


def test_peer_addresses_are_plain() -> None:
    assert peer_address(("192.0.2.1", 4)) == "192.0.2.1"
    assert peer_address(("::ffff:192.0.2.1", 4, 0, 0)) == "192.0.2.1"
    assert peer_address(("2001:db8::1", 4, 0, 0)) == "2001:db8::1"
    assert peer_address("") == peer_address(None) == ""
