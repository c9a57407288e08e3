"""Attacks by enrolled SEs, copies and strangers that hit a defect once, against a real controller.

Each fails when its defence is taken out. What a link may open at all, and who may log in, is in
`test_tunnel_controller`; malformed and forged enrollments are in `test_enroll_controller`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import resource
import signal
import socket
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import asyncssh
import psutil
import pytest
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

from appliance import settings
from appliance.errors import ApplianceError, EnrollError
from appliance.lab.simulated import SimulatedSe, exchange
from appliance.protocol import strict_json, telemetry, tunnel
from appliance.protocol.enroll import InstanceFacts
from appliance.protocol.tunnel import Confirm, Heartbeat, HeartbeatAnswer, HelloAnswer

LOST = (asyncssh.Error, OSError, EOFError, asyncio.IncompleteReadError)


def freeze(se: SimulatedSe) -> None:
    """Its machine stands still: no byte is read or written any more, the socket stays open."""
    se.conn._transport.pause_reading()


async def closed_within(se: SimulatedSe, seconds: float) -> None:
    await asyncio.wait_for(se.conn.wait_closed(), seconds)


async def heard(se: SimulatedSe) -> None:
    """Returns when the controller has read all that was sent over the link: it answers what was sent after it."""
    await se.conn._make_global_request(b"heard@test")


async def greeting(se: SimulatedSe) -> asyncio.Task[HelloAnswer]:
    """Says hello, and returns when the controller has heard it."""
    se._channel = await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)
    task = asyncio.create_task(se.hello())
    await asyncio.sleep(0)
    await heard(se)
    return task


def request(path: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: c\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def resident_mb(controller: RunningController) -> float:
    return psutil.Process(controller.process.pid).memory_info().rss / 2**20


def processor_s(controller: RunningController) -> float:
    used = psutil.Process(controller.process.pid).cpu_times()
    return used.user + used.system


# An SE that is revoked while it comes in.


def test_a_revoked_se_that_said_no_hello_yet_is_cut_off(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "revoked-early")
            await se.enroll()
            await se.connect()
            await asyncio.to_thread(controller.operator.revoke_se, "revoked-early", reason="attack")
            await closed_within(se, 2)

    asyncio.run(go())


def test_a_revocation_during_hello_holds(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            older = await linked(stand, controller, "revoked-meanwhile")
            freeze(older)
            se = twin_of(stand, controller, older)
            await se.connect()
            # The frozen older link is pinged for two seconds; the operator revokes within them.
            hello = await greeting(se)
            await asyncio.to_thread(controller.operator.revoke_se, "revoked-meanwhile", reason="attack")
            with pytest.raises((ApplianceError, *LOST)):
                await hello
            await closed_within(se, 3)
            await until_async(lambda: controller.operator.status().links == 0, what="no link")

    asyncio.run(go())


def test_two_confirmations_at_once_leave_one_ticket(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "confirms-twice")
            await se.enroll()
            await se.connect()
            se.ticket = (await se.hello()).ticket
            body = strict_json.encode(Confirm(ticket=se.ticket))
            channels = [await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT) for _ in range(8)]
            answers = await asyncio.gather(*(exchange(*channel, tunnel.CONFIRM_PATH, body) for channel in channels))
            assert [answer.status for answer in answers].count(200) == 1
            await se.beat()
            spent = [entry for entry in controller.operator.audit() if entry.action == "enroll.spent"]
            assert len([entry for entry in spent if entry.subject == se.se_id]) == 1

    asyncio.run(go())


# Links that die, or go on living, where nobody looks.


def test_a_link_that_breaks_during_its_hello_locks_nobody_out(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            older = await linked(stand, controller, "breaks")
            freeze(older)
            se = twin_of(stand, controller, older)
            await se.connect()
            hello = await greeting(se)
            se.close()
            with pytest.raises((ApplianceError, *LOST)):
                await hello
            # The older link's ping fails, and who asked for its place is gone. The SE comes again.
            se._channel = None
            answer = await se.link()
            assert not answer.quarantined, answer.reason
            await se.beat()
            assert not controller.operator.se("breaks").alarms

    asyncio.run(go())


def test_a_copy_that_breaks_during_its_hello_leaves_no_alarm_behind(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            first = await linked(stand, controller, "copy-breaks")
            for _ in range(5):
                copy = twin_of(stand, controller, first)
                await copy.connect()
                hello = await greeting(copy)
                copy.close()
                with pytest.raises((ApplianceError, *LOST)):
                    await hello
            await first.beat()
            await until_async(lambda: not controller.operator.se("copy-breaks").alarms, what="no copy is linked")

    asyncio.run(go())


def test_a_link_whose_hello_failed_does_not_stay(tmp_path: Path) -> None:
    with running(tmp_path / "root", settings={"login_timeout_s": 2.0}) as controller:

        async def go() -> None:
            async with machine() as stand:
                se = stand.se(controller.bundle, "disk-full")
                await se.enroll()
                await se.connect()
                # No file may grow any more: what a full disk does to the store.
                limits = resource.prlimit(controller.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
                try:
                    with pytest.raises(EnrollError) as refused:
                        await se.hello()
                finally:
                    resource.prlimit(controller.process.pid, resource.RLIMIT_FSIZE, limits)
                assert refused.value.code == "TUNNEL-026"
                await closed_within(se, 4)
                se.close()
                await se.link()
                await se.beat()

        asyncio.run(go())


def test_copies_of_one_se_cannot_take_the_room_of_others(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            first = await linked(stand, controller, "crowd")
            copies = [twin_of(stand, controller, first) for _ in range(20)]
            for copy in copies:
                await copy.connect()
                with contextlib.suppress(ApplianceError, *LOST):
                    await copy.hello()
            most = settings.Controller().max_links_per_se
            await until_async(lambda: sum(not copy.conn.is_closed() for copy in copies) < most, what="few copies stay")
            await first.beat()
            await until_async(lambda: controller.state("crowd") == "UP CLONE", what="the first is UP")

    asyncio.run(go())


# Floods.


def test_channels_are_capped_when_all_are_asked_for_at_once(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "burst")
            opened = await asyncio.gather(
                *(se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT) for _ in range(400)),
                return_exceptions=True,
            )
            there = [entry for entry in opened if isinstance(entry, tuple)]
            assert len(there) < 64
            # What was refused, or is closed, counts no more.
            for _reader, writer in there:
                writer.close()
                await writer.wait_closed()
            await heard(se)
            for _ in there:
                await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)

    asyncio.run(go())


def test_channels_take_little_unread(controller: RunningController) -> None:
    """What a channel's window lets in is kept in memory while an earlier request is answered."""

    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "window")
            channel, _ = await se.conn.create_connection(
                asyncssh.SSHTCPSession, tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT
            )
            assert channel._send_window <= 256 * 1024
            channel.close()

    asyncio.run(go())


def test_requests_do_not_queue_up_without_end(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "queue")
            reader, writer = await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)
            writer.write(b"GET /v1/openapi.json HTTP/1.1\r\nHost: c\r\n\r\n" * 500)
            answers = await asyncio.wait_for(reader.read(), 10)
            assert answers.count(b"HTTP/1.1 200") < 50
            await se.beat()

    asyncio.run(go())


async def flood_until_closed(controller: RunningController, se: SimulatedSe, send: Callable[[], None]) -> float:
    """Sends and reads nothing until the controller closes the link; returns by how much its memory grew, MiB."""
    before = highest = resident_mb(controller)
    transport = se.conn._transport
    transport.pause_reading()
    ends_at = time.monotonic() + 40
    try:
        while not controller.state(se.name).startswith("DOWN"):
            assert time.monotonic() < ends_at, "the link is still there"
            for _ in range(50):
                if transport.get_write_buffer_size() > 1_000_000:
                    break
                send()
            await asyncio.sleep(0.005)
            highest = max(highest, resident_mb(controller))
    finally:
        transport.resume_reading()
    return highest - before


@pytest.mark.parametrize("rekeying", [False, True], ids=["unread", "without keys"])
def test_a_link_that_asks_and_never_reads_is_closed(controller: RunningController, *, rekeying: bool) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "leaves-keys-lie" if rekeying else "never-reads")
            factory = asyncssh.SSHTCPSession
            channels = [
                (await se.conn.create_connection(factory, tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT, window=2**31 - 1))[
                    0
                ]
                for _ in range(8)
            ]

            if rekeying:
                # All answers wait for new keys, which the client leaves lie.
                leave_keys_lie(se)

            def send() -> None:
                for channel in channels:
                    if not channel.is_closing():
                        channel.write(b"GET /v1/openapi.json HTTP/1.1\r\nHost: c\r\n\r\n")

            # 8 of them are what may wait.
            assert await flood_until_closed(controller, se, send) < 24
            told = controller.operator.se(se.name).summary.text
            assert told == "more than 8 MiB wait for it, and it doesn't read"

    asyncio.run(go())


def test_a_link_that_sends_ssh_requests_and_never_reads_is_closed(tmp_path: Path) -> None:
    async def go(controller: RunningController) -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "never-listens")

            beat = request(tunnel.HEARTBEAT_PATH, strict_json.encode(Heartbeat(sequence=1, time=0.0)))
            _, writer = await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)
            beats = itertools.count()

            def send() -> None:
                # A heartbeat now and then, or it would be given up as silent.
                if next(beats) % 1000 == 0:
                    writer.write(beat)
                for _ in range(40):
                    se.conn._send_global_request(b"x" * 200, want_reply=True)

            assert await flood_until_closed(controller, se, send) < 64

    with running(tmp_path / "root", settings={"link_unsent_max_bytes": 1 << 20}) as controller:
        asyncio.run(go(controller))


def test_a_key_exchange_that_is_begun_and_never_ended_is_cut_off(tmp_path: Path) -> None:
    """While keys are exchanged nothing else may be sent, and all of it waits in memory."""

    async def go(controller: RunningController) -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "rekeys")
            _, writer = await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)
            leave_keys_lie(se)
            beat = request(tunnel.HEARTBEAT_PATH, strict_json.encode(Heartbeat(sequence=1, time=0.0)))
            ends_at = time.monotonic() + 20
            while not controller.state("rekeys").startswith("DOWN"):
                assert time.monotonic() < ends_at, "the link is still there"
                writer.write(beat)
                await asyncio.sleep(0.2)
            assert controller.operator.se("rekeys").summary.text == "no new keys within 2 s"

    with running(tmp_path / "root", settings={"rekey_timeout_s": 2.0}) as controller:
        asyncio.run(go(controller))


def test_a_heartbeat_full_of_bombs_does_not_stop_the_others(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "bomber")
            other = await linked(stand, controller, "bystander")
            wire = b"\x92\x00\xdc" + (16000).to_bytes(2, "big") + b"\x93\xa0\x90\x00" * 16000
            deflate = zlib.compressobj(level=9, zdict=telemetry.dictionary())
            bomb = base64.b64encode(deflate.compress(wire) + deflate.flush()).decode()
            count = (tunnel.MAX_BODY_BYTES - 1000) // (len(bomb) + 3)
            beat = Heartbeat(sequence=2, time=time.time(), telemetry=[bomb] * count)
            attack = asyncio.create_task(se.say(tunnel.HEARTBEAT_PATH, beat, HeartbeatAnswer))
            await asyncio.sleep(0)
            await heard(se)
            spent_s = processor_s(controller)
            await other.beat()
            # What the bystander waited for, by the controller's clock of work and not by that of a busy machine.
            assert processor_s(controller) - spent_s < 0.5
            with contextlib.suppress(ApplianceError):
                await attack
            se._channel = None
            await se.beat()

    asyncio.run(go())


@pytest.mark.parametrize(
    "facts",
    [
        InstanceFacts(macs=["00:00:00:00:00:00"] * 10_000),
        InstanceFacts(boot_id="x" * 200_000),
        InstanceFacts(instance_id="\x1b]0;owned\x07"),
    ],
    ids=["many", "long", "escape"],
)
def test_facts_of_a_hello_are_held_to_the_limits_of_enroll(controller: RunningController, facts: InstanceFacts) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "facts")
            await se.enroll()
            true, se.facts = se.facts, facts
            await se.connect()
            with pytest.raises(EnrollError):
                await se.hello()
            se.facts = true
            await se.hello()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ('"time":1e308,"rtt_s":1e308,"spool_bytes":9223372036854775807', 200),
        ('"time":-1e308,"rtt_s":-1e308,"spool_bytes":-9223372036854775808', 200),
        ('"time":0,"rtt_s":5e-324', 200),
        ('"time":NaN', 400),
        ('"time":1e999', 400),
        ('"time":0,"spool_bytes":9223372036854775808', 400),
        ('"time":0,"spool_bytes":1.5', 400),
        ('"time":"0"', 400),
    ],
)
def test_absurd_numbers_break_nothing(controller: RunningController, fields: str, status: int) -> None:
    name = f"numbers-{zlib.crc32(fields.encode())}"

    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, name)
            reader, writer = await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)
            for sequence in ("-9223372036854775808", "9223372036854775807"):
                body = f'{{"sequence":{sequence},{fields}}}'.encode()
                answer = await exchange(reader, writer, tunnel.HEARTBEAT_PATH, body)
                assert answer.status == status
            controller.operator.se(name)
            controller.operator.status()
            metrics = await asyncio.to_thread(fetch, controller.bound["metrics_port"])
            assert metrics.startswith(b"HTTP/1.1 200")
            assert f'se="{name}"'.encode() in metrics
            await se.beat()

    asyncio.run(go())


def fetch(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: c\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: sock.recv(65536), b""))


def test_a_long_farewell_is_cut_short(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "farewell")
            se.conn.disconnect(asyncssh.DISC_PROTOCOL_ERROR, "x" * 100_000)
            await until_async(lambda: controller.state("farewell").startswith("DOWN"), what="DOWN")
            assert len(controller.operator.se("farewell").summary.text) < 300
            assert all(len(event.text) < 500 for event in controller.operator.events())

    asyncio.run(go())


def test_failing_reverse_connections_do_not_multiply_checks(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "refuses")
            await until_async(lambda: controller.state("refuses") == "UP OK", what="UP")
            asked = 0

            def refuse(_packet: object) -> None:
                nonlocal asked
                asked += 1
                raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "no")

            se.conn._process_forwarded_tcpip_open = refuse
            dialled = 40

            def dial() -> None:
                for _ in range(dialled):
                    with socket.create_connection((se.grant.address, controller.bound["reverse_port"]), 5) as sock:
                        sock.recv(1)

            await asyncio.to_thread(dial)
            await until_async(lambda: controller.state("refuses") == "DEGRADED REVERSE_DOWN", what="told")
            await until_async(lambda: asked >= dialled + 2, what="the check is repeated")
            assert asked <= dialled + 4

    asyncio.run(go())


@pytest.mark.parametrize("port", ["enroll_port", "ssh_port"])
def test_one_source_gets_no_more_connections_than_its_share(tmp_path: Path, port: str) -> None:
    with running(tmp_path / "root", settings={"max_unauthenticated_per_source": 10}) as controller:
        controller.signal(signal.SIGSTOP)
        socks = []
        for _ in range(200):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", getattr(controller, port)))
            socks.append(sock)
        controller.signal(signal.SIGCONT)
        # Long before the deadlines of those that stay.
        until(lambda: sum(is_open(sock) for sock in socks) <= 10, what="the others are closed", deadline_s=4)
        for sock in socks:
            sock.close()


def test_a_stalled_key_exchange_ends_at_the_login_deadline(tmp_path: Path) -> None:
    with running(tmp_path / "root", settings={"login_timeout_s": 1.0}) as controller:
        for said in (b"", b"SSH-2.0-x\r\n", b"SSH-2.0-x\r\n\0\0\x80\0", b"SSH-2.0-x\r\n\0\0\0"):
            with socket.create_connection(("127.0.0.1", controller.ssh_port), timeout=5) as sock:
                sock.sendall(said)
                began = time.monotonic()
                while sock.recv(65536):
                    pass
                assert time.monotonic() - began < 3
        assert refused(controller.bound["metrics_port"])["gateway-no-login"] == 4


def test_a_slow_request_on_a_channel_is_cut_off(tmp_path: Path) -> None:
    settings = {"header_timeout_s": 3.0, "body_timeout_s": 3.0}
    with running(tmp_path / "root", settings=settings) as controller:

        async def answered(se: SimulatedSe, part: bytes) -> bytes:
            reader, writer = await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)
            writer.write(part)
            return await asyncio.wait_for(reader.read(), 10)

        async def go() -> None:
            async with machine() as stand:
                se = await linked(stand, controller, "slow")
                said = (b"", b"POST /v1/heart", b"POST /v1/heartbeat HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
                for answer in await asyncio.gather(*(answered(se, part) for part in said)):
                    assert answer.startswith(b"HTTP/1.1 408")

        asyncio.run(go())


def test_a_link_that_breaks_while_a_service_answers_leaves_no_connection(tmp_path: Path) -> None:
    async def go() -> None:
        alive: set[asyncio.StreamWriter] = set()
        served = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal served
            served += 1
            alive.add(writer)
            with contextlib.suppress(OSError):
                await reader.read()
            alive.discard(writer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with running(tmp_path / "root", services={"slow": f"127.0.0.1:{port}"}) as controller:
            async with machine() as stand:
                se = await linked(stand, controller, "service-lost")
                for _ in range(10):
                    work = [se.conn.open_connection("slow", tunnel.SERVICE_PORT) for _ in range(20)]
                    opening = [asyncio.create_task(entry) for entry in work]
                    await asyncio.sleep(0)
                    se.close()
                    await asyncio.gather(*opening, return_exceptions=True)
                    await se.link()
                    await se.beat()
                assert served
                await until_async(lambda: not alive, what="no connection stays", deadline_s=5)
        server.close()
        await server.wait_closed()

    asyncio.run(go())


def test_a_service_that_speaks_first_is_heard(tmp_path: Path) -> None:
    """What it says may be there before the channel is open; written too early it took the whole link down."""

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 ready")
        writer.close()

    async def go() -> None:
        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with running(tmp_path / "root", services={"greeter": f"127.0.0.1:{port}"}) as controller:
            async with machine() as stand:
                se = await linked(stand, controller, "listens")
                for _ in range(50):
                    reader, writer = await se.conn.open_connection("greeter", tunnel.SERVICE_PORT)
                    assert await asyncio.wait_for(reader.read(), 5) == b"220 ready"
                    writer.close()
                await se.beat()
        server.close()
        await server.wait_closed()

    asyncio.run(go())


@pytest.mark.parametrize(
    "query", ["events?after=inf", "events?after=nan", "audit?limit=nan", "audit?after=-inf", "events?after=1e300"]
)
def test_absurd_numbers_of_an_operator_are_refused(controller: RunningController, query: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(controller.paths.controller_socket))
        sock.sendall(f"GET /v1/{query} HTTP/1.1\r\nHost: c\r\nConnection: close\r\n\r\n".encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 400")
