"""asyncssh's connections without what costs and gives nothing here.

asyncssh puts an empty SSH_MSG_IGNORE before each packet it encrypts. That defends CBC ciphers, whose initial vector is
known beforehand (RFC 4253 section 9.3.1); the gateway offers AEAD ciphers alone, and would pay with a second
encryption, a second packet and 36 bytes for each answer. It also describes each step, channel and packet for a log that
is off, with a logger for each connection and channel; makes a server's options anew for each log-in, in another thread,
for a configuration file that could name users: the gateway has none; and makes a pair of ML-KEM keys for each key
exchange, also on the side that uses none.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import socket
from collections.abc import Callable
from typing import Any, Self, cast

import asyncssh
from asyncssh.connection import SSHConnection
from asyncssh.crypto import Curve25519DH
from asyncssh.kex import register_kex_alg
from asyncssh.kex_dh import _KexHybridECDH
from asyncssh.logging import SSHLogger

from appliance.controller.acceptor import Acceptor
from appliance.controller.descriptors import Descriptors
from appliance.controller.listener import peer_address
from appliance.controller.pace import PacedConnection, Strangers
from appliance.controller.rate import network_of
from appliance.controller.slots import Line, Slots
from appliance.pki.mlkem import MlKem768
from appliance.protocol.tunnel import KEX, slot_line

# Takes the place of asyncssh's own entry, for this process.
register_kex_alg(
    KEX[0].encode(), _KexHybridECDH, hashlib.sha256, (MlKem768, MlKem768.NAME, Curve25519DH), default=False
)

MSG_IGNORE = 2
BACKLOG = 4096
MAX_SAID_BYTES = 8192
"""What a client may say before its turn."""


class _Quiet(SSHLogger):
    """One logger for all connections and channels, heard from warnings on, as libraries are (`runtime.log`)."""

    def get_child(self, child: str = "", context: str = "") -> Self:  # noqa: ARG002 - asyncssh's own
        return self

    def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        if level >= logging.WARNING:
            super().log(level, msg, *args, **kwargs)

    def info(self, msg: object, *args: Any, **kwargs: Any) -> None:
        """Nobody reads it."""

    def debug1(self, msg: str, *args: Any, **kwargs: Any) -> None:
        """Nobody reads it."""

    def debug2(self, msg: str, *args: Any, **kwargs: Any) -> None:
        """Nobody reads it."""


_QUIET = _Quiet()


def _nothing_more() -> bool:
    """Reads nothing of what comes after a connection's end."""
    return False


class Plain(SSHConnection):
    """What both ends leave out."""

    @property
    def logger(self) -> SSHLogger:
        return _QUIET

    def send_packet(self, pkttype: int, *args: bytes, handler: Any = None) -> None:  # noqa: ARG002 - only for its log
        if pkttype != MSG_IGNORE:
            super().send_packet(pkttype, *args)

    def connection_lost(self, exc: Exception | None = None) -> None:
        super().connection_lost(exc)
        # A method of this very object: the one cycle in it, which the collector would have to find.
        self._recv_handler = _nothing_more

    def log_sent_packet(self, *_packet: Any, **_note: Any) -> None:
        """Nobody reads it."""

    def log_received_packet(self, *_packet: Any, **_note: Any) -> None:
        """Nobody reads it."""


class GatewayConnection(Plain, PacedConnection, asyncssh.SSHServerConnection):
    """One incoming connection."""

    async def reload_config(self) -> None:
        """There is no configuration file; the options of the listener hold for all."""


class _Waiting(asyncio.Protocol):
    """A connection that nobody spoke to yet."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self.network = ""
        self.transport: asyncio.Transport
        self.said = b""
        """A client may say its version at once, and some a first message behind it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.network = network_of(peer_address(transport.get_extra_info("peername")))
        self._door.came(self)

    def data_received(self, data: bytes) -> None:
        self.said += data
        if len(self.said) > MAX_SAID_BYTES:
            self.transport.abort()


class Door:
    """Lets connections in as `slots` says. One loop only."""

    def __init__(
        self, slots: Slots, options: asyncssh.SSHServerConnectionOptions, *, most: int, most_per_source: int,
        refused: Callable[[], None],
    ) -> None:  # fmt: skip
        """`most` and `most_per_source` may wait in line; `refused` is told each further one, which is closed."""
        self._loop = asyncio.get_running_loop()
        self._slots = slots
        self._options = options
        self._most = most
        self._most_per_source = most_per_source
        self._refused = refused
        self._line: Line[_Waiting] = Line()
        self._strangers = Strangers(self._loop)

    def glance(self, network: str) -> bytes | None:
        """What to say to a connection from `network` before it is closed at once; None where it may come in."""
        line, slots = self._line, self._slots
        if not line and slots.may_enter():
            return None
        if len(line) >= self._most or line.of(network) >= self._most_per_source:
            self._refused()
            return b""
        return None if len(line) < slots.places else slot_line(slots.slot(self._loop.time()))

    def came(self, waiting: _Waiting) -> None:
        """A connection was accepted; others may have come since the glance at it."""
        line, slots = self._line, self._slots
        if not line and slots.may_enter():
            self._begin(waiting)
        elif (last_word := self.glance(waiting.network)) is None:
            line.append(waiting.network, waiting, self._loop.time())
        else:
            waiting.transport.write(last_word)
            waiting.transport.close()

    def advance(self) -> None:
        """Lets in who may come now; to be called whenever a log-in ended, and each tick."""
        while self._line and self._slots.may_enter():
            waiting = self._line.pop()
            if not waiting.transport.is_closing():
                self._begin(waiting)

    def tick(self, late_s: float) -> None:
        """See `Slots.tick`."""
        self._slots.tick(late_s, len(self._line))
        for waiting in self._line.pop_late(self._loop.time()):
            self._turn_away(waiting)
        self.advance()

    def close(self) -> None:
        """Closes all that wait."""
        while self._line:
            self._line.pop().transport.abort()

    def _begin(self, waiting: _Waiting) -> None:
        self._slots.enter()
        transport, connection = waiting.transport, GatewayConnection(self._loop, self._options)
        connection.strangers = self._strangers
        transport.set_protocol(connection)
        connection.connection_made(transport)
        if waiting.said:
            connection.data_received(waiting.said)

    def _turn_away(self, waiting: _Waiting) -> None:
        # uvloop raises where a closed transport is written to, and whoever ticks would end by it.
        if not waiting.transport.is_closing():
            waiting.transport.write(slot_line(self._slots.slot(self._loop.time())))
            waiting.transport.close()


def listen(
    sock: socket.socket, make_door: Callable[[asyncssh.SSHServerConnectionOptions], Door], *,
    descriptors: Descriptors, has_room: Callable[[str], bool] = lambda _source: True, **terms: Any,
) -> tuple[asyncssh.SSHAcceptor, Door]:  # fmt: skip
    """Accepts connections on a bound socket behind a door; `terms` are of `asyncssh.SSHServerConnectionOptions`.

    Who comes from a source that `has_room` doesn't want is closed, and whom the door would turn away is told so, before
    anything is made for it.
    """
    loop = asyncio.get_running_loop()
    options = asyncssh.SSHServerConnectionOptions(config=None, **terms)
    door = make_door(options)
    beginning: set[asyncio.Task[Any]] = set()

    def take(connection: socket.socket, name: Any) -> bool:
        source = peer_address(name)
        last_word = door.glance(network_of(source)) if has_room(source) else b""
        if last_word is not None:
            with contextlib.suppress(OSError):  # it hung up, or can't take forty bytes: it comes back by itself
                connection.send(last_word)
            connection.close()
            return False
        task = loop.create_task(loop.connect_accepted_socket(lambda: _Waiting(door), connection))
        beginning.add(task)
        task.add_done_callback(functools.partial(begun, connection))
        return True

    def begun(connection: socket.socket, task: asyncio.Task[Any]) -> None:
        beginning.discard(task)
        if task.cancelled() or task.exception() is not None:
            connection.close()

    sock.listen(BACKLOG)
    acceptor = Acceptor(sock, take, descriptors=descriptors, what="SSH")
    return asyncssh.SSHAcceptor(acceptor, options), door  # type: ignore[arg-type]  # it has what is asked of one
