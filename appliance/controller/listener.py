"""Accepting HTTP: uvicorn's httptools protocol object behind our own guard, on TLS, unix sockets and SSH channels.

uvicorn by itself takes 100 MiB of headers, waits for a body for ever and has no deadline for a TLS handshake
(FACTS, trap 18). The guard adds those limits. TLS connections are accepted by our own loop, so that a silent client
costs one counted slot until its deadline and never delays anybody else, and so that a failed handshake is known by
its source.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import random
import socket
import ssl
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from starlette.applications import Starlette
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from appliance.controller.acceptor import Acceptor
from appliance.controller.descriptors import Descriptors
from appliance.controller.rate import network_of

_log = logging.getLogger(__name__)

_ANSWER = b"HTTP/1.1 %d %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_LARGE = (413, b"Content Too Large")
_HEADERS_TOO_LARGE = (431, b"Request Header Fields Too Large")
MIN_HANDSHAKE_S = 0.01
"""Left of the time for a handshake to one that spoke in its last moment."""
_SET_ASIDE_BYTES = 64 * 1024
PATIENT = 0.7
"""Part of the time for a handshake that each client has to say something; between it and the whole, at random."""
HANDSHAKES_A_TURN = 2
"""That begin in one turn of the loop: each takes a millisecond, and hundreds of clients that are turned away come back
in one wave, for all of which a heartbeat would wait."""
MIN_REST_S = 1.0
"""How long a connection rests between two requests before it may have to make room."""
_CHUNKED_FACTOR = 2
"""What a body in chunks may take on the wire, as a multiple of what it may hold."""


class HttpLimits(NamedTuple):
    """What one connection may take."""

    max_header_bytes: int
    max_body_bytes: int
    header_timeout_s: float
    """From the first byte of a request (or from connecting) to the end of its headers."""
    body_timeout_s: float
    keep_alive_s: int
    max_queued: int
    """Requests that may wait behind the one that is answered."""
    max_begun: int = sys.maxsize
    """Requests that may be there in part, on all connections: each piece of each costs the loop a moment."""
    unread_timeout_s: float = math.inf
    """How long a peer may leave answers lie that fill the connection."""


Identify = Callable[[asyncio.Transport], dict[str, Any]]
"""Says who is at the other end of a fresh connection."""


class FrontEnd:
    """One ASGI application with its limits: makes a protocol object for each connection."""

    def __init__(self, app: Starlette, limits: HttpLimits) -> None:
        self.limits = limits
        self.config = Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=limits.keep_alive_s,
            server_header=False,
            date_header=False,
            proxy_headers=False,
        )
        self.config.load()
        self.server_state = ServerState()
        self._begun: dict[GuardedProtocol, None] = {}
        """Who said a part of a request, longest first."""
        self.refusals: Counter[str] = Counter()
        """Requests by the status that refused them unread, connections as `connection` and `shed`."""

    def protocol(self, *, identify: Identify | None = None, **state: Any) -> GuardedProtocol:
        """Returns a protocol for one connection; `state`, and what `identify` adds, becomes `request.state`."""
        return GuardedProtocol(self, state, identify)

    def begun(self, protocol: GuardedProtocol) -> None:
        """A part of a request came; where too many are there in part, the first that was is read no further."""
        self._begun[protocol] = None
        if len(self._begun) > self.limits.max_begun:
            next(iter(self._begun)).set_aside()

    def ended(self, protocol: GuardedProtocol) -> None:
        """The request is whole, or refused."""
        self._begun.pop(protocol, None)

    def close(self) -> None:
        """Closes all connections."""
        for connection in list(self.server_state.connections):
            connection.transport.close()


class GuardedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with bounds on header bytes, body bytes and the time either may take."""

    def __init__(self, front: FrontEnd, state: dict[str, Any], identify: Identify | None) -> None:
        super().__init__(front.config, front.server_state, state)
        self._front = front
        self._identify = identify
        self.access_log = False
        self._limits = front.limits
        self._refusals = front.refusals
        self._received_bytes = 0
        """Of the request that is being read, as they came: with chunk headers and trailers, which uvicorn gathers."""
        self._body_bytes = 0
        self._reading = ""
        self._deadline: asyncio.TimerHandle | None = None
        self.closed: Callable[[], None] | None = None
        """Called once when the connection is gone."""
        self.rests: Callable[[bool], None] | None = None
        """Told True when it begins to wait for a next request, False when that came or the connection is gone."""
        self._unread: asyncio.TimerHandle | None = None
        """Runs while the peer takes no more of its answers: a request that waits for that has no other deadline."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._identify is not None:
            self.app_state.update(self._identify(transport))
        self._arm("headers", self._limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self.rest(begins=False)
        self._disarm()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self._read_again()
        if self.closed is not None:
            self.closed()
        self.closed = self.rests = None  # `rests` knows this object: a cycle, which the collector would have to find

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._reading == "":
            self.rest(begins=False)
            self._received_bytes = 0
            self._arm("headers", self._limits.header_timeout_s)
        self._received_bytes += len(data)
        if self._received_bytes > self._limits.max_header_bytes + _CHUNKED_FACTOR * self._limits.max_body_bytes:
            self._refuse(*(_TOO_LARGE if self._reading == "body" else _HEADERS_TOO_LARGE))
            return
        super().data_received(data)
        if self._reading == "headers" and self._received_bytes > self._limits.max_header_bytes:
            self._refuse(*_HEADERS_TOO_LARGE)
        elif self._reading:
            self._front.begun(self)

    def on_headers_complete(self) -> None:
        if self.transport.is_closing():
            return  # what came with a refused request isn't carried out
        size = sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url)
        if size > self._limits.max_header_bytes:
            self._refuse(*_HEADERS_TOO_LARGE)
            return
        declared = next((value for name, value in self.headers if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._limits.max_body_bytes:
            self._refuse(*_TOO_LARGE)
            return
        if len(self.pipeline) >= self._limits.max_queued:
            self._refuse(429, b"Too Many Requests")
            return
        self._body_bytes = 0
        self._arm("body", self._limits.body_timeout_s)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self.transport.is_closing():
            return
        if self._body_bytes > self._limits.max_body_bytes:
            self._refuse(*_TOO_LARGE)
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._disarm()
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._reading == "" and self.timeout_keep_alive_task is not None:
            self.rest(begins=True)

    def pause_writing(self) -> None:
        """Called by the transport."""
        super().pause_writing()
        if self._unread is None and self._limits.unread_timeout_s < math.inf:
            self._unread = self.loop.call_later(self._limits.unread_timeout_s, self._never_reads)

    def resume_writing(self) -> None:
        """Called by the transport."""
        self._read_again()
        super().resume_writing()

    def _read_again(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _never_reads(self) -> None:
        self._unread = None
        self._refusals["unread"] += 1
        self.transport.abort()

    def rest(self, *, begins: bool) -> None:
        """Tells `rests` that a rest begins or ends."""
        if self.rests is not None:
            self.rests(begins)

    def _arm(self, reading: str, timeout_s: float) -> None:
        self._disarm()
        self._reading = reading
        self._deadline = self.loop.call_later(timeout_s, self.too_slow)

    def _disarm(self) -> None:
        self._reading = ""
        self._front.ended(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def set_aside(self) -> None:
        """Reads no more of the request; its deadline ends it.

        Given up at once, its client would be back at once, and a handshake takes as long as hundreds of pieces.
        """
        self._front.ended(self)
        self._refusals["begun"] += 1
        # Of what still comes no more than this is taken from the kernel; a TLS record, of which it is made, has 16 KiB.
        self.transport.set_read_buffer_limits(high=_SET_ASIDE_BYTES)  # type: ignore[attr-defined]  # each TLS one has it
        self.transport.pause_reading()

    def too_slow(self) -> None:
        """Gives the request up."""
        self._refuse(408, b"Request Timeout")

    def _refuse(self, status: int, phrase: bytes) -> None:
        self._disarm()
        if not self.transport.is_closing():
            self._refusals[str(status)] += 1
            self.transport.write(_ANSWER % (status, phrase))
            self.transport.close()


async def _until_readable(connection: socket.socket, *, timeout_s: float) -> None:
    """Waits for a client's first byte, or its end. Raises `TimeoutError`."""
    loop, spoke = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, spoke.set)
    try:
        async with asyncio.timeout(timeout_s):
            await spoke.wait()
    except TimeoutError:
        raise TimeoutError(f"nothing was said within {timeout_s:.1f} s") from None
    finally:
        loop.remove_reader(connection)


class Turns:
    """Lets so many begin what takes a while, in one turn of the loop; others follow in the order of their coming."""

    def __init__(self, a_turn: int) -> None:
        self._a_turn = a_turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def mine(self) -> None:
        """Waits for one's turn."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._next)
        self._waiting.append(loop.create_future())
        await self._waiting[-1]

    def _next(self) -> None:
        for _ in range(min(self._a_turn, len(self._waiting))):
            turn = self._waiting.popleft()
            if not turn.done():  # whose caller was cancelled
                turn.set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._next)


def peer_address(sock_name: Any) -> str:
    """The IP address in a peer name, without the IPv4-mapped prefix."""
    return str(sock_name[0]).removeprefix("::ffff:") if isinstance(sock_name, tuple) else ""


class TlsListener:
    """Accepts TLS connections with a deadline for the handshake, and caps on open ones, in all and per source.

    At a cap the connection that rested the longest between two requests makes room, of the same source where it is
    that one's cap; only where there is none, the new one is closed. One that rests for less than `MIN_REST_S` stays:
    it belongs to an SE between nonce and enroll.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        front: FrontEnd,
        *,
        descriptors: Descriptors,
        handshake_timeout_s: float,
        max_connections: int,
        max_per_source: int,
        on_handshake: Callable[[str, str], None],
    ) -> None:
        """`on_handshake(source, error)` is told of every handshake; `error` is "" where it worked."""
        self._sock = sock
        self._context = context
        self._front = front
        self._descriptors = descriptors
        self._handshake_timeout_s = handshake_timeout_s
        self._max = max_connections
        self._max_per_source = max_per_source
        self._on_handshake = on_handshake
        self._turns = Turns(HANDSHAKES_A_TURN)
        self._open: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._resting: dict[GuardedProtocol, float] = {}
        """Connections between two requests and since when, by the loop's clock; longest first."""
        self._resting_in: dict[str, dict[GuardedProtocol, None]] = {}
        """The same by network."""
        self.refused = 0
        """Connections closed at once because of a cap."""
        self.shed = 0
        """Connections between two requests that were closed because of a cap."""

    async def run(self) -> None:
        """Accepts until cancelled."""
        acceptor = Acceptor(self._sock, self._take, descriptors=self._descriptors, what="enrollment")
        try:
            await asyncio.Event().wait()
        finally:
            acceptor.stop()
            self._front.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _take(self, connection: socket.socket, name: Any) -> bool:
        source = peer_address(name)
        network = network_of(source)
        if not self._has_room(network):
            self.refused += 1
            self._front.refusals["connection"] += 1
            connection.close()
            return False
        # Counted here: a task that was made has not begun yet when the next connection is accepted.
        self._open[network] += 1
        task = asyncio.create_task(self._serve(connection, source, network))
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._served, connection, network))
        return True

    def _has_room(self, network: str) -> bool:
        """Whether one more may come from `network`, where need be in the place of one that rests."""
        if self._open[network] >= self._max_per_source:
            return self._shed(self._resting_in.get(network, ()))
        return len(self._tasks) < self._max or self._shed(self._resting)

    def _shed(self, resting: Iterable[GuardedProtocol]) -> bool:
        """Closes the first of `resting` where it rests for long enough."""
        longest = next(iter(resting), None)
        if longest is None or asyncio.get_running_loop().time() - self._resting[longest] < MIN_REST_S:
            return False
        self.shed += 1
        self._front.refusals["shed"] += 1
        longest.transport.abort()  # a TLS farewell would hold the place for up to two seconds
        longest.rest(begins=False)
        return True

    def _rests(self, protocol: GuardedProtocol, network: str, begins: bool) -> None:
        if begins:
            self._resting[protocol] = asyncio.get_running_loop().time()
            self._resting_in.setdefault(network, {})[protocol] = None
        elif self._resting.pop(protocol, None) is not None:
            del self._resting_in[network][protocol]
            if not self._resting_in[network]:
                del self._resting_in[network]

    async def _serve(self, connection: socket.socket, source: str, network: str) -> None:
        closed = asyncio.Event()
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._handshake_timeout_s
        protocol: GuardedProtocol | None = None
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Nothing is made for who says nothing.
            # A crowd that came at once is given up one by one, not at once.
            patience_s = self._handshake_timeout_s * random.uniform(PATIENT, 1.0)  # noqa: S311 - no secret
            await _until_readable(connection, timeout_s=patience_s)
            await self._turns.mine()
            protocol = self._front.protocol(source=source)
            protocol.closed = closed.set
            protocol.rests = functools.partial(self._rests, protocol, network)
            await loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=max(MIN_HANDSHAKE_S, ends_at - loop.time()),
                ssl_shutdown_timeout=2.0,
            )
        except (OSError, ssl.SSLError, ConnectionError, TimeoutError) as error:
            self._front.refusals["handshake"] += 1
            if protocol is not None:
                protocol.connection_lost(error)  # without a handshake nobody else says so; see there
            self._on_handshake(source, str(error) or type(error).__name__)
            return
        self._on_handshake(source, "")
        await closed.wait()

    def _served(self, connection: socket.socket, network: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._open[network] -= 1
        if not self._open[network]:
            del self._open[network]
        with contextlib.suppress(OSError):
            connection.close()
