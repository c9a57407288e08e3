"""A way of a given rate and length in user space: carries TCP connections, delays each byte, lets only so many pass.

    python -m shaper TARGET_PORT --rtt-ms 70 [--mbit-s 10]        prints the port it listens on, ends with its stdin

Each direction is a line: a byte leaves when those before it have left, at the rate, and arrives half an RTT later. What
a sender has sent and the line hasn't taken waits before it, in this process's receive buffer, as it would in the buffer
of the narrowest router: `--buffer-kb` is its size; unless said it is the kernel's own, some megabytes. A program of its
own, since what it carries for one process must not hold up the other.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import uvloop

PIECE_S = 0.004
"""What leaves at once on a slow line."""
WAITING_BYTES = 64 * 1024
"""Taken from the sender before it left: more is left in the kernel."""
MOST_BYTES = 8 << 20
"""Arrived, and not taken by the receiver: then the line stands."""


class Line(asyncio.Protocol):
    """One end; what it receives goes along its direction to the other end."""

    def __init__(self, way: Way, far: Line | None = None) -> None:
        self._way = way
        self.far = far
        self.transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._free_at = 0.0
        self._under_way: deque[tuple[float, float, bytes]] = deque()
        """When each piece leaves and arrives."""
        self._is_timed = self._is_held = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=MOST_BYTES)
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.far is None:
            self._loop.create_task(self._dial())

    async def _dial(self) -> None:
        assert self.transport is not None
        self.transport.pause_reading()
        try:
            _, self.far = await self._loop.create_connection(lambda: Line(self._way, self), sock=await self._way.dial())
        except OSError:
            self.transport.abort()
            return
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        now = self._loop.time()
        rate = self._way.bytes_per_s
        size = max(1024, int(rate * PIECE_S)) if rate else len(data)
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            leaves = max(now, self._free_at) + (len(piece) / rate if rate else 0.0)
            self._free_at = leaves
            self._under_way.append((leaves, leaves + self._way.delay_s, piece))
        self._hold(now)
        self._time(now)

    def eof_received(self) -> bool:
        now = self._loop.time()
        self._under_way.append((now, max(now, self._free_at) + self._way.delay_s, b""))
        self._time(now)
        return True

    def _hold(self, now: float) -> None:
        assert self.transport is not None
        rate = self._way.bytes_per_s
        if not rate or self.transport.is_closing():
            return
        waiting = (self._free_at - now) * rate
        if waiting > WAITING_BYTES and not self._is_held:
            self._is_held = True
            self.transport.pause_reading()
            self._loop.call_later((waiting - WAITING_BYTES / 2) / rate, self._go_on)

    def _go_on(self) -> None:
        self._is_held = False
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def _time(self, now: float) -> None:
        if self._under_way and not self._is_timed:
            self._is_timed = True
            self._loop.call_later(max(0.0, self._under_way[0][1] - now), self._arrive)

    def _arrive(self) -> None:
        self._is_timed = False
        now = self._loop.time()
        while self._under_way and self._under_way[0][1] <= now + 0.0005:
            piece = self._under_way.popleft()[2]
            if self.far is None or self.far.transport is None or self.far.transport.is_closing():
                self._under_way.clear()
                return
            if piece:
                self.far.transport.write(piece)
            else:
                self.far.transport.write_eof()
        self._time(now)

    def pause_writing(self) -> None:
        if self.far is not None and self.far.transport is not None and not self.far.transport.is_closing():
            self.far.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.far is not None and self.far.transport is not None and not self.far.transport.is_closing():
            self.far.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.far is not None and self.far.transport is not None:
            self.far.transport.abort()


class Way:
    """What all connections have in common."""

    def __init__(self, target: int, *, rtt_s: float, bytes_per_s: float, buffer_bytes: int) -> None:
        self._target = target
        self.delay_s = rtt_s / 2
        self.bytes_per_s = bytes_per_s
        self._buffer_bytes = buffer_bytes

    def _sized(self, sock: socket.socket) -> socket.socket:
        if self._buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes // 2)  # the kernel doubles it
        return sock

    async def dial(self) -> socket.socket:
        """Connects to the target."""
        sock = self._sized(socket.socket())
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._target))
        return sock

    async def run(self) -> None:
        """Listens, says where, and carries until stdin ends."""
        listener = self._sized(socket.create_server(("127.0.0.1", 0)))
        server = await asyncio.get_running_loop().create_server(lambda: Line(self), sock=listener)
        print(listener.getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        server.close()


@contextmanager
def shaped(target: int, *, rtt_s: float = 0.0, mbit_s: float = 0.0, buffer_kb: int = 0) -> Iterator[int]:
    """A way to 127.0.0.1:`target`; gives its port. A rate of 0 is none, a buffer of 0 the kernel's own."""
    command = [
        sys.executable, str(Path(__file__)), str(target), "--rtt-ms", str(rtt_s * 1000), "--mbit-s", str(mbit_s),
        "--buffer-kb", str(buffer_kb),
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(10)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=int)
    parser.add_argument("--rtt-ms", type=float, default=0.0)
    parser.add_argument("--mbit-s", type=float, default=0.0)
    parser.add_argument("--buffer-kb", type=int, default=0)
    arguments = parser.parse_args()
    way = Way(
        arguments.target, rtt_s=arguments.rtt_ms / 1000, bytes_per_s=arguments.mbit_s * 125_000,
        buffer_bytes=arguments.buffer_kb * 1024,
    )  # fmt: skip
    uvloop.run(way.run())


if __name__ == "__main__":
    main()
