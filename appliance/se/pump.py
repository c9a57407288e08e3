"""Carries bytes both ways between a local socket and a channel of a link, two threads each, until both ways ended.

The end of one direction is passed on as a half-close, so `ssh host cat < file` works. When the channel is gone whole
(closed by the peer, or its link lost) the socket is ended too: nobody could answer it any more, and a client that waits
for ever would hold threads and descriptors for ever.
"""

from __future__ import annotations

import socket
import threading

from appliance.se.channel_api import ByteChannel
from appliance.se.wire import shut

CHUNK_BYTES = 128 * 1024
"""Read from the socket at once: four packets. It waits here while the channel takes nothing."""
TAKE_BYTES = 1024 * 1024
"""Read from the channel at once: paramiko moves all that stays behind."""
_LOOK_AGAIN_S = 1.0
"""paramiko tells nobody that a half-closed channel was closed whole; it is looked at this often."""


def pump(sock: socket.socket, channel: ByteChannel) -> None:
    """Carries until both ways ended, then closes both. Blocks; starts one thread for the other way."""
    try:
        sock.settimeout(None)
        channel.settimeout(None)
    except OSError:  # one of them ended before anything was carried
        channel.close()
        sock.close()
        return
    finished = threading.Event()
    upward = threading.Thread(target=_to_channel, args=(sock, channel, finished), name="pump up", daemon=True)
    try:
        upward.start()
    except RuntimeError:  # no thread left
        channel.close()
        sock.close()
        return
    try:
        _to_socket(sock, channel)
        while not channel.closed and not finished.wait(_LOOK_AGAIN_S):
            pass
    finally:
        shut(sock)
        upward.join()
        channel.close()
        sock.close()


def _to_socket(sock: socket.socket, channel: ByteChannel) -> None:
    try:
        while received := channel.recv(TAKE_BYTES):
            sock.sendall(received)
        sock.shutdown(socket.SHUT_WR)
    except (OSError, EOFError):
        channel.close()


def _to_channel(sock: socket.socket, channel: ByteChannel, finished: threading.Event) -> None:
    try:
        while received := sock.recv(CHUNK_BYTES):
            channel.sendall(received)
        channel.shutdown_write()
    except (OSError, EOFError):
        channel.close()
    finally:
        finished.set()
