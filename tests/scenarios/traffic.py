"""What a link carries while faults happen: an SE's local program that talks to a service of the controller."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from lab_rig import RealSe
from rig import free_ports, until

ECHO = "echo"
"""The service's name."""
CHUNK = bytes(range(256)) * 64


def forwarded(se: RealSe) -> int:
    """Gives an SE that isn't started a forward to the service. Returns its local port."""
    (port,) = free_ports(1)
    with se.paths.settings_file.open("a") as file:
        file.write(f'[se.forwards]\n{ECHO} = "127.0.0.1:{port}"\n')
    return port


class Traffic:
    """One local program of an SE: sends chunks through its SE's forward to an echo service, and compares."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends = threading.Event()
        self.bytes = 0
        self.corrupt = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ends.wait(0.05):
            # A fault breaks connections: that is its nature. What may never happen is another byte than was sent.
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self._port), timeout=2) as sock,
            ):
                while not self._ends.wait(0.2):
                    sock.sendall(CHUNK)
                    came = bytearray()
                    while len(came) < len(CHUNK):
                        if not (piece := sock.recv(65536)):
                            raise ConnectionResetError
                        came += piece
                    self.bytes += len(came)
                    self.corrupt += came != CHUNK

    def flows(self) -> None:
        """Waits until it gets across, and demands that nothing ever came back changed."""
        before = self.bytes
        until(lambda: self.bytes > before + len(CHUNK), what="traffic gets across")
        assert self.corrupt == 0

    def close(self) -> None:
        """Ends it."""
        self._ends.set()
        self._thread.join(10)


@contextlib.contextmanager
def echo_service() -> Iterator[int]:
    """A TCP echo service; yields its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.settimeout(60)
            while piece := sock.recv(65536):
                sock.sendall(piece)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(10)
