"""What asyncssh has not: back-pressure from a connection's socket to those who fill its channels, and an end to a turn.

asyncssh takes all it is given and keeps it for a peer that doesn't read. Here whoever has bulk for a link (a `Feeder`)
asks `may_feed` first; it stops while the socket takes nothing more, while its channel waits for the peer's window, and
while keys are exchanged, and is told when it may go on. So heartbeats' answers find at most what
`protocol.window.Rate.queue_bytes` says before them. Those who waited longest go on first.

What else waits for a peer that doesn't read is weighed as it grows: a fast machine answers requests with a hundred
megabytes in half a second.

And what a peer sent is read only for so long in one turn of the loop: a quarter of a megabyte of requests that are
refused one by one would keep all other links waiting. `rest` leaves a peer unread for a while.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, cast

import asyncssh
from asyncssh.connection import SSHConnection

from appliance.protocol.window import Rate

TURN_S = 0.002
"""How long packets of one peer are read in one turn of the loop: an honest one's are read within half of it."""
STRANGERS_TURN_S = 0.01
"""The same, of all together that haven't logged in: a thousand of them would take two seconds of each turn."""
DEFERRED_BYTES = 512
"""What a packet that waits for new keys weighs beside its content. All of them leave in one turn: sixty thousand empty
answers took 0.15 s of it."""
LOOK_AGAIN_S = 0.02
"""How often a feeder looks whether new keys are there: asyncssh tells nobody."""


class Feeder(Protocol):
    """Who has bulk for a link."""

    def look(self) -> None:
        """Stops or goes on, as `may_feed` says."""
        ...


class Pace:
    """Of one link, from its first bulk on."""

    def __init__(self, transport: asyncio.Transport, now: float) -> None:
        self.feeders: dict[Feeder, None] = {}
        """Who fed last stands last."""
        self.rate = Rate(now)
        self._transport = transport
        self._queue_bytes = 0

    def fed(self, feeder: Feeder, count: int, now: float) -> None:
        """`count` bytes were given to the link."""
        self.feeders.pop(feeder, None)
        self.feeders[feeder] = None
        if self.rate.add(count, now):
            self._limit_queue(self.rate.queue_bytes)

    def _limit_queue(self, queue_bytes: int) -> None:
        """Half of what may wait does so in the kernel, half here."""
        if 0.75 <= queue_bytes / (self._queue_bytes or 1) <= 1.25:
            return
        self._queue_bytes = queue_bytes
        sock = self._transport.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, queue_bytes // 2)
        self._transport.set_write_buffer_limits(high=queue_bytes // 2, low=queue_bytes // 8)


class Strangers:
    """The time that all who haven't logged in share in one turn of the loop. Whoever finds none waits in line."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._has_turn = False
        self._ends_at = 0.0

    def have_time(self) -> bool:
        """Whether one more may be read in this turn."""
        if not self._has_turn:
            self._has_turn = True
            self._ends_at = time.monotonic() + STRANGERS_TURN_S
            self._loop.call_soon(self._next)
        return time.monotonic() < self._ends_at

    def append(self, read_on: Callable[[], None]) -> None:
        """Puts one at the end of the line."""
        self._waiting.append(read_on)
        if not self._has_turn:
            self._has_turn = True
            self._loop.call_soon(self._next)

    def _next(self) -> None:
        self._ends_at = time.monotonic() + STRANGERS_TURN_S
        try:
            for _ in range(len(self._waiting)):
                if time.monotonic() > self._ends_at:
                    break
                self._waiting.popleft()()
        finally:
            self._has_turn = bool(self._waiting)
            if self._has_turn:
                self._loop.call_soon(self._next)


class PacedConnection(SSHConnection):
    """A connection that tells its feeders when its socket is full, and when it isn't any more."""

    is_full = False
    pace: Pace | None = None
    rests = False
    """Whether nothing is read of it for now."""
    deferred_bytes = 0
    """What waits for the end of a key exchange."""
    _is_paused = False
    _rests_until = 0.0
    _most_unsent = 0
    _tell_unread: Callable[[], None] | None = None
    strangers: Strangers | None = None
    """Among whom it is read until it has logged in."""

    @property
    def unsent_bytes(self) -> int:
        """What waits in the connection: in its socket's buffer, or for new keys. asyncssh limits neither."""
        waiting = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return self.deferred_bytes + waiting

    def limit_unsent(self, most: int, tell: Callable[[], None]) -> None:
        """Calls `tell` once, in a turn of its own, as soon as more than `most` bytes wait unsent."""
        self._most_unsent, self._tell_unread = most, tell

    def send_packet(self, pkttype: int, *args: bytes, handler: Any = None) -> None:
        deferred = len(self._deferred_packets)
        super().send_packet(pkttype, *args, handler=handler)
        if len(self._deferred_packets) > deferred:
            self.deferred_bytes += DEFERRED_BYTES + sum(map(len, args))
        elif not self.is_full:
            return
        if self._tell_unread is not None and self.unsent_bytes > self._most_unsent:
            self._loop.call_soon(self._tell_unread)
            self._tell_unread = None

    def _send_deferred_packets(self) -> None:
        # Those that have to wait once more are counted once more.
        self.deferred_bytes = 0
        super()._send_deferred_packets()

    def connection_lost(self, exc: Exception | None = None) -> None:
        self._tell_unread = None
        super().connection_lost(exc)

    def _recv_data(self) -> None:
        """Reads what came, as asyncssh does, for `TURN_S` at most."""
        if self.rests:
            return
        if self.strangers is not None and not self._auth_complete and not self.strangers.have_time():
            self.rest(0.0)
            return
        self._reset_keepalive_timer()
        ends_at = time.monotonic() + TURN_S
        try:
            while self._inpbuf and self._recv_handler():
                # asyncssh keeps the requests that come while the one before them waits for a task of its own: a peer
                # whose requests each wait for one would fill memory with them.
                if time.monotonic() > ends_at or self._global_request_queue:
                    self.rest(0.0)
                    break
        except asyncssh.DisconnectError as error:
            self._send_disconnect(error.code, error.reason, error.lang)
            self._force_close(error)
        except Exception:  # noqa: BLE001 - foreign bytes; asyncssh closes the connection and tells its owner
            self.internal_error()

    def rest(self, seconds: float) -> None:
        """Reads nothing of the peer for so long: until the next turn for 0."""
        if self._transport is None:
            return
        # The end of a turn must not cut a longer rest short that is asked for before the next one.
        self._rests_until = max(self._rests_until, self._loop.time() + seconds)
        if self.rests:
            return
        self.rests = True
        if not self._is_paused:
            # Not asked of the transport: it may be a channel of another connection, which doesn't know.
            self._is_paused = True
            self._transport.pause_reading()
        if self.strangers is not None and not self._auth_complete:
            self.strangers.append(self._read_on)
        else:
            self._loop.call_later(seconds, self._read_on)

    def _read_on(self) -> None:
        left_s = self._rests_until - self._loop.time()
        if left_s > 0.001:
            self._loop.call_later(left_s, self._read_on)
            return
        self.rests = False
        if self._transport is not None and not self._transport.is_closing():
            self._recv_data()
        if not self.rests and self._transport is not None and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        """Called by the transport."""
        self.is_full = True
        self._tell()

    def resume_writing(self) -> None:
        """Called by the transport."""
        self.is_full = False
        self._tell()

    def _tell(self) -> None:
        if self.pace is not None:
            for feeder in list(self.pace.feeders):
                feeder.look()

    def fed(self, feeder: Feeder, count: int, now: float) -> None:
        """A feeder gave `count` bytes to one of the channels."""
        if self.pace is None:
            if self._transport is None:
                return
            self.pace = Pace(self._transport, now)
        self.pace.fed(feeder, count, now)

    def leave(self, feeder: Feeder) -> None:
        """A feeder has nothing more."""
        if self.pace is not None:
            self.pace.feeders.pop(feeder, None)


def paced(connection: SSHConnection) -> PacedConnection:
    """A connection of the gateway as what it is."""
    return cast("PacedConnection", connection)


def may_feed(channel: asyncssh.SSHTCPChannel[Any]) -> bool:
    """Whether a channel takes more now, as far as its peer's window and its connection go; keys are asked for apart."""
    return not channel.get_write_buffer_size() and not paced(channel.get_connection()).is_full
