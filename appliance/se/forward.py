"""The forward side on the SE: local connections become channels to named controller services.

    run/channel.sock (0660)     the channel API
    `se.forwards`, loopback     the named service; never the channel API, since any local user may connect there

A connection takes the first link that is up; without one it is closed at once, which clients know how to retry.
"""

from __future__ import annotations

import ipaddress
import os
import selectors
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from appliance.errors import ApplianceError, SettingsError, StorageError
from appliance.protocol.address import parse_endpoint
from appliance.protocol.tunnel import CHANNEL_HOST, CHANNEL_PORT, SERVICE_PORT
from appliance.runtime import log
from appliance.runtime.stop import StopToken
from appliance.se.channel_api import ByteChannel
from appliance.se.pump import pump
from appliance.se.wire import shut

MAX_CONNECTIONS = 32
_PAUSE_S = 0.1
"""After a connection that can't be taken: it waits, and would be offered again at once."""
_BACKLOG = 16
_MAX_PATH_BYTES = 107
"""sockaddr_un holds no longer path (unix(7))."""

Opener = Callable[[str, int], ByteChannel]


class Forward:
    """The service. `run` serves until stopped.

    Args:
        path: of the unix socket.
        listeners: service name to `127.0.0.1:port`.
        open_channel: opens a channel to `host`, `port` over a link that is up; raises `ApplianceError`.

    Raises:
        SettingsError: a listener that isn't on the loopback, or leads to the channel API.
    """

    def __init__(self, path: Path, listeners: Mapping[str, str], *, open_channel: Opener) -> None:
        self._log = log.bind("tunnel")
        self._path = path
        self._open_channel = open_channel
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._loopback = {name: _loopback(name, where) for name, where in listeners.items()}

    def run(self, stop: StopToken) -> None:
        """Listens and carries until stopped.

        Raises:
            StorageError: the socket can't be made.
            SettingsError: a loopback port is taken.
        """
        wake, woken = socket.socketpair()
        with wake, woken, selectors.DefaultSelector() as selector:
            withdraw = stop.on_stop(lambda: shut(wake))
            selector.register(woken, selectors.EVENT_READ, None)
            listening: list[socket.socket] = []
            try:
                self._listen(listening, selector)
                while not stop.stopped:
                    for key, _ in selector.select():
                        if key.data is not None and isinstance(key.fileobj, socket.socket):
                            try:
                                self._take(key.fileobj, *key.data)
                            except (OSError, RuntimeError) as error:  # no descriptor or no thread left
                                self._log.warning("forward: a connection can't be taken: %s", error)
                                stop.wait(_PAUSE_S)
            finally:
                withdraw()
                for sock in listening:
                    sock.close()
                self._path.unlink(missing_ok=True)
                with self._lock:
                    for connection in self._connections:
                        shut(connection)

    def _listen(self, listening: list[socket.socket], selector: selectors.BaseSelector) -> None:
        listening.append(self._listen_unix())
        selector.register(listening[-1], selectors.EVENT_READ, (CHANNEL_HOST, CHANNEL_PORT))
        for name, (host, port) in self._loopback.items():
            sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
            listening.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((host, port))
            except OSError as error:
                raise SettingsError(f"se.forwards.{name}: can't listen on {host}:{port}: {error.strerror}") from None
            sock.listen(_BACKLOG)
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, (name, SERVICE_PORT))

    def _listen_unix(self) -> socket.socket:
        if len(str(self._path).encode()) > _MAX_PATH_BYTES:
            raise StorageError(
                f"the path {self._path} is too long for a socket, at most {_MAX_PATH_BYTES} bytes",
                hint="use a shorter --root",
            )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.unlink(missing_ok=True)  # left behind by a kill; the root lock says that nobody serves it
            # Linux gives the file the mode of the unbound socket: there is no moment at which a stranger could connect.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(str(self._path))
            self._path.chmod(0o660)
        except OSError as error:
            sock.close()
            raise StorageError(f"can't make the socket {self._path}: {error.strerror}") from None
        sock.listen(_BACKLOG)
        sock.setblocking(False)
        return sock

    def _take(self, listener: socket.socket, host: str, port: int) -> None:
        sock, _ = listener.accept()
        if not self._free.acquire(blocking=False):
            self._log.warning("forward: %d connections are open, one more was closed", MAX_CONNECTIONS)
            sock.close()
            return
        with self._lock:
            self._connections.add(sock)
        try:
            threading.Thread(target=self._serve, args=(sock, host, port), name=f"forward {host}", daemon=True).start()
        except RuntimeError:
            self._let_go(sock)
            raise

    def _serve(self, sock: socket.socket, host: str, port: int) -> None:
        try:
            pump(sock, self._open_channel(host, port))
        except ApplianceError as error:
            self._log.warning("forward: %s", error.message)
        finally:
            self._let_go(sock)

    def _let_go(self, sock: socket.socket) -> None:
        with self._lock:
            self._connections.discard(sock)
        sock.close()
        self._free.release()


def _loopback(name: str, where: str) -> tuple[str, int]:
    host, port = parse_endpoint(where, default_port=0)
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback or not port:
        raise SettingsError(
            f"se.forwards.{name}: {where!r} is no loopback address with a port, 127.0.0.1:PORT expected"
        )
    if name.lower() == CHANNEL_HOST:
        raise SettingsError(
            f"se.forwards.{name}: a loopback port must not lead to the channel API",
            hint="any local user could speak in this SE's name; use the socket channel.sock",
        )
    return host, port
