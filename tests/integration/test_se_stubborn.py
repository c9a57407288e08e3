"""Controllers that break the protocol, or keep to it at an unlucky moment: no link's thread is lost over it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path
from typing import Any

import asyncssh
import pytest
import se_stand
import test_se_daemon
import test_se_link
from asyncssh.packet import String, UInt32
from se_stand import Cluster, EnrollDoor, Gateway, gateway, listener, service_engine, until
from test_se_link import Stand

from appliance.pki import ssh_keys
from appliance.protocol import tunnel as said
from appliance.protocol.trust import TrustNode
from appliance.protocol.tunnel import LinkState
from appliance.se import channel_api
from appliance.se import ssh as se_ssh

cluster, door, ssh, stand = test_se_daemon.cluster, test_se_daemon.door, test_se_daemon.ssh, test_se_link.stand

REKEY_BYTES = 8 << 20


def drip(ssh: Gateway) -> None:
    """From now on the newest connection sends SSH_MSG_IGNORE twice a second: it lives."""
    connection = ssh.connections[-1]

    def again() -> None:
        if connection._transport is not None:
            connection.send_packet(2, String(b"x"))
            ssh.loop.call_later(0.5, again)

    ssh.loop.call_soon_threadsafe(again)


class _Bulk(asyncssh.SSHTCPSession[bytes]):
    def __init__(self, loop: Any) -> None:
        self._loop, self._on = loop, True

    def connection_made(self, chan: Any) -> None:
        self._chan = chan
        self._loop.call_soon(self._go)

    def _go(self) -> None:
        if self._on and not self._chan.is_closing():
            self._chan.write(bytes(1 << 18))
            self._loop.call_soon(self._go)

    def pause_writing(self) -> None:
        self._on = False

    def resume_writing(self) -> None:
        self._on = True
        self._go()

    def connection_lost(self, exc: Exception | None) -> None:
        self._on = False


class _Short(asyncssh.SSHTCPSession[bytes]):
    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def connection_made(self, chan: Any) -> None:
        self._loop.call_later(0.02, lambda: (chan.write(b"x"), chan.close()))


def test_channels_that_end_while_the_se_wants_new_keys_cost_no_link(
    ssh: Gateway, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the link must not wait, to answer a channel's end, for the keys that only he can read."""
    monkeypatch.setattr(se_ssh._Packets, "REKEY_BYTES", REKEY_BYTES, raising=False)
    monkeypatch.setattr(se_ssh, "_MOST_SEEN", 20)
    as_ever = se_stand._Peer.connection_requested

    def requested(peer: Any, host: str, port: int, *origin: Any) -> Any:
        kinds = {"bulk": _Bulk, "short": _Short}
        if host not in kinds:
            return as_ever(peer, host, port, *origin)
        return peer._conn.create_tcp_channel(), kinds[host](ssh.loop)

    monkeypatch.setattr(se_stand._Peer, "connection_requested", requested)
    link = stand.up(ssh.address)
    bulk, over, ended = link.open_channel("bulk", 1), threading.Event(), []
    taken = [0]

    def read() -> None:
        while not over.is_set():
            taken[0] += len(bulk.recv(1 << 20))

    def come_and_go() -> None:
        while not over.is_set():
            channel = link.open_channel("short", 1)
            while channel.recv(100):
                pass
            channel.close()
            ended.append(1)

    threads = [threading.Thread(target=target) for target in (read, *[come_and_go] * 6)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: taken[0] > 40 * REKEY_BYTES and len(ended) > 100, what="forty changes of keys")
        assert link.state is LinkState.UP
        assert len(ssh.connections) == 1
        assert link._connection is not None
        assert len(link._connection._transport.channels_seen) == 20, "of many"
    finally:
        over.set()
        for thread in threads:
            thread.join(10)
        bulk.close()


def test_a_controller_that_leaves_no_room_for_heartbeats_is_given_up(
    ssh: Gateway, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_api, "_ROOM_S", 1.0)
    link = stand.up(ssh.address)

    def starve() -> None:
        for channel in ssh.connections[0]._channels.values():
            channel._init_recv_window = 0  # never less than half of it: no room is ever given again

    ssh.loop.call_soon_threadsafe(starve)
    assert link._connection is not None
    for channel in link._connection._transport._channels.values():
        channel.out_window_size = 1000
    drip(ssh)
    assert stand.lost().code == "TUNNEL-050"


def test_a_controller_that_never_opens_a_channel_again_is_given_up(
    ssh: Gateway, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(se_ssh, "_OPEN_S", 1.0)
    stand.up(ssh.address)

    async def never() -> None:
        await asyncio.sleep(3)

    monkeypatch.setattr(se_stand._Peer, "connection_requested", lambda *_: never())
    drip(ssh)
    ssh.answers[said.HEARTBEAT_PATH] = lambda _body, channel: channel.close()
    assert stand.lost().code == "TUNNEL-035"


def test_new_keys_that_never_come_are_told(ssh: Gateway, stand: Stand) -> None:
    link = stand.up(ssh.address)
    assert link._connection is not None
    link._connection._transport.clear_to_send_timeout = 1.0

    def begin() -> None:
        connection = ssh.connections[0]
        connection._send_kexinit()
        connection.data_received = lambda *_: None

    ssh.loop.call_soon_threadsafe(begin)
    drip(ssh)
    assert stand.lost().code == "TUNNEL-050"


@pytest.mark.parametrize("kind", [94, 95])
def test_what_nobody_reads_takes_no_more_memory_than_was_granted(ssh: Gateway, stand: Stand, kind: int) -> None:
    link = stand.up(ssh.address)
    channel: Any = link.open_channel("service", 1)
    far = list(ssh.connections[0]._channels.values())[-1]
    head, content = ((UInt32(1),) if kind == 95 else ()), String(bytes(32000))
    sent = [0]

    def flood() -> None:
        for _ in range(8):
            if far._conn is None or far._conn._transport is None:
                return
            far.send_packet(kind, *head, content)
            sent[0] += 32000
        if sent[0] < 200_000_000:
            ssh.loop.call_later(0.001, flood)

    ssh.loop.call_soon_threadsafe(flood)
    until(lambda: stand.error or sent[0] >= 200_000_000, what="it is over")
    inner = channel._channel
    assert len(inner.in_buffer) + len(inner.in_stderr_buffer) < 135 << 20
    if kind == 94:
        assert "more than it may" in stand.lost().message


def test_a_connection_cut_between_a_session_and_a_request_on_it(
    ssh: Gateway, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link's thread is late by a moment, and waits for nobody."""
    granted = [0]

    class Cut(se_stand._Session):
        def connection_made(self, chan: Any) -> None:
            granted[0] += 1
            if granted[0] > 1:
                ssh.loop.call_later(0.1, ssh.connections[-1].abort)

    in_time = se_ssh._Transport.open_session

    def late(transport: Any) -> Any:
        channel = in_time(transport)
        time.sleep(0.3)
        return channel

    monkeypatch.setattr(se_stand._Peer, "session_requested", lambda _peer: Cut(set()))
    monkeypatch.setattr(se_ssh._Transport, "open_session", late)
    stand.dial(ssh.address)
    assert stand.lost(within_s=5).code == "TUNNEL-035"


def test_whoever_gives_slots_for_ever_keeps_no_se_from_another_address(
    ssh: Gateway, cluster: Cluster, tmp_path: Path
) -> None:
    def park(sock: socket.socket) -> None:
        sock.sendall(said.slot_line(0.0))

    with listener(park) as parker, service_engine(tmp_path / "se") as se:
        cluster.ssh = [parker.address, ssh.address]
        cluster.write_seed(se.seed, controllers=[])
        se.start().until_up()
        assert len(parker.accepted) < 20


def test_a_host_key_that_was_announced_is_good_for_the_next_link(
    ssh: Gateway, cluster: Cluster, tmp_path: Path
) -> None:
    """The announcement came over a link that went on; there was no later document, and no refresh."""
    key, line = ssh_keys.generate()
    with gateway(cluster, host_key=key.reveal()) as second, service_engine(tmp_path / "se") as se:
        cluster.ssh = [ssh.address, second.address]
        cluster.write_seed(se.seed, controllers=[])
        se.start().until_up()
        both = TrustNode(number=1, enroll=[], ssh=cluster.ssh, host_keys=[cluster.host_line, line])
        ssh.new_trust = cluster.trust(version=2, nodes=[both])
        until(lambda: ssh.beats[-1].trust_version == 2, what="the SE has seen both")

        async def end() -> None:
            ssh.acceptor.close()
            ssh.connections[-1].abort()

        ssh.run(end())
        until(lambda: second.hellos, what="the successor is believed", deadline_s=10)


def test_a_name_that_is_none_is_passed_over(ssh: Gateway, door: EnrollDoor, cluster: Cluster, tmp_path: Path) -> None:
    address, cluster.enroll = door.address, []
    with service_engine(tmp_path / "se") as se:
        cluster.write_seed(se.seed, controllers=["controller..example:8443", address])
        se.start().until_up()
