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
import hashlib
import logging
import socket
from typing import Any, Self, cast

import asyncssh
from asyncssh.connection import SSHConnection
from asyncssh.crypto import Curve25519DH
from asyncssh.kex import register_kex_alg
from asyncssh.kex_dh import _KexHybridECDH
from asyncssh.logging import SSHLogger

from appliance.controller.pace import PacedConnection
from appliance.controller.slots import Slots
from appliance.pki.mlkem import MlKem768
from appliance.protocol.tunnel import KEX, slot_line

# Takes the place of asyncssh's own entry, for this process.
register_kex_alg(
    KEX[0].encode(), _KexHybridECDH, hashlib.sha256, (MlKem768, MlKem768.NAME, Curve25519DH), default=False
)

MSG_IGNORE = 2
BACKLOG = 4096


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


class Plain(SSHConnection):
    """What both ends leave out."""

    @property
    def logger(self) -> SSHLogger:
        return _QUIET

    def send_packet(self, pkttype: int, *args: bytes, handler: Any = None) -> None:  # noqa: ARG002 - only for its log
        if pkttype != MSG_IGNORE:
            super().send_packet(pkttype, *args)

    def log_sent_packet(self, *_packet: Any, **_note: Any) -> None:
        """Nobody reads it."""

    def log_received_packet(self, *_packet: Any, **_note: Any) -> None:
        """Nobody reads it."""


class GatewayConnection(Plain, PacedConnection, asyncssh.SSHServerConnection):
    """One incoming connection."""

    async def reload_config(self) -> None:
        """There is no configuration file; the options of the listener hold for all."""


class _TurnedAway(asyncio.Protocol):
    """A connection that is told when to come back, and closed."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(slot_line(self._wait_s))
        transport.close()


async def listen(sock: socket.socket, slots: Slots, **terms: Any) -> asyncssh.SSHAcceptor:
    """Accepts connections on a bound socket, as `slots` says; `terms` are of `asyncssh.SSHServerConnectionOptions`."""
    loop = asyncio.get_running_loop()
    options = asyncssh.SSHServerConnectionOptions(config=None, **terms)

    def accept() -> asyncio.Protocol:
        wait_s = slots.enter(loop.time())
        return _TurnedAway(wait_s) if wait_s else GatewayConnection(loop, options)

    server = await loop.create_server(accept, sock=sock, backlog=BACKLOG)
    return asyncssh.SSHAcceptor(server, options)
