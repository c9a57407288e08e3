"""Splicing: bytes between a TCP connection on the node and a channel of a link, with back-pressure both ways."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import cast

import asyncssh

from appliance.controller.link import Link, unsent_bytes

HIGH_WATER_BYTES = 1024 * 1024
"""Unsent bytes of a link above which what feeds it stops reading: asyncssh has no back-pressure from its socket."""
DRAIN_LOOK_S = 0.02

MIN_PACKET_BYTES = 1024
"""A peer that announces smaller packets would make us spend a loop turn on each byte."""


def has_tiny_packets(channel: asyncssh.SSHTCPChannel[bytes]) -> bool:
    """Whether the peer of an open or opening channel takes only packets below `MIN_PACKET_BYTES`."""
    return channel._send_pktsize < MIN_PACKET_BYTES  # noqa: SLF001 - asyncssh has no name for it


class TcpEnd(asyncio.Protocol):
    """The local side of one reverse connection."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.channel: asyncssh.SSHTCPChannel[bytes] | None = None
        self._early = bytearray()
        """What the local side said before the channel was open. Reading isn't paused from the start: uvloop may then
        read all the same, or never resume."""
        self._early_eof = False
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def attach(self, channel: asyncssh.SSHTCPChannel[bytes]) -> None:
        """The channel is open: bytes may flow."""
        self.channel = channel
        if self._early:
            channel.write(bytes(self._early))
            self._early.clear()
        if self._early_eof:
            channel.write_eof()
        self._hold_back()

    def data_received(self, data: bytes) -> None:
        if self.channel is None:
            self._early += data
            if len(self._early) > HIGH_WATER_BYTES and self.transport is not None:
                self.transport.pause_reading()
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


class SshEnd(asyncssh.SSHTCPSession[bytes]):
    """The link's side of one reverse connection."""

    def __init__(
        self, end: TcpEnd, link: Link, on_data: Callable[[Link], None], *, on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._on_close = on_close
        self._end = end
        self._link = link
        self._on_data = on_data
        self.has_spoken = False
        """Whether anything came from the SE."""

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        # Not before: asyncssh refuses what is written to a channel it hasn't opened yet, and drops the whole link.
        if not has_tiny_packets(chan):
            self._end.attach(chan)

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:  # noqa: ARG002
        self.has_spoken = True
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
        self._on_close()


def unsent(channel: asyncssh.SSHTCPChannel[bytes]) -> int:
    """Bytes that wait on a channel and in its link."""
    return channel.get_write_buffer_size() + unsent_bytes(channel.get_connection())
