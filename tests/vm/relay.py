"""Connects stdin and stdout with a port of this machine's loopback: QEMU starts one for each connection of a VM.

A VM with a restricted network reaches nothing else than what is relayed this way.
"""

from __future__ import annotations

import os
import socket
import sys
import threading

CHUNK = 65536


def _pump_in(stream: socket.socket) -> None:
    while content := os.read(0, CHUNK):
        stream.sendall(content)
    stream.shutdown(socket.SHUT_WR)


def main() -> None:
    """Relays until one side hangs up."""
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=10) as stream:
        stream.settimeout(None)
        threading.Thread(target=_pump_in, args=(stream,), daemon=True).start()
        while content := stream.recv(CHUNK):
            while content:
                content = content[os.write(1, content) :]
    os._exit(0)  # the other direction may wait for ever


main()
