"""Who is at the other end of a local connection: the user that owns a loopback TCP peer, or a unix socket's peer.

The reverse listener lets only some local users connect to an SE, and TCP has no peer credentials. The kernel knows the
owner of each socket, though, so we ask for exactly the one whose local end is our remote end (sock_diag(7); where
netlink is shut, /proc/net/tcp).

A user is reported only for a socket that is connected *and* belongs to a process (inode not 0); one direction may be
closed already, as a client that says all it has to say does. The kernel reports user 0 for a socket whose process has
closed it, so anybody could pass for root by sending a line and closing at once.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from pathlib import Path

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_CONNECTED = frozenset({1, 4, 5, 8})
"""TCP_ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT: a process may hold such a socket."""
_HEADER = struct.Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence, port."""
_QUERY = struct.Struct("=BBBxI")
"""inet_diag_req_v2 up to its socket id: family, protocol, extensions, states."""
_ID = struct.Struct("!HH4s12x4s12xI8s")
"""inet_diag_sockid for IPv4: ports, addresses, interface, cookie (all ones: any)."""
_ANSWER = struct.Struct("=BBBB48xIIIII")
"""inet_diag_msg: family, state, timer, retransmits, id, expires, rqueue, wqueue, uid, inode."""

_PROC_NET_TCP = Path("/proc/net/tcp")
Endpoint = tuple[str, int]


def tcp_peer_uid(local: Endpoint, remote: Endpoint) -> int | None:
    """Returns the uid that owns the other end of an IPv4 loopback connection.

    Args:
        local: our end, `getsockname()` of the accepted socket.
        remote: the other end, `getpeername()`.

    Returns:
        None where nobody can be named: the other end isn't on this host, has closed, or is of another network
        namespace. None means no.
    """
    try:
        answer = _ask_netlink(local, remote)
    except OSError:
        return _search_proc(local, remote)
    return None if answer is None else _judge(answer, local, remote)


def unix_peer(connection: socket.socket) -> tuple[int, int, int]:
    """Returns (pid, uid, gid) of whoever made this unix connection (SO_PEERCRED; as of connect time)."""
    pid, uid, gid = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


def _socket_id(local: Endpoint, remote: Endpoint) -> bytes:
    """The id of the *other* socket: its source is our remote end."""
    source, destination = ipaddress.IPv4Address(remote[0]), ipaddress.IPv4Address(local[0])
    return _ID.pack(remote[1], local[1], source.packed, destination.packed, 0, b"\xff" * 8)


def _ask_netlink(local: Endpoint, remote: Endpoint) -> bytes | None:
    """Returns the kernel's inet_diag_msg, or None where it knows no such socket. Raises `OSError` without netlink."""
    query = _QUERY.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + _socket_id(local, remote)
    header = _HEADER.pack(_HEADER.size + len(query), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as channel:
        channel.settimeout(1.0)
        channel.sendto(header + query, (0, 0))
        message = channel.recv(4096)
    _, kind, *_ = _HEADER.unpack_from(message)
    if kind == _NLMSG_ERROR:
        (negative,) = struct.unpack_from("=i", message, _HEADER.size)
        if negative == -2:  # ENOENT
            return None
        raise OSError(-negative, "sock_diag refused")
    return message[_HEADER.size :]


def _judge(answer: bytes, local: Endpoint, remote: Endpoint) -> int | None:
    _, state, _, _, _, _, _, uid, inode = _ANSWER.unpack_from(answer)
    # Where the exact socket is gone the kernel falls back to a listener on that port: compare ports and addresses.
    wanted = _socket_id(local, remote)
    if state not in _CONNECTED or inode == 0 or answer[4:40] != wanted[:36]:
        return None
    return int(uid)


def _search_proc(local: Endpoint, remote: Endpoint) -> int | None:
    wanted = (_proc_endpoint(remote), _proc_endpoint(local))
    try:
        with _PROC_NET_TCP.open() as table:
            for line in table:
                columns = line.split()
                if (columns[1], columns[2]) == wanted:
                    is_live = int(columns[3], 16) in _CONNECTED and columns[9] != "0"
                    return int(columns[7]) if is_live else None
    except OSError:
        return None
    return None


def _proc_endpoint(endpoint: Endpoint) -> str:
    """As /proc/net/tcp writes it: the address as a native 32-bit number in hex, the port in hex."""
    (address,) = struct.unpack("=I", ipaddress.IPv4Address(endpoint[0]).packed)
    return f"{address:08X}:{endpoint[1]:04X}"
