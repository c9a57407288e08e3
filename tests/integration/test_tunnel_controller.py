"""Stage tunnel against a real controller: what a link may not do, who may take over, what is noticed and when."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import asyncssh
import pytest
from rig import RunningController, linked, machine, refused, running, twin_of, until, until_async

from appliance.errors import EnrollError, UnreachableError
from appliance.lab.simulated import SharedSshd, SimulatedSe
from appliance.pki.identity import Identity
from appliance.protocol import tunnel
from appliance.protocol.address import REVERSE_PORT, se_address
from appliance.protocol.jws import encode_part
from appliance.protocol.tunnel import Confirm, ConfirmAnswer, RotateAnswer, RotateKey


def with_link(controller: RunningController, name: str, act: Callable[[SimulatedSe], Awaitable[None]]) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, name)
            await act(se)
            # Whatever was refused, the link itself still works.
            await se.beat()

    asyncio.run(go())


# What a link may not open.


def test_no_session_of_any_kind(controller: RunningController) -> None:
    async def act(se: SimulatedSe) -> None:
        for attempt in (
            se.conn.run("id"),
            se.conn.create_process(),
            se.conn.start_sftp_client(),
            se.conn.create_process(term_type="xterm"),
            se.conn.create_process(x11_forwarding=True),
        ):
            with pytest.raises(asyncssh.ChannelOpenError) as refused:
                await attempt
            # The channel itself is refused, not only what was asked for on it.
            assert refused.value.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED

    with_link(controller, "no-session", act)


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("127.0.0.1", 22),
        ("localhost", 80),
        ("channel", 81),
        ("channel.", 80),
        ("127.1.0.1", REVERSE_PORT),
        ("169.254.169.254", 80),
        ("", 80),
        ("::1", 8443),
    ],
)
def test_no_channel_to_anything_else(controller: RunningController, host: str, port: int) -> None:
    async def act(se: SimulatedSe) -> None:
        with pytest.raises(asyncssh.ChannelOpenError):
            await se.conn.open_connection(host, port)

    with_link(controller, "no-channel", act)


def test_no_foreign_reverse_address(controller: RunningController) -> None:
    async def act(se: SimulatedSe) -> None:
        own = se.grant.address
        other = se_address(se.grant.number + 1)
        for host, port in (
            (other, REVERSE_PORT),
            ("0.0.0.0", REVERSE_PORT),
            ("", REVERSE_PORT),
            ("localhost", REVERSE_PORT),
            ("::", REVERSE_PORT),
            (own, 0),
            (own, 22),
            (own, REVERSE_PORT + 1),
        ):
            with pytest.raises((asyncssh.ChannelListenError, asyncssh.Error)):
                await se.conn.forward_remote_port(host, port, "127.0.0.1", 22)

    with_link(controller, "no-foreign-address", act)


def test_no_stream_local_forwarding(controller: RunningController, tmp_path: Path) -> None:
    async def act(se: SimulatedSe) -> None:
        with pytest.raises(asyncssh.ChannelOpenError):
            await se.conn.open_unix_connection(str(controller.paths.controller_socket))
        with pytest.raises((asyncssh.ChannelListenError, asyncssh.Error)):
            await se.conn.forward_remote_path(str(tmp_path / "listen"), str(tmp_path / "to"))

    with_link(controller, "no-streamlocal", act)


def test_channels_are_capped(controller: RunningController) -> None:
    async def act(se: SimulatedSe) -> None:
        opened = []
        with pytest.raises(asyncssh.ChannelOpenError):
            while len(opened) < 100:
                opened += [await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)]
        assert 32 <= len(opened) <= 64
        for _reader, writer in opened:
            writer.close()

    with_link(controller, "channels-capped", act)


def test_tiny_packets_are_refused(controller: RunningController) -> None:
    async def act(se: SimulatedSe) -> None:
        with pytest.raises(asyncssh.ChannelOpenError):
            await se.conn.create_connection(
                asyncssh.SSHTCPSession, tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT, max_pktsize=16
            )

    with_link(controller, "tiny-packets", act)


def test_other_users_keys_and_methods_are_refused(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "login")
            for user in ("root", "avictlruser", "aviseuser ", ""):
                se.user = user
                with pytest.raises(UnreachableError, match=r"Permission denied|Connection lost"):
                    await se.connect()
            se.user = "aviseuser"
            stranger = se.identity
            se.identity = Identity.create()
            with pytest.raises(UnreachableError, match="Permission denied"):
                await se.connect()
            # The image key opens the door to asking, and no other; the key that logs in to SEs opens theirs.
            state = controller.paths.controller_state
            for others in (controller.bundle.image_key.encode(), (state / "id_se").read_bytes()):
                se.identity = Identity.from_pkcs8(others)
                with pytest.raises(UnreachableError, match="Permission denied"):
                    await se.connect()
            se.identity = stranger
            for method in (
                {"password": "x"},
                {"client_keys": [asyncssh.generate_private_key("ssh-rsa", key_size=2048)]},
            ):
                with pytest.raises(asyncssh.PermissionDenied):
                    await asyncssh.connect(
                        "127.0.0.1", controller.ssh_port, username="aviseuser", known_hosts=None, config=None,
                        agent_path=None, **{"client_keys": None, **method},
                    )  # fmt: skip

    asyncio.run(go())


def test_only_the_agreed_key_exchange_is_offered(controller: RunningController) -> None:
    async def go() -> None:
        # The gateway hangs up too; what it offered may be lost with that.
        with pytest.raises((asyncssh.KeyExchangeFailed, asyncssh.ConnectionLost)):
            await asyncssh.connect(
                "127.0.0.1", controller.ssh_port, kex_algs=["curve25519-sha256"], known_hosts=None, config=None
            )

    asyncio.run(go())


# What is said over a link.


def test_what_comes_out_of_order_is_refused(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "out-of-order")
            await se.enroll()
            await se.connect()
            with pytest.raises(EnrollError) as early:
                await se.beat()
            assert early.value.code == "TUNNEL-025"
            with pytest.raises(EnrollError) as unknown:
                await se.say(tunnel.CONFIRM_PATH, Confirm(ticket="x"), ConfirmAnswer)
            assert unknown.value.code == "TUNNEL-023"
            await se.hello()
            with pytest.raises(EnrollError) as twice:
                await se.hello()
            assert twice.value.code == "TUNNEL-021"

    asyncio.run(go())


# Clones, take-over, roll-back.


def test_a_reconnect_takes_over_from_a_link_that_is_half_open(controller: RunningController) -> None:
    """The SE's machine lost power: the controller never heard the end of the older link."""

    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "takes-over")
            older = se.conn
            older._transport.pause_reading()
            se._channel = None
            answer = await se.link()
            assert not answer.quarantined
            await se.beat()
            older._transport.resume_reading()
            await asyncio.wait_for(older.wait_closed(), 3)
            assert not controller.operator.se("takes-over").alarms

    asyncio.run(go())


def test_a_reconnect_after_a_closed_link_is_admitted_at_once(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "at-once")
            took_s = []
            for _ in range(5):
                se.close()
                began = time.monotonic()
                assert not (await se.link()).quarantined
                took_s.append(time.monotonic() - began)
            # None waits for a ping's deadline; a busy machine may hold up some of them for as long.
            assert min(took_s) < tunnel.DEADLINE_S
            assert not controller.operator.se("at-once").alarms

    asyncio.run(go())


def test_a_lost_confirmation_is_no_clone(controller: RunningController) -> None:
    """The SE stored the ticket, its confirmation got lost, then power failed: it shows a ticket never confirmed."""

    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "unconfirmed")
            for _ in range(3):
                se.close()
                await se.connect()
                se.ticket = (await se.hello()).ticket
            se.close()
            answer = await se.link()
            assert not answer.quarantined
            assert "admit," in answer.reason
            assert not controller.operator.se("unconfirmed").alarms

    asyncio.run(go())


@pytest.mark.parametrize("moved_on", [True, False], ids=["older ticket", "current ticket"])
def test_a_copied_state_is_quarantined_and_the_first_one_stays_up(
    controller: RunningController, moved_on: bool
) -> None:
    name = f"copied-{moved_on}"

    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, name)
            copy = twin_of(stand, controller, se)
            if moved_on:
                # The original goes on to its next ticket; the copy stays behind with the older one.
                se.close()
                await se.link()
                await se.beat()
            answer = await copy.link()
            assert answer.quarantined
            # A quarantined link may ping, and nothing else.
            await copy.beat()
            with pytest.raises((asyncssh.ChannelListenError, asyncssh.Error)):
                await copy.conn.forward_remote_port(se.grant.address, REVERSE_PORT, "127.0.0.1", 22)
            await se.beat()
            await until_async(lambda: controller.state(name) == "UP CLONE", what="the clone alarm")
            detail = controller.operator.se(name)
            assert "quarantine" in detail.alarms[0]
            kinds = [event.kind for event in controller.operator.events()]
            assert "se.clone" in kinds
            assert any(entry.action == "se.clone" for entry in controller.operator.audit())

    asyncio.run(go())


def test_a_restored_snapshot_is_admitted_and_told(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "snapshot")
            old_ticket = se.ticket
            se.close()
            await se.link()
            current = se.ticket
            se.close()
            se.ticket = old_ticket
            answer = await se.link()
            assert not answer.quarantined
            assert "older ticket" in answer.reason
            assert "older link ticket" in " ".join(controller.operator.se("snapshot").alarms)
            # Whoever shows the ticket that was current before is the twin.
            twin = twin_of(stand, controller, se)
            twin.ticket = current
            assert (await twin.link()).quarantined

    asyncio.run(go())


# A change of an SE's own key.


def rotation(se: SimulatedSe, new: Identity, *, signed_by: Identity | None = None) -> RotateKey:
    """What asks for `new` as the SE's key; the proof is `signed_by`'s where that is another."""
    statement = tunnel.rotation_statement(se.bundle.cluster_id, se.se_id, new.public_line)
    return RotateKey(se_key=new.public_line, proof=encode_part((signed_by or new).sign(statement)))


async def refusal(se: SimulatedSe, wish: RotateKey) -> str:
    """With which code, and why, a new key is refused."""
    with pytest.raises(EnrollError) as refused:
        await se.say(tunnel.ROTATE_PATH, wish, RotateAnswer)
    return f"{refused.value.code} {refused.value.message}"


def test_an_ses_key_changes_when_asked_for_to_one_that_it_alone_has(tmp_path: Path) -> None:
    """A copy in quarantine changes it to none, and reaches no service either."""
    served = 0

    def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        served += 1
        writer.close()

    async def go() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        services = {"own": f"127.0.0.1:{server.sockets[0].getsockname()[1]}"}
        with running(tmp_path / "root", services=services) as controller:
            async with machine() as stand:
                se, other = await linked(stand, controller, "changes"), await linked(stand, controller, "beside")
                before, new = se.identity.thumbprint, Identity.create()
                assert (await refusal(se, rotation(se, new))).startswith("TUNNEL-028")
                controller.operator.rotate_se_key("changes", reason="test")
                image = Identity.from_pkcs8(controller.bundle.image_key.encode())
                wrong = {
                    "no key": (RotateKey(se_key="ssh-rsa AAAA", proof="AAAA"), "TUNNEL-029"),
                    "by the old key": (rotation(se, new, signed_by=se.identity), "TUNNEL-048"),
                    "for another SE": (rotation(other, new), "TUNNEL-048"),
                    "the image key": (rotation(se, image), "TUNNEL-049"),
                    "another SE's key": (rotation(se, other.identity), "TUNNEL-049"),
                }
                for what, (wish, code) in wrong.items():
                    assert (await refusal(se, wish)).startswith(f"{code} "), what
                copy = twin_of(stand, controller, se)
                assert (await copy.link()).quarantined
                assert not (await copy.beat()).rotate_key
                for wish in (rotation(se, new), rotation(se, se.identity), *(wish for wish, _ in wrong.values())):
                    assert (await refusal(copy, wish)).startswith("TUNNEL-025")
                with pytest.raises(asyncssh.ChannelOpenError) as refused:
                    await copy.conn.open_connection("own", tunnel.SERVICE_PORT)
                assert refused.value.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED
                assert served == 0
                assert controller.operator.se("changes").thumbprint == before
                # The SE itself does both on the link on which all that was refused.
                reader, _ = await se.conn.open_connection("own", tunnel.SERVICE_PORT)
                assert await reader.read() == b""
                assert served == 1
                await se.beat()
                assert controller.operator.se("changes").thumbprint == se.identity.thumbprint != before
        server.close()
        await server.wait_closed()

    asyncio.run(go())


# What is noticed.


def test_a_frozen_peer_is_noticed_within_its_deadline(tmp_path: Path) -> None:
    with running(tmp_path / "root", settings={"heartbeat_interval_s": 1.0}) as controller:

        async def go() -> None:
            async with machine() as stand:
                se = await linked(stand, controller, "frozen")
                await until_async(lambda: controller.state("frozen") == "UP OK", what="UP")
                # The peer stops reading and writing, and keeps the socket open: what SIGSTOP does.
                se.conn._transport.pause_reading()
                began = time.monotonic()
                await until_async(lambda: controller.state("frozen").startswith("DOWN"), what="DOWN", deadline_s=10)
                took = time.monotonic() - began
                assert took < 1.0 + 2 * tunnel.DEADLINE_S + 3.0
                assert controller.state("frozen") == "DOWN HEARTBEAT_MISSED"

        asyncio.run(go())


def test_a_quiet_but_living_peer_is_kept(tmp_path: Path) -> None:
    """Heartbeats stop, the SSH layer still answers: the link stays."""
    with running(tmp_path / "root", settings={"heartbeat_interval_s": 0.5}) as controller:

        async def go() -> None:
            async with machine() as stand:
                se = await linked(stand, controller, "quiet")
                await until_async(lambda: controller.state("quiet") == "UP OK", what="UP")
                conn = se.conn
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(conn.wait_closed(), 6)
                assert controller.state("quiet") == "UP OK"

        asyncio.run(go())


# The reverse path.


def reverse_connect(controller: RunningController, address: str) -> bytes:
    with socket.create_connection((address, controller.bound["reverse_port"]), timeout=5) as sock:
        return sock.recv(64)


def test_the_reverse_listener_leads_to_the_ses_sshd_and_nowhere_else(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "reverse")
            banner = await asyncio.to_thread(reverse_connect, controller, se.grant.address)
            assert banner.startswith(b"SSH-2.0-")
            for nowhere in (se_address(se.grant.number + 100), "127.0.0.1", "127.128.0.1"):
                assert await asyncio.to_thread(reverse_connect, controller, nowhere) == b""
            address = se.grant.address
            se.close()
            await until_async(lambda: controller.state("reverse").startswith("DOWN"), what="DOWN")
            assert await asyncio.to_thread(reverse_connect, controller, address) == b""

    asyncio.run(go())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can dial as another user")
def test_another_local_user_may_not_dial(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "other-user")
            port = controller.bound["reverse_port"]
            script = f"import socket;s=socket.create_connection(('{se.grant.address}',{port}),5);print(s.recv(64))"

            async def dial(uid: int) -> subprocess.CompletedProcess[str]:
                # setpriv needs no account: user id 65534 is nobody on every Debian.
                line = ["setpriv", f"--reuid={uid}", "--clear-groups", "/usr/bin/python3", "-c", script]
                return await asyncio.to_thread(
                    subprocess.run, line, capture_output=True, text=True, timeout=20, check=False
                )

            def turned_away() -> int:
                return refused(controller.bound["metrics_port"]).get("reverse-uid", 0)

            before = turned_away()
            assert "SSH-2.0" in (await dial(os.geteuid())).stdout
            assert turned_away() == before
            done = await dial(65534)
            assert "SSH-2.0" not in done.stdout + done.stderr
            assert "b''" in done.stdout or "reset" in done.stderr
            assert turned_away() == before + 1

    asyncio.run(go())


def test_a_wrong_sshd_behind_the_reverse_path_degrades_the_se(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "wrong-sshd")
            await se.enroll()
            se.sshd = SharedSshd()
            await se.link()
            await se.beat()
            await until_async(
                lambda: controller.state("wrong-sshd") == "DEGRADED REVERSE_DOWN", what="the reverse path is down"
            )
            assert "host key" in controller.operator.se("wrong-sshd").summary.text
            assert "reverse path" in controller.operator.why("wrong-sshd").verdict

    asyncio.run(go())


# Restarts.


def test_all_ses_come_back_after_kill_9(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:

        async def go() -> None:
            async with machine() as stand:
                ses = [await linked(stand, controller, f"back-{index}") for index in range(5)]
                controller.kill()
                controller.start()
                assert {controller.state(se.name) for se in ses} == {"DOWN CONTROLLER_RESTARTED"}
                for se in ses:
                    se.close()
                    answer = await se.link()
                    assert "admit," in answer.reason
                    await se.beat()
                await until_async(lambda: {controller.state(se.name) for se in ses} == {"UP OK"}, what="all UP again")

        asyncio.run(go())


def test_a_stop_closes_links_and_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:

        async def go() -> None:
            async with machine() as stand:
                se = await linked(stand, controller, "stopped")
                conn = se.conn
                assert await asyncio.to_thread(controller.stop) == 0
                await asyncio.wait_for(conn.wait_closed(), 3)

        asyncio.run(go())
        assert not controller.paths.controller_socket.exists()
        assert not controller.paths.controller_file.exists()


def test_two_daemons_on_one_root_are_refused(controller: RunningController) -> None:
    second = controller.command("run", check=False)
    assert second.returncode == 4
    assert str(controller.process.pid) in second.stderr


def test_a_link_that_never_says_hello_is_dropped(tmp_path: Path) -> None:
    with running(tmp_path / "root", settings={"login_timeout_s": 1.0}) as controller:

        async def go() -> None:
            async with machine() as stand:
                se = stand.se(controller.bundle, "mute")
                await se.enroll()
                conn = await se.connect()
                await asyncio.wait_for(conn.wait_closed(), 5)

        asyncio.run(go())
        until(lambda: controller.operator.status().links == 0, what="no link")
        assert refused(controller.bound["metrics_port"])["gateway-no-hello"] == 1


# Named services.


def test_a_named_service_is_reached_and_the_bytes_stay_whole(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(65536):
            writer.write(block)
            await writer.drain()
        writer.close()

    async def go() -> None:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        services = tmp_path / "services"
        with running(services, services={"echo": f"127.0.0.1:{port}", "down": "127.0.0.1:1"}) as controller:
            async with machine() as stand:
                se = await linked(stand, controller, "service")
                sent = os.urandom(3_000_000)
                reader, writer = await se.conn.open_connection("echo", tunnel.SERVICE_PORT)
                writer.write(sent)
                writer.write_eof()
                assert await reader.read() == sent
                for name in ("down", "unknown"):
                    with pytest.raises(asyncssh.ChannelOpenError):
                        await se.conn.open_connection(name, tunnel.SERVICE_PORT)
                await se.beat()
        server.close()
        await server.wait_closed()

    asyncio.run(go())


def test_the_reverse_path_keeps_every_byte_of_a_dialler_that_speaks_first(controller: RunningController) -> None:
    """The local side sends before the channel is open; nothing of it may be lost."""

    async def go() -> None:
        sent = os.urandom(2_000_000)
        received = bytearray()
        ended = asyncio.Event()

        class Sink(asyncssh.SSHTCPSession[bytes]):
            def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
                if not ended.is_set():  # the controller looks for an sshd afterwards, since this one said nothing
                    received.extend(data)

            def eof_received(self) -> bool:
                ended.set()
                return False

        async with machine() as stand:
            se = await linked(stand, controller, "speaks-first")
            await until_async(lambda: controller.state("speaks-first") == "UP OK", what="UP")
            se.sshd = SimpleNamespace(connection=Sink)
            _reader, writer = await asyncio.open_connection(se.grant.address, controller.bound["reverse_port"])
            writer.write(sent)
            writer.write_eof()
            await asyncio.wait_for(ended.wait(), 20)
            assert bytes(received) == sent
            writer.close()
            await writer.wait_closed()

    asyncio.run(go())
