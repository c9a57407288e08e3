"""Who is at the other end: named only for a live socket of a process, or nobody is."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.runtime import peer

Find = Callable[[peer.Endpoint, peer.Endpoint], int | None]
BY_NETLINK = pytest.param(peer.tcp_peer_uid, id="netlink")
BY_PROC = pytest.param(peer._search_proc, id="proc")

_OTHER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


@pytest.mark.parametrize("find", [BY_NETLINK, BY_PROC])
def test_a_connection_of_ours_is_ours(find: Find, listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with server:
            assert find(server.getsockname(), server.getpeername()) == os.geteuid()
            assert find(client.getsockname(), client.getpeername()) == os.geteuid()


@needs_root
@pytest.mark.parametrize("find", [BY_NETLINK, BY_PROC])
def test_another_user_is_told_by_number(find: Find, listener: socket.socket) -> None:
    os.seteuid(_OTHER)
    try:
        client = socket.create_connection(listener.getsockname())
    finally:
        os.seteuid(0)
    server, _ = listener.accept()
    with client, server:
        assert find(server.getsockname(), server.getpeername()) == _OTHER


@pytest.mark.parametrize("find", [BY_NETLINK, BY_PROC])
def test_who_sends_and_closes_at_once_does_not_pass_for_root(find: Find, listener: socket.socket) -> None:
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    with server:
        client.sendall(b"whoami\n")
        client.close()
        assert find(server.getsockname(), server.getpeername()) is None


@pytest.mark.parametrize("find", [BY_NETLINK, BY_PROC])
def test_who_closed_one_direction_is_still_somebody(find: Find, listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with server:
            client.shutdown(socket.SHUT_WR)
            assert server.recv(1) == b""
            assert find(server.getsockname(), server.getpeername()) == os.getuid()


@pytest.mark.parametrize("find", [BY_NETLINK, BY_PROC])
def test_a_connection_that_nobody_accepted_is_nobody_s(find: Find, listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()) as client:
        assert find(client.getsockname(), client.getpeername()) is None
        server, _ = listener.accept()
        server.close()


@pytest.mark.parametrize("find", [BY_NETLINK, BY_PROC])
def test_what_does_not_exist_is_nobody(find: Find, listener: socket.socket) -> None:
    assert find(("127.0.0.1", 1), ("127.0.0.1", 2)) is None
    # The kernel would answer with the listener on that port.
    assert find(("127.0.0.1", 1), listener.getsockname()) is None


def test_without_netlink_the_table_is_read(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_NETLINK_SOCK_DIAG", 31)  # no such protocol
    with socket.create_connection(listener.getsockname()):
        server, _ = listener.accept()
        with server:
            assert peer.tcp_peer_uid(server.getsockname(), server.getpeername()) == os.geteuid()


def test_a_kernel_that_refuses_the_query_leads_to_the_table(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "_SOCK_DIAG_BY_FAMILY", 99)  # no such query
    with socket.create_connection(listener.getsockname()):
        server, _ = listener.accept()
        with server:
            with pytest.raises(OSError, match="sock_diag refused"):
                peer._ask_netlink(("127.0.0.1", 1), ("127.0.0.1", 2))
            assert peer.tcp_peer_uid(server.getsockname(), server.getpeername()) == os.geteuid()


def test_without_either_nobody_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peer, "_NETLINK_SOCK_DIAG", 31)
    monkeypatch.setattr(peer, "_PROC_NET_TCP", tmp_path / "none")
    assert peer.tcp_peer_uid(("127.0.0.1", 1), ("127.0.0.1", 2)) is None


def test_a_unix_peer_is_a_process() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert peer.unix_peer(ours) == (os.getpid(), os.geteuid(), os.getegid())
