"""13: peers that hang on: one that takes bytes and never reads ours, a certificate and a name that change meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_rig import NOTICE_S, SLACK_S, Cable, site
from rig import free_ports, until
from rough import controller_pid, judged, resident_bytes

from appliance.protocol.why import Step

MIB = 1 << 20


@contextlib.contextmanager
def fire_hose() -> Iterator[int]:
    """A TCP service that sends for ever to whoever connects; yields its port."""
    server = socket.create_server(("127.0.0.1", 0))
    ends = threading.Event()
    accepted: list[socket.socket] = []

    def pour(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not ends.is_set():
                sock.sendall(bytes(65536))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = server.accept()
                accepted.append(sock)
                threading.Thread(target=pour, args=(sock,), daemon=True).start()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        ends.set()
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)
        for sock in accepted:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def test_an_se_that_speaks_ssh_and_stops_reading(tmp_path: Path) -> None:
    """Bulk runs towards it, and from one moment on nothing is read: the controller's memory stays."""
    with fire_hose() as hose, site(tmp_path, services={"hose": f"127.0.0.1:{hose}"}) as at:
        (local,) = free_ports(1)
        se = at.se("se-1")
        with se.paths.settings_file.open("a") as settings:
            settings.write(f'[se.forwards]\nhose = "127.0.0.1:{local}"\n')
        se.start()
        at.until_up(se)
        with judged(at, se, back_s=10.0):
            with socket.create_connection(("127.0.0.1", local), timeout=10) as bulk:
                came = 0
                while came < 4 * MIB:
                    came += len(bulk.recv(65536))
                before = resident_bytes(controller_pid(at))
                at.ssh.cut(up=False)  # what the SE sends gets through, what it should read doesn't
                # The SE hears nothing either, gives up, and that gets across.
                at.until_state(se, "DOWN LINK_LOST", deadline_s=NOTICE_S + 2 * SLACK_S)
                assert at.controller.operator.why("se-1").verdict.startswith("stopped at link: the connection broke")
                assert resident_bytes(controller_pid(at)) - before < 32 * MIB
                until(lambda: "silent" in se.failed(Step.LINK), what="the SE says why", deadline_s=NOTICE_S + SLACK_S)
            at.ssh.mend()


@pytest.mark.slow
def test_a_certificate_that_is_renewed_under_live_links(tmp_path: Path) -> None:
    """The node's certificate is issued anew and loaded: no link notices, and the next enrollment shows the new one."""
    with site(tmp_path) as at:
        se = at.se("se-1").start()
        at.until_up(se)
        links = se.logged().count("linked -> up")
        state = at.controller.paths.controller_state
        with judged(at, se, back_s=5.0):
            old = (state / "node.pem").read_bytes()
            # A pair that doesn't fit together is what a power cut during a renewal leaves; it is issued anew.
            (state / "node.pem").unlink()
            at.controller.signal(signal.SIGHUP)
            until(
                lambda: (state / "node.pem").exists() and (state / "node.pem").read_bytes() != old,
                what="the certificate is renewed",
            )
            until(lambda: "renewed" in at.controller.log.read_text(), what="it is told")
        assert se.logged().count("linked -> up") == links
        late = at.se("se-2").start()
        at.until_up(late)


needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="another /etc/hosts for one process needs root")


@needs_mounts
@pytest.mark.slow
def test_a_controller_whose_name_moves_to_another_address(tmp_path: Path) -> None:
    """The SE knows a name, and asks for its address at each dial: no restart, no refresh, nothing to configure."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost controller.test\n")
    with site(tmp_path / "site", told="controller.test") as at:
        se = at.se("se-1", prefix=named(hosts)).start()
        at.until_up(se)
        assert f"controller.test:{at.ssh.port}" in se.logged()
        with judged(at, se, back_s=15.0):
            moved = Cable("127.0.0.77", at.ssh.port)
            try:
                moved.target = at.controller.ssh_port
                at.ssh.unplug()
                at.until_state(se, "DOWN LINK_LOST", deadline_s=5.0)
                until(lambda: "Connection refused" in se.failed(Step.LINK), what="the SE says why")
                hosts.write_text("127.0.0.1 localhost\n127.0.0.77 controller.test\n")
                at.until_up(se, deadline_s=10.0)
                assert moved.flows == 1
                hosts.write_text("127.0.0.1 localhost\n")
                moved.reset()
                until(lambda: "can't be resolved" in se.failed(Step.LINK), what="the SE says that the name is gone")
                hosts.write_text("127.0.0.1 localhost controller.test\n")
                at.ssh.plug()
                at.until_up(se, deadline_s=10.0)
            finally:
                moved.close()


def named(hosts: Path) -> list[str]:
    """Returns what gives a command `hosts` in the place of /etc/hosts."""
    return ["unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh"]
