"""The reverse path: one listening socket for all SEs, and the check that an SE's sshd is behind it.

`127.1.x.y:5097` on the node reaches `localhost:22` on SE number n. The socket is bound to the loopback device and
takes every loopback address; which SE is meant follows from the address that was dialled. A connection is closed at
once unless that SE is up and the local user who dialled is allowed. Bytes go over a `forwarded-tcpip` channel of
the SE's link.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import asyncssh

from appliance.controller.fleet import Fleet
from appliance.controller.link import Link
from appliance.controller.splice import SshEnd, TcpEnd, has_tiny_packets
from appliance.errors import TrustError
from appliance.pki.host_key_probe import HostKeyProbe
from appliance.protocol.address import REVERSE_PORT, se_address, se_number
from appliance.protocol.window import FLOOR_BYTES, Pool, Window
from appliance.runtime.peer import tcp_peer_uid

_log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
CHECKS_AT_ONCE = 32
"""Key exchanges with SEs' sshds under way at once. Each waits for its SE several times, and each time for log-ins on a
busy loop: in a storm of 3,000 SEs 650 were UP when it was half over with eight, 1,550 with 32, and the last as soon.
"""
CHECK_TIMEOUT_S = 15.0
CHECK_AGAIN_S = (2.0, 5.0, 15.0, 30.0)
"""Pauses after failed checks; the last one repeats."""


class _ProbeSession(asyncssh.SSHTCPSession[bytes]):
    """Carries a probe over a channel to an SE's sshd."""

    def __init__(self) -> None:
        self._probe = HostKeyProbe()
        self._channel: asyncssh.SSHTCPChannel[bytes] | None = None
        self.host_key: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        self._channel = chan

    def session_started(self) -> None:
        self._say(self._probe.hello)

    def _say(self, said: bytes) -> None:
        if said and self._channel is not None and not self._channel.is_closing():
            self._channel.write(said)

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:  # noqa: ARG002
        if self.host_key.done():
            return
        try:
            self._say(self._probe.feed(data))
        except TrustError as error:
            self.host_key.set_exception(error)
        else:
            if self._probe.host_key is not None:
                self.host_key.set_result(self._probe.host_key)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if not self.host_key.done():
            self.host_key.set_exception(TrustError("the connection was closed"))


Opened = tuple[asyncssh.SSHTCPChannel[bytes], asyncssh.SSHTCPSession[bytes]]


def _unwanted(opening: asyncio.Task[Opened]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].abort()


async def _opened(opening: asyncio.Task[Opened], timeout_s: float) -> asyncssh.SSHTCPChannel[bytes]:
    """Waits until a channel is open. Raises `TimeoutError`, and as `create_connection`.

    Too late is never: asyncssh would keep a channel whose opening was cancelled, and all that its peer sends on it.
    """
    try:
        await asyncio.wait([opening], timeout=timeout_s)
    except asyncio.CancelledError:
        opening.add_done_callback(_unwanted)
        raise
    if not opening.done():
        opening.add_done_callback(_unwanted)
        raise TimeoutError
    return opening.result()[0]


class ReversePath:
    """Serves the reverse listener and checks each link's reverse path: once, and when it seems down. One loop only.

    Args:
        fleet: whose links lead back to their SEs.
        windows: what all channels' windows are taken from.
        allowed_uids: who may use the listener.
        checked: is told of each check: its link, and what is wrong, "" where the SE's own sshd answered.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        windows: Pool,
        allowed_uids: Callable[[], Collection[int]],
        checked: Callable[[Link, str], None],
    ) -> None:
        self._fleet = fleet
        self._windows = windows
        self._allowed_uids = allowed_uids
        self._checked = checked
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Semaphore(CHECKS_AT_ONCE)
        self._checking: set[Link] = set()
        self._unanswered: dict[Link, asyncio.Task[Opened]] = {}
        """The opening of a check's channel that an SE didn't answer yet: it gets no other one to leave lie."""
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
        end = TcpEnd()
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
            session = await self._open(link, end, peer)
            await end.closed.wait()
            if not session.has_spoken:
                # An SSH server speaks first (RFC 4253 section 4.2): who hears nothing may have found none.
                self.check(link)
        except (asyncssh.Error, OSError, TimeoutError) as error:
            _log.warning("no reverse channel to %s: %s", link.se_id, error, extra={"stage": "tunnel"})
            self._failed(link, str(error) or "no answer in time")
            self.check(link)
        finally:
            self.connections -= 1
            if end.transport is not None:
                end.transport.close()

    async def _open(self, link: Link, end: TcpEnd, peer: tuple[str, int]) -> SshEnd:
        record = self._fleet.registry.se(link.se_id)
        number = record.number if record else 0
        window = Window(self._windows, asyncio.get_running_loop().time())
        session = SshEnd(end, link, self._fleet.seen, window=window)
        opening = link.conn.create_connection(
            lambda: session, se_address(number), REVERSE_PORT, peer[0], peer[1], window=FLOOR_BYTES
        )
        channel = await _opened(asyncio.create_task(opening), OPEN_TIMEOUT_S)
        if has_tiny_packets(channel):
            channel.abort()
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "the SE takes only tiny packets")
        return session

    # The check.

    def check(self, link: Link) -> None:
        """Queues the check of a link that just came up, or whose reverse path seems down; one at a time."""
        if link not in self._checking:
            self._checking.add(link)
            self._start(self._check(link))

    def _failed(self, link: Link, error: str) -> None:
        self._checked(link, error)

    async def _check(self, link: Link) -> None:
        try:
            await self._check_until_well(link)
        finally:
            self._checking.discard(link)

    async def _check_until_well(self, link: Link) -> None:
        pauses = iter(CHECK_AGAIN_S)
        pause_s = CHECK_AGAIN_S[0]
        while self._fleet.link(link.se_id) is link:
            async with self._turn:
                error = await self._exchange(link)
            if self._fleet.link(link.se_id) is not link:
                return
            if not error:
                self._checked(link, "")
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
        if link in self._unanswered:
            return "it left an earlier channel to its sshd unanswered"
        channel: asyncssh.SSHTCPChannel[bytes] | None = None
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                session = _ProbeSession()
                opening = self._unanswered[link] = asyncio.create_task(
                    link.conn.create_connection(
                        lambda: session, se_address(record.number), REVERSE_PORT, "127.0.0.1", 0
                    )
                )
                opening.add_done_callback(lambda _opening: self._unanswered.pop(link, None))
                channel = await _opened(opening, CHECK_TIMEOUT_S)
                shown = await session.host_key
        except TimeoutError:
            return f"no key exchange with its sshd within {CHECK_TIMEOUT_S:.0f} s"
        except (asyncssh.Error, TrustError, OSError) as error:
            return f"no key exchange with its sshd: {error}"
        finally:
            if channel is not None:
                channel.abort()
        return "" if shown in record.host_keys else "its sshd shows a host key that is not the one enrolled"
