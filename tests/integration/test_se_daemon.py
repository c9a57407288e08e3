"""The SE's daemon in tunnel mode: what it loads, whom it follows, how it comes back."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import RunningController, core_limit, leaves_core, running
from se_stand import (
    Cluster,
    EnrollDoor,
    Gateway,
    Se,
    echo,
    enroll_door,
    gateway,
    listener,
    service_engine,
    silent,
    until,
)

from appliance.protocol import tunnel as said
from appliance.protocol.enroll import REFRESH_PATH
from appliance.protocol.trust import TrustNode

NOT_IN_A_TUNNEL = (
    "asyncssh",
    "invoke",
    "joserfc",
    "pycdlib",
    "rich",
    "ssl",
    "starlette",
    "urllib3",
    "uvicorn",
    "uvloop",
)
MAX_RSS_MIB = 45.0
TELL_MODULES = """
import pathlib, runpy, signal, sys
def tell(*_):
    pathlib.Path({file!r} + ".new").write_text(" ".join(sorted(sys.modules)))
    pathlib.Path({file!r} + ".new").rename({file!r})
signal.signal(signal.SIGUSR1, tell)
runpy.run_module("appliance", run_name="__main__")
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster")


@pytest.fixture
def door(cluster: Cluster) -> Iterator[EnrollDoor]:
    with enroll_door(cluster) as found:
        cluster.enroll = [found.address]
        yield found


@pytest.fixture
def ssh(cluster: Cluster, door: EnrollDoor) -> Iterator[Gateway]:
    with gateway(cluster) as found:
        cluster.ssh = [found.address]
        yield found


def node(cluster: Cluster, ssh: Gateway) -> TrustNode:
    return TrustNode(number=ssh.node, enroll=cluster.enroll, ssh=[ssh.address], host_keys=[cluster.host_line])


def test_a_tunnel_is_small(ssh: Gateway, cluster: Cluster, tmp_path: Path) -> None:
    with service_engine(tmp_path / "se") as se:
        cluster.write_seed(se.seed, controllers=[])
        se.start().until_up()
        se.stop()
        told, script = tmp_path / "modules", tmp_path / "tell.py"
        script.write_text(TELL_MODULES.format(file=str(told)))
        se.start(str(script), *se.command[2:]).until_up()
        assert se.process is not None
        until(lambda: len(ssh.beats) > 10, what="it lives for a while")
        resident = Path(f"/proc/{se.process.pid}/status").read_text().partition("VmRSS:")[2].split()[0]
        se.process.send_signal(signal.SIGUSR1)
        until(told.exists, what="it told what it loaded")
        loaded = {name.partition(".")[0] for name in told.read_text().split()}
        assert not loaded & set(NOT_IN_A_TUNNEL)
        assert "appliance.se.first_boot" not in told.read_text().split()
        assert int(resident) / 1024 <= MAX_RSS_MIB


def test_a_moved_gateway_is_found_by_refresh(ssh: Gateway, door: EnrollDoor, cluster: Cluster, tmp_path: Path) -> None:
    """All that the SE knew of the gateway is wrong; the enroll address still holds."""
    with listener(silent) as gone:
        pass
    right, cluster.ssh = cluster.ssh, [gone.address]
    with service_engine(tmp_path / "se", settings={"refresh_after_s": 0.5}) as se:
        cluster.write_seed(se.seed, controllers=[])
        se.start().logged("asking for the grant again")
        cluster.ssh, cluster.version = right, 2
        se.until_up()
        assert REFRESH_PATH in door.asked
        until(lambda: len(ssh.beats) > 2, what="a refresh that was under way is over")
        count = len(door.asked)
        assert se.health().state == "UP"
        until(lambda: len(ssh.beats) > 5, what="it beats")
        assert len(door.asked) == count, "no refresh while a link is there"
        assert se.stop() < 3


def test_nodes_come_and_go_with_the_trust_document(ssh: Gateway, cluster: Cluster, tmp_path: Path) -> None:
    with gateway(cluster) as second, service_engine(tmp_path / "se") as se:
        second.node = 2
        cluster.write_seed(se.seed, controllers=[])
        se.start().until_up()
        ssh.new_trust = cluster.trust(version=2, nodes=[node(cluster, ssh), node(cluster, second)])
        until(lambda: second.beats, what="the new node is dialled")
        assert second.hellos[0].trust_version == 2
        assert second.hellos[0].ticket == "", "tickets are per node"
        second.new_trust = cluster.trust(version=3, nodes=[node(cluster, second)])
        se.logged("hanging up on node 1: the trust document changed")
        beats = len(second.beats)
        until(lambda: len(second.beats) > beats + 3, what="the other link goes on")
        assert [len(ssh.hellos), len(second.hellos)] == [1, 1]


def test_a_changed_host_key_hangs_up(ssh: Gateway, cluster: Cluster, tmp_path: Path) -> None:
    with service_engine(tmp_path / "se") as se:
        cluster.write_seed(se.seed, controllers=[])
        se.start().until_up()
        other = TrustNode(number=1, enroll=[], ssh=[ssh.address], host_keys=[cluster.login_line])
        ssh.new_trust = cluster.trust(version=2, nodes=[other])
        se.logged("the gateway shows host key")
        until(lambda: se.health().state == "DOWN", what="the link is down")


def test_redial_after_a_cut(ssh: Gateway, cluster: Cluster, tmp_path: Path) -> None:
    with service_engine(tmp_path / "se") as se:
        cluster.write_seed(se.seed, controllers=[])
        se.start().until_up()
        for count in range(2, 5):
            ssh.loop.call_soon_threadsafe(ssh.connections[-1].abort)
            until(lambda count=count: len(ssh.hellos) == count, what="another hello")
            beats = len(ssh.beats)
            until(lambda beats=beats: len(ssh.beats) > beats, what="the link is up")
        assert [hello.ticket for hello in ssh.hellos] == ["", "ticket-1", "ticket-2", "ticket-3"]
        assert [hello.links for hello in ssh.hellos] == [0, 1, 2, 3]


def test_the_forward_socket_leads_to_the_channel_api(ssh: Gateway, cluster: Cluster, tmp_path: Path) -> None:
    with service_engine(tmp_path / "se") as se:
        cluster.write_seed(se.seed, controllers=[])
        se.start().until_up()
        path = se.paths.forward_socket
        assert path.stat().st_mode & 0o777 == 0o660
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            body = b'{"sequence":7,"time":1.0}'
            sock.sendall(b"POST /v1/heartbeat HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            assert json.loads(answer.read())["sequence"] == 7
            answer.close()
            se.stop()
            assert sock.recv(1) == b"", "a client isn't left waiting"
        assert not path.exists()


def test_loopback_forwards_reach_named_services_only(ssh: Gateway, cluster: Cluster, tmp_path: Path) -> None:
    with listener(echo) as free:
        pass
    with service_engine(tmp_path / "se") as se:
        text = se.paths.settings_file.read_text()
        se.paths.settings_file.write_text(text.replace("[clock]", f'[se.forwards]\nlogs = "{free.address}"\n[clock]'))
        cluster.write_seed(se.seed, controllers=[])
        se.start().until_up()

        def connected() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", free.port), timeout=1):
                return True
            return False

        until(connected, what="the loopback port")
        until(lambda: "channel logs:1" in ssh.asked, what="the channel")


def test_telemetry_waits_for_a_link(ssh: Gateway, cluster: Cluster, tmp_path: Path) -> None:
    with service_engine(tmp_path / "se", settings={"telemetry_interval_s": 0.2}) as se:
        cluster.write_seed(se.seed, controllers=[])
        se.start().until_up()
        until(lambda: any(beat.telemetry for beat in ssh.beats), what="telemetry")
        ssh.admits = False
        ssh.loop.call_soon_threadsafe(ssh.connections[-1].abort)
        se.logged("refused this SE's key")
        ended = len(ssh.beats)
        until(lambda: se.log.read_text().count("refused this SE's key") > 8, what="it is offline for a while")
        ssh.admits = True
        until(lambda: any(len(beat.telemetry) > 2 for beat in ssh.beats[ended:]), what="what waited is delivered")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningController]:
    with running(tmp_path_factory.mktemp("real") / "controller", settings={"heartbeat_interval_s": 1.0}) as found:
        yield found


@contextlib.contextmanager
def enrolled(real: RunningController, root: Path) -> Iterator[Se]:
    """An SE of a real controller, up."""
    with service_engine(root) as se:
        se.seed.mkdir(parents=True)
        bundle = real.bundle
        terms = {
            "schema": 1, "cluster_id": bundle.cluster_id, "image_key_id": bundle.image_key_id, "image_id": "img",
            "baked_at": 1, "controllers": bundle.controllers,
        }  # fmt: skip
        (se.seed / "seed.json").write_text(json.dumps(terms))
        (se.seed / "root-ca.pem").write_text(bundle.root_ca)
        trust = {
            "payload": bundle.trust.payload,
            "payloadType": bundle.trust.payload_type,
            "signatures": [{"keyid": entry.keyid, "sig": entry.sig} for entry in bundle.trust.signatures],
        }
        (se.seed / "trust.json").write_text(json.dumps(trust))
        (se.seed / "image-key.pem").write_text(bundle.image_key)
        se.start().until_up()
        yield se


def test_with_the_real_controller(real: RunningController, tmp_path: Path) -> None:
    with enrolled(real, tmp_path / "se") as se:
        se_id = se.identity()["se_id"]
        until(lambda: real.operator.se(se_id).confirmed_at, what="hello is confirmed")
        assert se.stop() < 3
        until(lambda: real.state(se_id) == "DOWN CLOSED_BY_SE", what="the controller knows that the end was meant")
        se.start().until_up()
        until(lambda: not real.state(se_id).startswith("DOWN"), what="it is back")
        assert not real.operator.se(se_id).alarms, "a restart is no clone"


def test_a_real_controller_that_stands_still(real: RunningController, tmp_path: Path) -> None:
    with enrolled(real, tmp_path / "se") as se:
        begun = time.monotonic()
        real.signal(signal.SIGSTOP)
        try:
            se.logged("the controller is silent", deadline_s=10)
            assert time.monotonic() - begun <= 1.0 + 2 * said.DEADLINE_S + 3.0
        finally:
            real.signal(signal.SIGCONT)
        se.until_up()


def test_a_killed_se_comes_back_without_an_alarm(real: RunningController, tmp_path: Path) -> None:
    with enrolled(real, tmp_path / "se") as se:
        se_id = se.identity()["se_id"]
        for _ in range(3):
            assert se.process is not None
            se.process.kill()
            se.process.wait()
            se.start().until_up()
        assert not real.operator.se(se_id).alarms
        assert "QUARANTINED" not in real.state(se_id)


def test_an_se_leaves_its_keys_in_no_core_file(real: RunningController, tmp_path: Path) -> None:
    """Also after it has executed itself anew, which gives the permission back."""
    with enrolled(real, tmp_path / "se") as se:
        assert se.process is not None
        assert core_limit(se.process.pid) == (0, 0)
        assert not leaves_core(se.process)


def test_a_daemon_that_starts_over_is_not_stopping(
    ssh: Gateway, door: EnrollDoor, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd kills what said that it stops and doesn't end: after enrolling the process only replaces itself."""
    told = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(told))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(told))
        monkeypatch.setenv("WATCHDOG_USEC", "30000000")

        def heard() -> str:
            lines = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    lines.append(manager.recv(4096).decode())
            return "\n".join(lines)

        with service_engine(tmp_path / "se") as se:
            cluster.write_seed(se.seed, controllers=[])
            se.start().until_up()
            before = heard()
            assert "WATCHDOG_USEC=300000000" in before, "it gets the time that a start takes"
            assert before.count("READY=1\nWATCHDOG=1\nWATCHDOG_USEC=30000000") == 2
            assert "STOPPING=1" not in before
            se.stop()
            assert "STOPPING=1" in heard()
