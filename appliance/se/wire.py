"""TCP connections of the SE: dialled so that a stop ends the wait, and watched so that silence can be told from life.

`Wire` is the socket that paramiko gets. It knows when the last byte came (any byte counts as life), limits what a peer
may send before it has proved itself, and keeps two promises paramiko doesn't: `close` only shuts the connection down,
which wakes every thread that waits on it and never gives its file descriptor to somebody else while one still does;
and idle reads wait for seconds, where paramiko would look ten times a second.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from appliance.errors import TunnelError, UnreachableError
from appliance.protocol.address import parse_endpoint
from appliance.protocol.tunnel import read_slot
from appliance.protocol.window import MOST_QUEUE_BYTES, Rate
from appliance.runtime.clock import Clock
from appliance.runtime.stop import StopToken

UNPROVEN_LIMIT_BYTES = 256 * 1024
"""Most that a peer may send before log-in: a key exchange takes some kilobytes, a false packet length asks for 4 GB."""

_LOOK_AGAIN_S = 2.0
"""How long a read waits before paramiko may look whether it wants new keys."""


def shut(sock: socket.socket) -> None:
    """Ends a connection at once; whoever waits on the socket wakes up. The descriptor stays its owner's to close."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def connect(endpoint: str, *, default_port: int, timeout_s: float, stop: StopToken) -> socket.socket:
    """Dials `host:port`, address by address, `timeout_s` each; a stop ends it at once.

    Raises:
        UnreachableError: nobody answers, or stopped.
        UsageError: no address.
    """
    host, port = parse_endpoint(endpoint, default_port=default_port)
    problem = "no address"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # a name with an empty or too long part can't even be asked for
        why = error.strerror if isinstance(error, OSError) else error
        raise UnreachableError(f"{host!r} can't be resolved: {why}", hint="check the name and DNS") from None
    for family, kind, protocol, _, address in found:
        if stop.stopped:
            problem = "stopped"
            break
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:  # no descriptor left, or no such kind of address on this machine
            problem = error.strerror or str(error)
            continue
        withdraw = stop.on_stop(lambda sock=sock: shut(sock))  # type: ignore[misc]  # bound to this turn's socket
        try:
            sock.settimeout(timeout_s)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            problem = "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
            sock.close()
        else:
            return sock
        finally:
            withdraw()
    raise UnreachableError(
        f"no connection to {endpoint}: {problem}", hint="check the controller's address, the route and the firewall"
    )


class Wire:
    """A connected socket in the shape that paramiko wants, see the module's docstring.

    `close` may be called by any thread, any number of times, and never waits; `release` by the owner, at the end.
    """

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self._sock = sock
        self._clock = clock
        self._budget_bytes: int | None = UNPROVEN_LIMIT_BYTES
        self.received_at = clock.monotonic()
        """When the last byte came, monotonic seconds."""
        self.received_bytes = 0
        self.sent_bytes = 0
        self.slot_s: float | None = None
        """When the gateway asked to come back, seconds from then; None where it didn't."""
        self.closed = False
        self.on_close: Callable[[], None] = lambda: None
        """Called by each `close`; paramiko closes its socket when the peer did, or broke the protocol."""
        sock.settimeout(_LOOK_AGAIN_S)
        self._rate = Rate(clock.monotonic())
        self._queue_bytes = 0
        self._limit_queue(MOST_QUEUE_BYTES)

    @property
    def _closed(self) -> bool:
        # The name under which paramiko looks.
        return self.closed

    def trust(self) -> None:
        """Lifts the limit: the peer proved its host key and took ours."""
        self._budget_bytes = None

    def recv(self, count: int) -> bytes:
        """Returns up to `count` bytes, b"" at the end. Raises `TimeoutError` when it is time to look again."""
        received = self._sock.recv(count)
        if received:
            if not self.received_bytes and (slot_s := read_slot(received)) is not None:
                self.slot_s = slot_s
                self.close()
                raise TunnelError(f"the controller is busy; our turn is in {slot_s:.1f} s")
            self.received_at = self._clock.monotonic()
            self.received_bytes += len(received)
            if self._budget_bytes is not None and self.received_bytes > self._budget_bytes:
                self.close()
                raise TunnelError(f"the peer sent more than {self._budget_bytes} bytes before log-in")
        return received

    def send(self, content: bytes) -> int:
        """Sends what fits. Raises `TimeoutError` when it is time to look again."""
        sent = self._sock.send(content)
        self.sent_bytes += sent
        if self._rate.add(sent, self._clock.monotonic()):
            self._limit_queue(self._rate.queue_bytes)
        return sent

    def _limit_queue(self, queue_bytes: int) -> None:
        """Limits what waits unsent in the kernel, where it is much more or less than before."""
        if hasattr(socket, "TCP_NOTSENT_LOWAT") and not 0.75 <= queue_bytes / (self._queue_bytes or 1) <= 1.25:
            self._queue_bytes = queue_bytes
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, queue_bytes)

    def settimeout(self, timeout_s: float | None) -> None:
        """Ignored: paramiko would wake up ten times a second."""

    def getpeername(self) -> object:
        """The peer's address."""
        return self._sock.getpeername()

    def close(self) -> None:
        """Ends the connection; see the module's docstring."""
        self.closed = True
        shut(self._sock)
        self.on_close()

    def release(self) -> None:
        """Gives the descriptor back. Nobody may use the wire any more."""
        self.closed = True
        self._sock.close()
