"""asyncssh's connections without what costs and gives nothing here.

asyncssh puts an empty SSH_MSG_IGNORE before each packet it encrypts. That defends CBC ciphers, whose initial vector is
known beforehand (RFC 4253 section 9.3.1); the gateway offers AEAD ciphers alone, and would pay with a second
encryption, a second packet and 36 bytes for each answer. It also describes each packet for a log that is off, and
makes a server's options anew for each log-in, in another thread, for a configuration file that could name users: the
gateway has none.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import asyncssh
from asyncssh.connection import SSHConnection

from appliance.controller.slots import Slots
from appliance.protocol.tunnel import slot_line

MSG_IGNORE = 2
BACKLOG = 4096


class Plain(SSHConnection):
    """What both ends leave out."""

    def send_packet(self, pkttype: int, *args: bytes, handler: Any = None) -> None:  # noqa: ARG002 - only for its log
        if pkttype != MSG_IGNORE:
            super().send_packet(pkttype, *args)

    def log_sent_packet(self, *_packet: Any, **_note: Any) -> None:
        """Nobody reads it."""

    def log_received_packet(self, *_packet: Any, **_note: Any) -> None:
        """Nobody reads it."""


class GatewayConnection(Plain, asyncssh.SSHServerConnection):
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
