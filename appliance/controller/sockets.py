"""The controller's listening sockets: those systemd hands over (`enroll`, `ssh`, `reverse`), the others bound here."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import stat
from dataclasses import dataclass

import msgspec

from appliance.errors import SettingsError
from appliance.paths import Paths
from appliance.protocol.address import parse_endpoint
from appliance.runtime import host, systemd
from appliance.settings import Settings

_log = logging.getLogger(__name__)

LISTEN_BACKLOG = 4096


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """`run/controller.json`: what this process listens on, for who starts it with ports of 0."""

    pid: int
    enroll_port: int
    ssh_port: int
    reverse_port: int
    metrics_port: int
    socket: str
    started_at: float


@dataclass(frozen=True)
class Sockets:
    """The bound sockets."""

    enroll: socket.socket
    ssh: socket.socket
    reverse: socket.socket
    metrics: socket.socket
    operator: socket.socket

    def close(self) -> None:
        """Closes all of them."""
        for sock in (self.enroll, self.ssh, self.reverse, self.metrics, self.operator):
            sock.close()


def _bind(name: str, host_name: str, port: int, *, device: str = "") -> socket.socket:
    family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
        sock.bind((host_name, port))
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        holder = host.who_listens(port) if port else None
        held = f"; {holder.name} (process {holder.pid}) holds it" if holder and holder.pid else ""
        raise SettingsError(
            f"can't listen for {name} on {host_name}:{port}: {error.strerror}{held}",
            hint="stop the other program or choose another port; ports below 1024 need the right to bind",
        ) from None
    return sock


def _bind_operator(paths: Paths) -> socket.socket:
    path = paths.controller_socket
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # Bound with no rights at all, opened up afterwards: there is no moment at which a stranger could connect.
    before = os.umask(0o777)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise SettingsError(f"can't listen on {path}: {error}", hint="choose a root with a shorter path") from None
    finally:
        os.umask(before)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP)
    sock.listen(128)
    return sock


def open_sockets(paths: Paths, settings: Settings) -> Sockets:
    """Takes the sockets that systemd hands over and binds the others."""
    given = systemd.listen_fds()
    terms = settings.controller
    enroll = given.get("enroll") or _bind("enrollment", *parse_endpoint(terms.enroll_listen, default_port=8443))
    ssh = given.get("ssh") or _bind("SSH", *parse_endpoint(terms.ssh_listen, default_port=22))
    reverse = given.get("reverse") or _bind("the reverse path", "0.0.0.0", terms.reverse_port, device="lo")  # noqa: S104
    metrics_sock = _bind("metrics", *parse_endpoint(terms.metrics_listen, default_port=9101))
    return Sockets(enroll=enroll, ssh=ssh, reverse=reverse, metrics=metrics_sock, operator=_bind_operator(paths))


def port_of(sock: socket.socket) -> int:
    """The TCP port a socket is bound to."""
    return int(sock.getsockname()[1])


def raise_descriptor_limit() -> None:
    """Lets this process open as many files as the system allows it: each link is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        _log.warning("at most %d files may be open, the limit can't be raised: %s", soft, error)
