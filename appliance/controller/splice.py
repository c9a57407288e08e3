"""Splicing: bytes between a TCP connection on the node and a channel of a link, with back-pressure both ways.

Towards the SE the local connection is read only while the link takes more (`controller.pace`); from the SE the
channel's window follows its way (`protocol.window`), and what the local side doesn't read waits within that window.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import cast

import asyncssh

from appliance.controller.link import Link
from appliance.controller.pace import LOOK_AGAIN_S, may_feed, paced
from appliance.protocol.window import Window

EARLY_BYTES = 1024 * 1024
"""What the local side may say before the channel is open."""
MIN_PACKET_BYTES = 1024
"""A peer that announces smaller packets would make us spend a loop turn on each byte."""
RTT_UNKNOWN_S = 0.1
"""Stands for a link's round trip until its second heartbeat tells it."""
_room = memoryview(bytearray(64 * 1024))
"""What is read of a local connection goes through here, all of it in one call of the loop: two packets at once, so that
a heartbeat waits for no more."""


def has_tiny_packets(channel: asyncssh.SSHTCPChannel[bytes]) -> bool:
    """Whether the peer of an open or opening channel takes only packets below `MIN_PACKET_BYTES`."""
    return channel._send_pktsize < MIN_PACKET_BYTES  # noqa: SLF001 - asyncssh has no name for it


class TcpEnd(asyncio.BufferedProtocol):
    """The local side of one connection over a link."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.channel: asyncssh.SSHTCPChannel[bytes] | None = None
        self._link: Link | None = None
        self._early = bytearray()
        """What the local side said before the channel was open. Reading isn't paused from the start: uvloop may then
        read all the same, or never resume."""
        self._early_eof = False
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def attach(self, channel: asyncssh.SSHTCPChannel[bytes], link: Link) -> None:
        """The channel is open: bytes may flow."""
        if self.closed.is_set():
            channel.abort()  # the local side broke while it was being opened: nobody else would close it
            return
        self._link = link
        self.channel = channel
        channel.set_write_buffer_limits(high=0)
        # Before anything is written: a link that is full from the beginning must know whom to tell when it isn't.
        paced(link.conn).fed(self, len(self._early), asyncio.get_running_loop().time())
        if self._early:
            channel.write(bytes(self._early))
            self._early.clear()
        if self._early_eof:
            channel.write_eof()
        self.look()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return _room

    def buffer_updated(self, nbytes: int) -> None:
        if self.channel is None:
            self._early += _room[:nbytes]
            if len(self._early) > EARLY_BYTES and self.transport is not None:
                self.transport.pause_reading()
            return
        if self.channel.is_closing() or self._link is None:
            return
        paced(self._link.conn).fed(self, nbytes, asyncio.get_running_loop().time())
        self.channel.write(_room[:nbytes])
        self.look()

    def look(self) -> None:
        """See `pace.Feeder`."""
        if self.transport is None or self.transport.is_closing() or self.channel is None or self._link is None:
            return
        if self.channel.is_closing():
            return  # its session ends this connection
        if self._link.is_rekeying:
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self.look)
        elif not may_feed(self.channel):
            self.transport.pause_reading()
        elif not self.transport.is_reading():
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        if self.channel is None:
            self._early_eof = True
        elif not self.channel.is_closing():
            self.channel.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self.channel is not None and self._link is not None:
            # By the link: a channel that is closed has no connection any more, and asyncssh asserts that it has.
            paced(self._link.conn).leave(self)
            self.channel.close()
        self.closed.set()

    def pause_writing(self) -> None:
        if self.channel is not None:
            self.channel.pause_reading()

    def resume_writing(self) -> None:
        if self.channel is not None and not self.channel.is_closing():
            self.channel.resume_reading()


class SshEnd(asyncssh.SSHTCPSession[bytes]):
    """The link's side of one connection."""

    def __init__(
        self,
        end: TcpEnd,
        link: Link,
        on_data: Callable[[Link], None],
        *,
        window: Window,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_close = on_close
        self._end = end
        self._link = link
        self._on_data = on_data
        self._window = window
        self._channel: asyncssh.SSHTCPChannel[bytes] | None = None
        self._now = asyncio.get_running_loop().time
        self.has_spoken = False
        """Whether anything came from the SE."""

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        self._channel = chan
        # Not before: asyncssh refuses what is written to a channel it hasn't opened yet, and drops the whole link.
        if not has_tiny_packets(chan):
            self._end.attach(chan, self._link)

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:  # noqa: ARG002
        self.has_spoken = True
        self._on_data(self._link)
        if self._end.transport is not None:
            self._end.transport.write(data)
        if self._channel is not None:
            rtt_s = self._link.rtt.least
            size = self._window.took(len(data), self._now(), RTT_UNKNOWN_S if rtt_s is None else rtt_s)
            # asyncssh grants up to this, whenever the half of it is used up; it has no name for a change.
            self._channel._init_recv_window = size  # noqa: SLF001

    def eof_received(self) -> bool:
        if self._end.transport is not None and self._end.transport.can_write_eof():
            with contextlib.suppress(OSError, RuntimeError):
                self._end.transport.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._window.close()
        if self._end.transport is not None:
            self._end.transport.close()
        self._on_close()

    def pause_writing(self) -> None:
        self._end.look()

    def resume_writing(self) -> None:
        self._end.look()
