"""How fast a link carries bulk, each way, on loopback and on a long way; and what bulk on a slow way does to pings.

An SE's local program speaks over the SE's forward with a service of the controller; OpenSSH (`ssh -L`) does the same
in the same run. Ways are `shaper` programs: 70 ms long, or 10 Mbit/s wide and 70 ms long. Heartbeats' answer times come
from the SE's own log; OpenSSH has none, so the round trip of a small packet on another channel of its connection stands
beside them.
"""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from shaper import shaped

from appliance.lab.fleet import percentile
from appliance.lab.layout import LOOPBACK
from appliance.lab.ports import free_ports
from appliance.runtime import child
from bench import openssh
from bench.processes import BenchError, resident_bytes, until
from bench.report import Report, Row
from bench.stand import Options, Stand

LONG_RTT_S = 0.07
SLOW_MBIT_S = 10.0
WARM_S, MEASURED_S = 2.0, 5.0
LONG_WARM_S = 4.0
"""Windows grow with each round trip."""
SLOW_S = 20.0
INTERVAL_S = 0.2
"""Between heartbeats: enough of them for a percentile."""
CHUNK = bytes(256 * 1024)
_ANSWERED = re.compile(r"heartbeat \d+ answered after ([0-9.]+) ms")


class Service:
    """A controller's service: takes, gives, or echoes, as the first byte of a connection says."""

    def __init__(self) -> None:
        self._listener = socket.create_server((LOOPBACK, 0), backlog=16)
        self.port: int = self._listener.getsockname()[1]
        self.taken = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        room = bytearray(1 << 20)
        with sock, contextlib.suppress(OSError):
            wish = sock.recv(1)
            if wish == b"g":
                while True:
                    sock.sendall(CHUNK)
            while count := sock.recv_into(room):
                if wish == b"e":
                    sock.sendall(room[:count])
                else:
                    self.taken += count

    def close(self) -> None:
        """Ends it."""
        self._listener.close()


class Speed(NamedTuple):
    """MB/s."""

    to_controller: float
    to_se: float


def _rate(count: Callable[[], int], *, warm_s: float, measured_s: float) -> float:
    time.sleep(warm_s)  # the measured way warms up
    before, began = count(), time.monotonic()
    time.sleep(measured_s)
    return (count() - before) / (time.monotonic() - began) / 1e6


@contextlib.contextmanager
def _pouring(port: int) -> Iterator[None]:
    """Sends for ever to the service behind `port`."""
    with socket.create_connection((LOOPBACK, port)) as sock:
        sock.sendall(b"p")

        def pour() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock.sendall(CHUNK)

        thread = threading.Thread(target=pour, daemon=True)
        thread.start()
        try:
            yield
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextlib.contextmanager
def _drawing(port: int) -> Iterator[Callable[[], int]]:
    """Receives for ever from the service behind `port`; gives what tells how much."""
    taken = 0
    with socket.create_connection((LOOPBACK, port)) as sock:
        sock.sendall(b"g")

        def draw() -> None:
            nonlocal taken
            room = bytearray(1 << 20)
            with contextlib.suppress(OSError):
                while count := sock.recv_into(room):
                    taken += count

        thread = threading.Thread(target=draw, daemon=True)
        thread.start()
        try:
            yield lambda: taken
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            thread.join()


def _speed(service: Service, port: int, *, warm_s: float) -> Speed:
    with _pouring(port):
        up = _rate(lambda: service.taken, warm_s=warm_s, measured_s=MEASURED_S)
    with _drawing(port) as drawn:
        down = _rate(drawn, warm_s=warm_s, measured_s=MEASURED_S)
    return Speed(up, down)


def _echo_ms(port: int, seconds: float) -> list[float]:
    """Round trips of a small packet on a channel of its own."""
    found = []
    with socket.create_connection((LOOPBACK, port), timeout=60) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(b"e")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.monotonic()
            sock.sendall(bytes(256))
            received = 0
            while received < 256:
                received += len(sock.recv(256)) or 256
            found.append((time.monotonic() - began) * 1000)
            time.sleep(max(0.0, INTERVAL_S - (time.monotonic() - began)))  # the rhythm, not a wait for something
    return found


class _Under(NamedTuple):
    """A link under bulk on the slow way."""

    speed: Speed
    echo_ms: list[float]
    beats_ms: list[float]


def _under_bulk(service: Service, port: int, beats: Callable[[], list[float]]) -> _Under:
    """Each way in turn."""
    echoes: list[float] = []
    begun = len(beats())
    with _pouring(port):
        time.sleep(WARM_S)  # the way fills
        before, began = service.taken, time.monotonic()
        echoes += _echo_ms(port, SLOW_S)
        up = (service.taken - before) / (time.monotonic() - began) / 1e6
    with _drawing(port) as drawn:
        time.sleep(WARM_S)  # as above
        before, began = drawn(), time.monotonic()
        echoes += _echo_ms(port, SLOW_S)
        down = (drawn() - before) / (time.monotonic() - began) / 1e6
    return _Under(Speed(up, down), echoes, beats()[begun:])


@contextlib.contextmanager
def _ours(stand: Stand, place: Path, service: Service, way: dict[str, float]) -> Iterator[tuple[int, Path, int, int]]:
    """A link of ours over a way; gives the SE's port to the service, the SE's log, and both process ids."""
    enroll, ssh, local = free_ports(3)
    place.mkdir()
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(shaped(ssh, **way)) if way else ssh  # type: ignore[arg-type]
        controller = stack.enter_context(
            stand.controller(
                place / "controller", settings={"heartbeat_interval_s": INTERVAL_S}, ports=(enroll, ssh), seen_ssh=seen,
                services={"bulk": f"{LOOPBACK}:{service.port}"},
            )
        )  # fmt: skip
        se = stack.enter_context(
            stand.se(
                place, controller.bundle(uses=1), settings={"sshd_port": free_ports(1)[0]},
                forwards={"bulk": f"{LOOPBACK}:{local}"},
            )
        )  # fmt: skip
        yield local, se.log, se.pid, controller.pid


@contextlib.contextmanager
def _theirs(place: Path, server: openssh.Server, service: Service, way: dict[str, float]) -> Iterator[int]:
    """OpenSSH's `-L` over a way; gives its local port."""
    (local,) = free_ports(1)
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(shaped(server.port, **way)) if way else server.port  # type: ignore[arg-type]
        command = [
            "ssh", *server.arguments(port=seen), "-c", "aes128-gcm@openssh.com", "-N",
            "-L", f"{LOOPBACK}:{local}:{LOOPBACK}:{service.port}", f"{openssh.user()}@{LOOPBACK}",
        ]  # fmt: skip
        stack.enter_context(child.Daemon(command, log_path=place / f"ssh-{local}.log"))
        until(lambda: _answers(local), what="OpenSSH's forward answers", deadline_s=openssh.START_S)
        yield local


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=5) as sock:
        sock.sendall(b"e?")
        return sock.recv(1) == b"?"
    return False


def run(stand: Stand, options: Options) -> Report:
    """Three ways, both products on each, one after the other."""
    service = Service()
    ways: dict[str, dict[str, float]] = {
        "loopback": {}, "70 ms": {"rtt_s": LONG_RTT_S}, "10 Mbit/s": {"rtt_s": LONG_RTT_S, "mbit_s": SLOW_MBIT_S},
    }  # fmt: skip
    notes = [f"{stand.what}; client, service, both ends of a link and the way share the cores"]
    ours: dict[str, Speed] = {}
    theirs: dict[str, Speed] = {}
    slow: dict[str, _Under] = {}
    with stand.place() as place, contextlib.ExitStack() as stack:
        server = None
        if missing := openssh.missing(autossh=False):
            notes.append(f"no OpenSSH to compare with: apt-get install {' '.join(missing)}")
        else:
            server = stack.enter_context(openssh.server(place))
        for number, (name, way) in enumerate(ways.items()):
            warm_s = LONG_WARM_S if way else WARM_S
            stand.say(f"{name}: ours")
            with _ours(stand, place / f"way-{number}", service, way) as (port, log, se, controller):

                def beats(log: Path = log) -> list[float]:
                    return [float(ms) for ms in _ANSWERED.findall(log.read_text("utf-8", "replace"))]

                until(functools.partial(_answers, port), what="the forward answers", deadline_s=30)
                if "mbit_s" in way:
                    slow["ours"] = _under_bulk(service, port, beats)
                    ours[name] = slow["ours"].speed
                else:
                    ours[name] = _speed(service, port, warm_s=warm_s)
                mib = (resident_bytes([se]) / 2**20, resident_bytes([controller]) / 2**20)
                notes.append(f"{name}: resident afterwards, SE {mib[0]:.1f} MiB, controller {mib[1]:.1f} MiB")
                if _LOST.search(log.read_text("utf-8", "replace")):
                    raise BenchError(f"{name}: the link was lost under bulk, see {log}")
            if server is not None:
                stand.say(f"{name}: OpenSSH")
                with _theirs(place, server, service, way) as port:
                    if "mbit_s" in way:
                        slow["theirs"] = _under_bulk(service, port, list)
                        theirs[name] = slow["theirs"].speed
                    else:
                        theirs[name] = _speed(service, port, warm_s=warm_s)
    service.close()
    notes += [f"{name}: ours {_both(speed)}" + (f", OpenSSH {_both(theirs[name])}" if theirs else "")
              for name, speed in ours.items()]  # fmt: skip
    for whose, under in slow.items():
        told = f"{whose} under bulk at 10 Mbit/s and 70 ms: a small packet on another channel, "
        notes.append(
            told + f"median {percentile(under.echo_ms, 0.5):.0f} ms, p99 {percentile(under.echo_ms, 0.99):.0f} ms"
            + (f"; {len(under.beats_ms)} heartbeats, median {percentile(under.beats_ms, 0.5):.0f} ms, "
               f"most {max(under.beats_ms):.0f} ms" if under.beats_ms else "")
        )  # fmt: skip
    peer = "ssh -L" if theirs else None

    def row(
        name: str, value: float, unit: str, better: str, peer_value: float | None, goal: float | None = None
    ) -> Row:
        return Row(
            name=name, value=round(value, 1), unit=unit, goal=goal, better=better,  # type: ignore[arg-type]
            peer=peer, peer_value=None if peer_value is None else round(peer_value, 1),
        )  # fmt: skip

    loop, long = theirs.get("loopback"), theirs.get("70 ms")
    echo = percentile(slow["theirs"].echo_ms, 0.99) if "theirs" in slow else None
    return Report(
        bench="bulk",
        rows=[
            row("bulk.to_controller_mb_s", ours["loopback"].to_controller, "MB/s", "high", loop and loop.to_controller),
            row("bulk.to_se_mb_s", ours["loopback"].to_se, "MB/s", "high", loop and loop.to_se),
            row("bulk.mb_s_70ms", min(ours["70 ms"]), "MB/s", "high", min(long) if long else None),
            row("bulk.heartbeat_p99_ms_10mbit", percentile(slow["ours"].beats_ms, 0.99), "ms", "low", echo, 500),
        ],
        notes=notes,
    )


_LOST = re.compile(r"up -> idle")


def _both(speed: Speed) -> str:
    return f"{speed.to_controller:.1f} MB/s to the controller, {speed.to_se:.1f} MB/s to the SE"
