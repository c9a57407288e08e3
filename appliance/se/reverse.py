"""The reverse path's end on the SE: connections that come over a link are carried to this SE's own sshd.

One thread per link takes what comes, two per connection carry it; above the cap a connection is closed at once. Where a
connection goes to is this SE's setting alone, the controller can't choose.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable

from appliance.protocol.address import format_endpoint
from appliance.runtime import log
from appliance.se.channel_api import ByteChannel
from appliance.se.pump import pump

MAX_CONNECTIONS = 32
CONNECT_TIMEOUT_S = 5.0


class ReversePath:
    """Serves one link.

    Args:
        host: of this SE's sshd.
        port: of this SE's sshd.
        tell: called with "" when sshd took a connection, with what is wrong when it didn't.
    """

    def __init__(self, host: str, port: int, *, tell: Callable[[str], None]) -> None:
        self._log = log.bind("tunnel")
        self._target = (host, port)
        self._tell = tell
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.accepted: queue.SimpleQueue[ByteChannel | None] = queue.SimpleQueue()
        """Where the link puts channels."""
        self._thread = threading.Thread(target=self._take, name="reverse path", daemon=True)

    def start(self) -> None:
        """Begins to take channels."""
        self._thread.start()

    def stop(self) -> None:
        """Takes no more; what is open ends with its link."""
        self.accepted.put(None)
        self._thread.join()

    def _take(self) -> None:
        while (channel := self.accepted.get()) is not None:
            if self._free.acquire(blocking=False):
                try:
                    threading.Thread(target=self._serve, args=(channel,), name="reverse", daemon=True).start()
                except RuntimeError as error:
                    self._free.release()
                    self._log.warning("reverse path: %s, one connection was closed", error)
                else:
                    continue
            else:
                self._log.warning("reverse path: %d connections are open, one more was closed", MAX_CONNECTIONS)
            with contextlib.suppress(OSError, EOFError):
                channel.close()

    def _serve(self, channel: ByteChannel) -> None:
        try:
            try:
                sock = socket.create_connection(self._target, timeout=CONNECT_TIMEOUT_S)
            except OSError as error:
                why = "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
                where = format_endpoint(*self._target)
                self._log.warning("reverse path: no sshd at %s: %s", where, why)
                self._tell(f"no sshd at {where}: {why}")
                channel.close()
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._tell("")
            pump(sock, channel)
        finally:
            self._free.release()
