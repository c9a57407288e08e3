"""Peers that take what they can get: what scenarios judge a fleet by, and what `scripts/bench floods` measures.

Each flood is what one hostile machine does to a controller, bounded in number and in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import asyncssh
from rig import link_in_turn, machine

from appliance.cli.operator import Operator
from appliance.errors import EnrollError
from appliance.lab.fleet import SharedTelemetry
from appliance.lab.simulated import SimulatedSe
from appliance.pki import tls
from appliance.protocol import tunnel
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.seed import Bundle


class Target(NamedTuple):
    """A controller on loopback."""

    bundle: Bundle
    """Of an image key that lets in one SE of each flood."""
    enroll_port: int
    ssh_port: int
    operator: Operator


Work = Callable[[Target, int, float], Coroutine[Any, Any, None]]
"""Floods a controller with so many of its kind, until that moment of the monotonic clock."""


class Flood(NamedTuple):
    """One flood in its sizes."""

    work: Work
    small: int
    """How many in a default run, in which others need the cores."""
    large: int
    reasons: tuple[str, ...] = ()
    """What must be counted as refused in the large one."""

    @property
    def name(self) -> str:
        """Of the flood."""
        return str(getattr(self.work, "__name__", ""))


async def silent(at: Target, count: int, end: float) -> None:
    """Connections to both ports that say nothing; each one closed is opened again."""
    turns = asyncio.Semaphore(200)

    async def sit(port: int) -> None:
        while (left_s := end - time.monotonic()) > 0:
            async with turns:
                try:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.5)
                    continue
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(reader.read(), left_s)
            writer.transport.abort()
            await asyncio.sleep(min(1.0, left_s))

    ports = (at.enroll_port, at.ssh_port)
    await asyncio.gather(*(sit(port) for port in ports for _ in range(count)))


async def tls_connection(at: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = tls.client_context([at.bundle.root_ca])
    return await asyncio.open_connection("127.0.0.1", at.enroll_port, ssl=context)


async def slow_loris(at: Target, count: int, end: float) -> None:
    """Requests whose headers come a byte a second, and half as many SSH banners that do."""

    async def drip(connect: Callable[[], Coroutine[Any, Any, Any]], content: bytes) -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OSError, ssl.SSLError):
                _, writer = await connect()
                try:
                    for byte in content:
                        if time.monotonic() >= end or writer.transport.is_closing():
                            break
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(1.0)
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.5)

    request = b"POST /v1/enroll/nonce HTTP/1.1\r\nHost: x\r\n" + b"X-Y: z\r\n" * 1000
    requests = (drip(lambda: tls_connection(at), request) for _ in range(count))
    banner = b"SSH-2.0-" + b"x" * 200
    banners = (
        drip(lambda: asyncio.open_connection("127.0.0.1", at.ssh_port), banner) for _ in range(count // 2)
    )  # fmt: skip
    await asyncio.gather(*requests, *banners)


async def huge_headers(at: Target, count: int, end: float) -> None:
    """A megabyte of headers, again and again."""

    async def send() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OSError, ssl.SSLError):
                _, writer = await tls_connection(at)
                try:
                    writer.write(b"POST /v1/enroll/nonce HTTP/1.1\r\n" + b"X-Filler: " + b"y" * (1 << 20))
                    await writer.drain()
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(send() for _ in range(count)))


async def channels(at: Target, count: int, end: float) -> None:
    """One SE that asks for as many channels as it can."""

    async def ask(se: SimulatedSe) -> None:
        assert se.conn is not None
        while time.monotonic() < end:
            with contextlib.suppress(asyncssh.ChannelOpenError):
                await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)

    async with machine() as stand:
        se = stand.se(at.bundle, f"channels-{count}")
        await se.enroll()
        await link_in_turn(se)
        await se.beat()
        # Bounded, or the flood would spend this machine's cores, which the controller shares.
        await asyncio.gather(*(ask(se) for _ in range(min(count, 100))))


async def telemetry(at: Target, count: int, end: float) -> None:
    """One SE whose heartbeats never end, each with as many samples as one may carry."""
    samples = SharedTelemetry()
    async with machine() as stand:
        se = stand.se(at.bundle, f"telemetry-{count}")
        await se.enroll()
        await link_in_turn(se)
        se.telemetry = lambda: (samples() * tunnel.MAX_SAMPLES)[: tunnel.MAX_SAMPLES]
        while time.monotonic() < end:
            with contextlib.suppress(EnrollError):  # more than an interval has room for are refused
                await se.beat(telemetry=True)


async def unread(at: Target, _count: int, end: float) -> None:
    """One SE that asks for long answers on eight channels and reads none of them; given up, it comes back."""
    async with machine() as stand:
        se = stand.se(at.bundle, "unread")
        await se.enroll()
        while time.monotonic() < end:
            await link_in_turn(se)
            await se.beat()
            assert se.conn is not None
            asks = [
                (await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT, window=1 << 31))[1]
                for _ in range(8)
            ]
            way = se.conn._transport
            assert way is not None
            way.pause_reading()
            while time.monotonic() < end and not way.is_closing():
                for writer in asks:
                    writer.write(b"GET /v1/openapi.json HTTP/1.1\r\nHost: c\r\n\r\n")
                await asyncio.sleep(0.002)
            se.close()


async def enrollments(at: Target, count: int, end: float) -> None:
    """New SEs with a valid image key, as fast as they come."""
    created = await asyncio.to_thread(
        at.operator.create_image_key,
        ImageKeyTermsWish(max_uses=100_000, expires_in_s=86400, note="flood"),
    )
    async with machine() as stand:

        async def come(turn: int) -> None:
            number = 0
            while time.monotonic() < end:
                number += 1
                with contextlib.suppress(Exception):  # refused or not: both are the point
                    await stand.se(created.bundle, f"flood-{turn}-{number}").enroll()

        await asyncio.gather(*(come(turn) for turn in range(count)))


FLOODS = (
    Flood(silent, 300, 5000, ("enroll-connection", "gateway-connection")),
    Flood(slow_loris, 30, 500, ("enroll-408", "enroll-begun")),
    Flood(huge_headers, 2, 8, ("enroll-431",)),
    Flood(channels, 500, 5000, ("gateway-channel",)),
    Flood(unread, 1, 1, ("link-unread",)),
    Flood(telemetry, 1, 1, ("link-heartbeat",)),
    Flood(enrollments, 2, 4, ("ENROLL-040",)),
)


def from_outside(work: Coroutine[Any, Any, None]) -> None:
    """Runs a flood as other machines do: what it takes to make one isn't taken from the controller's processors."""

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # on Linux of a thread
        asyncio.run(work)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
