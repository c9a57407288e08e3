"""The reverse path: one listening socket for all SEs, and the check that an SE's sshd is behind it.

`127.1.x.y:5097` on the node reaches `localhost:22` on SE number n. The socket is bound to the loopback device and
takes every loopback address; which SE is meant follows from the address that was dialled. A connection is closed at
once unless that SE is up and the local user who dialled is allowed. Bytes go over a `forwarded-tcpip` channel of
the SE's link.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, cast

import asyncssh

from appliance.controller.fleet import Fleet
from appliance.controller.link import Link
from appliance.controller.tunnel import MIN_PACKET_BYTES
from appliance.protocol.address import REVERSE_PORT, se_address, se_number
from appliance.runtime.peer import tcp_peer_uid

_log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
HIGH_WATER_BYTES = 1024 * 1024
"""Unsent bytes of a link above which its reverse connections stop reading (FACTS, trap 26)."""
DRAIN_LOOK_S = 0.02
CHECKS_AT_ONCE = 8
"""Key exchanges with SEs' sshds under way at once, so that a storm of links isn't slowed by its checks."""
CHECK_TIMEOUT_S = 15.0
CHECK_AGAIN_S = (2.0, 5.0, 15.0, 30.0)
"""Pauses after failed checks; the last one repeats."""

SSHD_KEX = ("mlkem768x25519-sha256", "curve25519-sha256")
"""Key exchanges for the check: those of the OpenSSH versions that Debian 12 and later ship."""


class _TcpEnd(asyncio.Protocol):
    """The local side of one reverse connection."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.channel: asyncssh.SSHTCPChannel[bytes] | None = None
        self._early = bytearray()
        """What the local side said before the channel was open: uvloop reads once even where reading was paused."""
        self._early_eof = False
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.pause_reading()

    def attach(self, channel: asyncssh.SSHTCPChannel[bytes]) -> None:
        """The channel is open: bytes may flow."""
        self.channel = channel
        if self._early:
            channel.write(bytes(self._early))
            self._early.clear()
        if self._early_eof:
            channel.write_eof()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self.channel is None:
            self._early += data
            return
        if self.channel.is_closing():
            return
        self.channel.write(data)
        self._hold_back()

    def _hold_back(self) -> None:
        """Stops reading while the link has too much to send: asyncssh has no back-pressure from its socket."""
        if self.transport is None or self.transport.is_closing() or self.channel is None:
            return
        if unsent(self.channel) > HIGH_WATER_BYTES:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(DRAIN_LOOK_S, self._hold_back)
        elif not self.transport.is_reading():
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        if self.channel is None:
            self._early_eof = True
        elif not self.channel.is_closing():
            self.channel.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self.channel is not None:
            self.channel.close()
        self.closed.set()

    def pause_writing(self) -> None:
        if self.channel is not None:
            self.channel.pause_reading()

    def resume_writing(self) -> None:
        if self.channel is not None and not self.channel.is_closing():
            self.channel.resume_reading()


class _SshEnd(asyncssh.SSHTCPSession[bytes]):
    """The link's side of one reverse connection."""

    def __init__(self, end: _TcpEnd, link: Link, on_data: Callable[[Link], None]) -> None:
        self._end = end
        self._link = link
        self._on_data = on_data

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:  # noqa: ARG002
        self._on_data(self._link)
        if self._end.transport is not None:
            self._end.transport.write(data)

    def eof_received(self) -> bool:
        if self._end.transport is not None and self._end.transport.can_write_eof():
            with contextlib.suppress(OSError, RuntimeError):
                self._end.transport.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self._end.transport is not None:
            self._end.transport.close()


def unsent(channel: asyncssh.SSHTCPChannel[bytes]) -> int:
    """Bytes that wait on a channel and in its link's socket."""
    transport = channel.get_connection()._transport  # noqa: SLF001 - the only way to the socket's buffer
    waiting = transport.get_write_buffer_size() if transport is not None else 0
    return int(channel.get_write_buffer_size() + waiting)


class _Through:
    """Lets asyncssh's client connect through a link: it asks for `create_connection` and gets a forwarded channel."""

    def __init__(self, conn: asyncssh.SSHServerConnection, number: int) -> None:
        self._conn = conn
        self._number = number
        self.logger = conn.logger

    async def create_connection(self, session_factory: Any, _host: str, _port: int, **_more: Any) -> Any:
        """Opens a `forwarded-tcpip` channel; the host and port asked for don't matter."""
        return await self._conn.create_connection(
            session_factory, se_address(self._number), REVERSE_PORT, "127.0.0.1", 0
        )

    def close(self) -> None:
        """The link stays; asyncssh closes tunnels it was given."""

    async def wait_closed(self) -> None:
        """Nothing to wait for."""


class ReversePath:
    """Serves the reverse listener and checks each link's reverse path once. One loop only."""

    def __init__(self, fleet: Fleet, *, allowed_uids: Callable[[], Collection[int]]) -> None:
        self._fleet = fleet
        self._allowed_uids = allowed_uids
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Semaphore(CHECKS_AT_ONCE)
        self.refusals: Counter[str] = Counter()
        self.connections = 0

    async def run(self, sock: socket.socket) -> None:
        """Accepts until cancelled."""
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        try:
            while True:
                try:
                    connection, peer = await loop.sock_accept(sock)
                except OSError as error:
                    _log.error("can't accept on the reverse port: %s", error)
                    await asyncio.sleep(0.2)
                    continue
                self._start(self._serve(connection, peer))
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a reverse connection failed unexpectedly", exc_info=error, extra={"stage": "tunnel"})

    def _target(self, connection: socket.socket, peer: tuple[str, int]) -> Link | None:
        """The link that a connection leads to, or None where it leads nowhere or may not."""
        dialled = connection.getsockname()
        number = se_number(dialled[0])
        record = self._fleet.registry.se_by_number(number) if number else None
        link = self._fleet.link(record.se_id) if record else None
        if record is None or link is None or not link.confirmed or not link.reverse_granted:
            self.refusals["no-link"] += 1
            return None
        uid = tcp_peer_uid(dialled[:2], peer[:2])
        if uid is None or uid not in self._allowed_uids():
            self.refusals["uid"] += 1
            _log.warning("uid %s may not use the reverse path to %s", uid, record.name, extra={"stage": "tunnel"})
            return None
        return link

    async def _serve(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        end = _TcpEnd()
        try:
            link = self._target(connection, peer)
            if link is None:
                connection.close()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: end, connection)
        except OSError as error:
            _log.info("reverse connection ended early: %s", error)
            connection.close()
            return
        self.connections += 1
        try:
            channel = await self._open(link, end, peer)
            end.attach(channel)
            await end.closed.wait()
        except (asyncssh.Error, OSError, TimeoutError) as error:
            _log.warning("no reverse channel to %s: %s", link.se_id, error, extra={"stage": "tunnel"})
            self._failed(link, str(error) or "no answer in time")
            self._start(self._check(link))
        finally:
            self.connections -= 1
            if end.transport is not None:
                end.transport.close()

    async def _open(self, link: Link, end: _TcpEnd, peer: tuple[str, int]) -> asyncssh.SSHTCPChannel[bytes]:
        record = self._fleet.registry.se(link.se_id)
        number = record.number if record else 0
        channel, _ = await asyncio.wait_for(
            link.conn.create_connection(
                lambda: _SshEnd(end, link, self._fleet.seen), se_address(number), REVERSE_PORT, peer[0], peer[1]
            ),
            OPEN_TIMEOUT_S,
        )
        if channel._send_pktsize < MIN_PACKET_BYTES:  # noqa: SLF001 - see tunnel.Peer._open
            channel.abort()
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "the SE takes only tiny packets")
        return channel

    # The check.

    def check(self, link: Link) -> None:
        """Queues the check of a link that just came up."""
        self._start(self._check(link))

    def _failed(self, link: Link, error: str) -> None:
        link.reverse_ok, link.reverse_error = False, error
        self._fleet.look(link.se_id)

    async def _check(self, link: Link) -> None:
        pauses = iter(CHECK_AGAIN_S)
        pause_s = CHECK_AGAIN_S[0]
        while self._fleet.link(link.se_id) is link:
            async with self._turn:
                error = await self._exchange(link)
            if self._fleet.link(link.se_id) is not link:
                return
            if not error:
                link.reverse_ok, link.reverse_error = True, ""
                self._fleet.look(link.se_id)
                return
            self._failed(link, error)
            pause_s = next(pauses, pause_s)
            await asyncio.sleep(pause_s)

    async def _exchange(self, link: Link) -> str:
        """Does a key exchange with the SE's sshd over the link; returns "" or what is wrong."""
        record = self._fleet.registry.se(link.se_id)
        if record is None:
            return "the SE is not known"
        if not link.reverse_granted:
            return f"the SE did not ask for its address {se_address(record.number)}:{REVERSE_PORT}"
        try:
            key = await asyncio.wait_for(
                asyncssh.get_server_host_key(
                    "se",
                    REVERSE_PORT,
                    tunnel=cast("Any", _Through(link.conn, record.number)),
                    config=None,
                    kex_algs=list(SSHD_KEX),
                    server_host_key_algs=["ssh-ed25519"],
                ),
                CHECK_TIMEOUT_S,
            )
        except TimeoutError:
            return f"no key exchange with its sshd within {CHECK_TIMEOUT_S:.0f} s"
        except (asyncssh.Error, OSError) as error:
            return f"no key exchange with its sshd: {error}"
        shown = b" ".join(key.export_public_key("openssh").split()[:2]).decode() if key else ""
        if shown not in record.host_keys:
            return "its sshd shows a host key that is not the one enrolled"
        return ""
