"""What one stranger or one SE could keep for itself at the cost of all others; each fails without its defence."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from pathlib import Path

import asyncssh
import psutil
from asyncssh.packet import String, UInt32
from rig import (
    RunningController,
    is_open,
    leave_keys_lie,
    linked,
    machine,
    refused,
    running,
    twin_of,
    until,
    until_async,
)

from appliance.lab.simulated import SimulatedSe
from appliance.pki import tls
from appliance.protocol import tunnel

FEW_SLOTS = """
from appliance.controller import slots
slots.FEW, slots.COMING_UP_S = 2, 0.01  # two log-ins at a time, and two more that have logged in
from appliance.__main__ import main
main()
"""

QUICK_CHECKS = """
from appliance.controller import reverse
reverse.CHECK_TIMEOUT_S, reverse.CHECK_AGAIN_S = 0.2, (0.05,)
from appliance.__main__ import main
main()
"""


def resident_mb(controller: RunningController) -> float:
    return psutil.Process(controller.process.pid).memory_info().rss / 2**20


def test_who_leaves_answers_lie_at_the_enroll_port_holds_no_place(tmp_path: Path) -> None:
    """Its request waits for room to answer, and nothing else ended it: a thousand of them kept a network out."""
    settings = {"max_unauthenticated_per_source": 2, "body_timeout_s": 2.0}
    with running(tmp_path / "root", settings=settings) as controller:
        context = tls.client_context([controller.bundle.root_ca])
        held = []
        for _ in range(2):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", controller.enroll_port))
            sock.settimeout(0.2)
            held.append(context.wrap_socket(sock, server_hostname="127.0.0.1"))
        try:
            for _ in range(60):
                for sock in held:
                    with contextlib.suppress(OSError):
                        # Fewer than may queue: more of them would end the connection.
                        sock.send(b"GET /v1/openapi.json HTTP/1.1\r\nHost: c\r\n\r\n" * 8)
                time.sleep(0.03)

            def is_let_in() -> bool:
                try:
                    with socket.create_connection(("127.0.0.1", controller.enroll_port), 5) as sock:
                        context.wrap_socket(sock, server_hostname="127.0.0.1").close()
                except OSError:
                    return False
                return True

            # Longer than a connection may rest (5 s) and say farewell (2 s).
            until(is_let_in, what="there is room again", deadline_s=12)
            assert refused(controller.bound["metrics_port"])["enroll-unread"] >= 1
        finally:
            for sock in held:
                sock.close()


def test_silent_connections_of_a_few_networks_keep_no_other_one_out(tmp_path: Path) -> None:
    """They hold all places, and take each that becomes free."""
    settings = {"max_unauthenticated": 8, "max_unauthenticated_per_source": 4}

    async def go(controller: RunningController) -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "from-elsewhere")
            await se.enroll()
            held = []
            for count in range(12):
                held.append(
                    socket.create_connection(("127.0.0.1", controller.ssh_port), 5, (f"127.0.0.{2 + count % 2}", 0))
                )
                held[-1].setblocking(False)
            try:
                # Four of them were one too many.
                await until_async(lambda: sum(is_open(sock) for sock in held) == 8, what="all places are taken")
                await se.link()
                await se.beat()
                assert sum(is_open(sock) for sock in held) == 7
                assert refused(controller.bound["metrics_port"])["gateway-connection"] == 5
            finally:
                for sock in held:
                    sock.close()

    with running(tmp_path / "root", settings=settings) as controller:
        asyncio.run(go(controller))


def test_requests_that_wait_for_each_other_take_no_memory(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "forwards-for-ever")
            own = String(se.grant.address), UInt32(5097)
            before = resident_mb(controller)
            sent, ends_at = 0, time.monotonic() + 20
            while sent < 150 * 2**20:
                assert time.monotonic() < ends_at
                while se.conn._transport.get_write_buffer_size() < 1_000_000:
                    se.conn._send_global_request(b"tcpip-forward", *own)
                    se.conn._send_global_request(b"x" * 30_000)
                    sent += 30_000
                await asyncio.sleep(0.001)
            assert resident_mb(controller) - before < 32
            await se.conn._make_global_request(b"heard@test")
            await se.beat()

    asyncio.run(go())


def test_answers_that_have_no_window_are_bounded(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "no-window")
            before = resident_mb(controller)
            channels = [
                (
                    await se.conn.create_connection(
                        asyncssh.SSHTCPSession, tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT, window=1
                    )
                )[0]
                for _ in range(60)
            ]
            for _ in range(40):
                for channel in channels:
                    channel.write(b"GET /v1/openapi.json HTTP/1.1\r\nHost: c\r\n\r\n")
                await asyncio.sleep(0.02)
            await se.conn._make_global_request(b"heard@test")
            assert resident_mb(controller) - before < 8
            await se.beat()

    asyncio.run(go())


async def worst_beat(se: SimulatedSe, seconds: float) -> float:
    worst, ends_at = 0.0, time.monotonic() + seconds
    while time.monotonic() < ends_at:
        began = time.monotonic()
        await se.beat()
        worst = max(worst, time.monotonic() - began)
        await asyncio.sleep(0.05)
    return worst


def test_bodies_that_become_whole_at_once_are_read_in_turns(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "all-at-once")
            other = await linked(stand, controller, "waits")
            body = b'{"protocol":2,"host_keys":[' + b"[]," * 85_000 + b"[]]}"
            head = f"POST {tunnel.HELLO_PATH} HTTP/1.1\r\nHost: c\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            channels = [await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT) for _ in range(60)]
            for _, writer in channels:
                writer.write(head + body[:-1])
            await se.conn._make_global_request(b"heard@test")
            await asyncio.sleep(1)
            for _, writer in channels:
                writer.write(body[-1:])
            # One after another they took two seconds of the loop.
            assert await worst_beat(other, 1.0) < 0.5
            for reader, _ in channels:
                assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 20)).startswith(b"HTTP/1.1 400")

    asyncio.run(go())


def test_links_that_never_say_a_heartbeat_keep_nobody_out(tmp_path: Path) -> None:
    controller = RunningController(tmp_path / "root", settings={"login_timeout_s": 2.0})
    controller.start("-c", FEW_SLOTS)

    async def go() -> None:
        async with machine() as stand:
            honest, first = stand.se(controller.bundle, "honest"), stand.se(controller.bundle, "mute")
            await honest.enroll()
            await first.enroll()
            mute = [first, twin_of(stand, controller, first)]
            for se in mute:
                await se.connect()
                await se.hello()
            # They stay as long as they answer pings. Longer than the time to log in:
            await asyncio.sleep(2.5)
            assert not any(se.conn.is_closed() for se in mute)
            await asyncio.wait_for(honest.link(), 5)
            await honest.beat()

    try:
        asyncio.run(go())
    finally:
        controller.end()


def test_a_check_that_is_answered_too_late_leaves_nothing_behind(tmp_path: Path) -> None:
    """A cancelled opening stayed on the link, with two MiB that its peer could send: one each 45 seconds, for ever."""

    class Fills(asyncssh.SSHTCPSession[bytes]):
        def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
            chan.write(b"x" * 2**21)

    controller = RunningController(tmp_path / "root")
    controller.start("-c", QUICK_CHECKS)

    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "answers-late")
            await se.enroll()
            await se.link()
            asked = 0

            async def late() -> Fills:
                await asyncio.sleep(0.3)
                return Fills()

            def opened(_packet: object) -> object:
                nonlocal asked
                asked += 1
                return se.conn.create_tcp_channel(), late()

            se.conn._process_forwarded_tcpip_open = opened
            before = resident_mb(controller)
            await se.beat()
            ends_at = time.monotonic() + 20
            while asked < 12:
                assert time.monotonic() < ends_at
                await asyncio.sleep(0.05)
            assert resident_mb(controller) - before < 10

    try:
        asyncio.run(go())
    finally:
        controller.end()


def test_strangers_share_their_time(controller: RunningController) -> None:
    """Each was read for two milliseconds a turn, two hundred of them for 0.4 s, and nobody had to log in for it."""
    ignored = struct.pack(">IBBI6x", 12, 6, 2, 0)

    async def go() -> None:
        async with machine() as stand:
            other = await linked(stand, controller, "among-strangers")
            held = []
            for count in range(200):
                sock = socket.socket()
                sock.bind(("127.0.0.2", 0))
                sock.connect(("127.0.0.1", controller.ssh_port))
                sock.setblocking(False)
                held.append(sock)
                if count % 16 == 15:
                    await asyncio.sleep(0.06)  # all are let in, while the loop is on time
            await asyncio.sleep(0.5)
            for sock in held:
                sock.send(b"SSH-2.0-x\r\n")
            await asyncio.sleep(0.5)
            for sock in held:
                sock.send(ignored * 1250)
            assert await worst_beat(other, 1.0) < 0.2
            for sock in held:
                sock.close()

    asyncio.run(go())


def test_empty_answers_that_wait_for_new_keys_are_weighed(controller: RunningController) -> None:
    """All of them leave in one turn when the keys are there."""

    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "asks-between-keys")
            leave_keys_lie(se)
            for _ in range(300):
                for _ in range(100):
                    if not se.conn.is_closed():
                        se.conn._send_global_request(b"x", want_reply=True)
                await asyncio.sleep(0.002)
            await asyncio.wait_for(se.conn.wait_closed(), 5)
            assert controller.operator.se(se.name).summary.text == "more than 8 MiB wait for it, and it doesn't read"

    asyncio.run(go())
