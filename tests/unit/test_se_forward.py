"""The forward side and the pump: what may be listened on, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.errors import SettingsError, StorageError, TunnelError
from appliance.runtime.stop import StopToken
from appliance.se.channel_api import ByteChannel
from appliance.se.forward import Forward
from appliance.se.pump import pump


class Channel:
    """A socket in the shape of a channel, with the far end beside it."""

    def __init__(self) -> None:
        self._near, self.far = socket.socketpair()
        self.closed = False

    def settimeout(self, timeout: float | None) -> None:
        self._near.settimeout(timeout)

    def recv(self, nbytes: int) -> bytes:
        received = self._near.recv(nbytes)
        if not received and self.closed:
            raise OSError("closed")
        return received

    def sendall(self, s: bytes) -> None:
        self._near.sendall(s)

    def shutdown_write(self) -> None:
        self._near.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):
            self._near.shutdown(socket.SHUT_RDWR)
        self._near.close()


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def refused(_host: str, _port: int) -> ByteChannel:
    raise TunnelError("no link to a controller is up")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("logs", "0.0.0.0:1"),
        ("logs", "192.0.2.1:80"),
        ("logs", "localhost:80"),
        ("logs", "127.0.0.1"),
        ("logs", "[::]:80"),
        ("channel", "127.0.0.1:80"),
        ("CHANNEL", "127.0.0.1:80"),
    ],
)
def test_listeners_that_are_refused(tmp_path: Path, name: str, where: str) -> None:
    with pytest.raises(SettingsError, match=f"se.forwards.{name}"):
        Forward(tmp_path / "s", {name: where}, open_channel=refused)


def test_a_path_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="too long"):
        Forward(tmp_path / ("x" * 120), {}, open_channel=refused).run(StopToken())


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SettingsError, match="can't listen"):
            Forward(tmp_path / "s", {"logs": where}, open_channel=refused).run(StopToken())
    assert not (tmp_path / "s").exists()


def test_without_a_link_a_connection_is_closed_and_a_stop_ends_all(tmp_path: Path) -> None:
    stop, opened, threads = StopToken(), [], threading.active_count()

    def open_channel(host: str, port: int) -> ByteChannel:
        if not may.is_set():
            return refused(host, port)
        opened.append(Channel())
        return opened[-1]

    may = threading.Event()
    path = tmp_path / "s"
    path.touch()  # left behind by a kill
    forward = Forward(path, {}, open_channel=open_channel)
    thread = threading.Thread(target=forward.run, args=(stop,))
    thread.start()
    until(path.is_socket)
    until(lambda: path.stat().st_mode & 0o777 == 0o660)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        assert sock.recv(1) == b""
    may.set()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"hello")
        until(lambda: opened)
        assert opened[0].far.recv(5) == b"hello"
        stop.stop("the test ends")
        thread.join(5)
        assert sock.recv(1) == b""
    assert not path.exists()
    assert opened[0].far.recv(1) == b"", "the controller sees the end, and closes"
    opened[0].far.close()
    until(lambda: threading.active_count() == threads)


def test_nobody_else_can_connect_before_the_socket_has_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    chmod = Path.chmod

    def looking(path: Path, mode: int) -> None:
        modes.append(path.stat().st_mode & 0o777)
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", looking)
    before = os.umask(0)
    try:
        Forward(tmp_path / "s", {}, open_channel=refused)._listen_unix().close()
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o660


@pytest.fixture
def carried() -> tuple[socket.socket, Channel, threading.Thread]:
    """A local peer, a channel, and a pump between."""
    ours, theirs = socket.socketpair()
    channel = Channel()
    thread = threading.Thread(target=pump, args=(theirs, channel))
    thread.start()
    return ours, channel, thread


def test_bytes_and_half_closes_go_both_ways(carried: tuple[socket.socket, Channel, threading.Thread]) -> None:
    ours, channel, thread = carried
    content = os.urandom(300_000)
    sender = threading.Thread(target=lambda: (ours.sendall(content), ours.shutdown(socket.SHUT_WR)))
    sender.start()
    received = b""
    while chunk := channel.far.recv(65536):
        received += chunk
    assert received == content
    channel.far.sendall(b"answer after the end")
    channel.far.shutdown(socket.SHUT_WR)
    assert ours.recv(100) == b"answer after the end"
    assert ours.recv(1) == b""
    thread.join(10)
    sender.join()
    assert not thread.is_alive()
    assert channel.closed
    ours.close()
    channel.far.close()


def test_a_lost_channel_lets_the_local_peer_go(carried: tuple[socket.socket, Channel, threading.Thread]) -> None:
    ours, channel, thread = carried
    channel.close()
    assert ours.recv(1) == b""
    thread.join(10)
    assert not thread.is_alive()
    ours.close()
    channel.far.close()


def test_a_channel_that_is_gone_before_the_pump_begins_lets_the_local_peer_go() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel()
    channel.close()
    pump(theirs, channel)
    assert ours.recv(1) == b""
    ours.close()
    channel.far.close()


def test_a_local_peer_that_goes_ends_the_channel(carried: tuple[socket.socket, Channel, threading.Thread]) -> None:
    ours, channel, thread = carried
    ours.close()
    assert channel.far.recv(1) == b""
    channel.far.close()
    thread.join(10)
    assert not thread.is_alive()
