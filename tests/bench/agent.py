"""What an idle SE costs its machine and its line: memory, processor, bytes; beside autossh and node_exporter.

An SE is both to its machine: the tunnel that autossh keeps up, and the host's figures that node_exporter serves.
"""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from appliance.lab.layout import LOOPBACK, LabStatus
from appliance.lab.ports import free_ports
from appliance.runtime import child
from bench import openssh
from bench.processes import BenchError, Traffic, children, cpu_s, resident_bytes, traffic_to, until
from bench.report import Report, Row
from bench.stand import Options, Stand

MIB = 1 << 20
SCRAPE_S = 10.0
_EXPORTERS = ("prometheus-node-exporter", "node_exporter")


class _Subject(NamedTuple):
    """Whom one watches: its processes at any moment, and the port its link goes to (0: none)."""

    name: str
    pids: Callable[[], list[int]]
    port: int
    told_bytes: Callable[[], int] = lambda: 0
    """What it told a scraper so far; that counts as its line's load where it has no link."""


class _Figures(NamedTuple):
    rss_bytes: int
    cpu_pct: float
    traffic: Traffic | None
    seconds: float
    told_bytes: int = 0

    @property
    def kbit_s(self) -> float:
        line_bytes = self.traffic.wire_bytes if self.traffic else self.told_bytes
        return line_bytes * 8 / 1000 / self.seconds


def run(stand: Stand, options: Options) -> Report:
    """Settles, then watches all of them over the same time."""
    notes = [f"{stand.what}; {options.seconds:.0f} s watched after {options.settle_s:.0f} s of idleness"]
    with stand.place() as place, stand.lab(place) as lab, contextlib.ExitStack() as stack:
        pid = lab.ses[0].pid
        subjects = [_Subject("agent", lambda: [pid, *children(pid)], _ssh_port(lab))]
        if missing := openssh.missing():
            notes.append(f"no autossh to compare with: apt-get install {' '.join(missing)}")
        else:
            server = stack.enter_context(openssh.server(place))
            link = stack.enter_context(openssh.reverse(server, lab.ses[0].sshd_port))
            subjects.append(_Subject("autossh", lambda: [link.autossh, *link.ssh], server.port))
        exporter = next((name for name in _EXPORTERS if child.find_program(name)), None)
        scrape: Callable[[], None] | None = None
        if exporter is None:
            notes.append("no node_exporter to compare with: apt-get install prometheus-node-exporter")
        else:
            node_exporter = stack.enter_context(_node_exporter(exporter, place))
            scrape = node_exporter.scrape
            subjects.append(_Subject("node_exporter", lambda: [node_exporter.pid], 0, lambda: node_exporter.told_bytes))
        stand.say(f"idle for {options.settle_s:.0f} s")
        _wait(options.settle_s, scrape)
        stand.say(f"watching for {options.seconds:.0f} s")
        found = _watch(subjects, options.seconds, scrape)
    return _report(found, notes)


def _report(found: dict[str, _Figures], notes: list[str]) -> Report:
    ours, autossh, exporter = found["agent"], found.get("autossh"), found.get("node_exporter")
    peers = {name: figures for name, figures in found.items() if name != "agent"}
    both = " + ".join(peers) or None
    notes += [
        f"{name}: {figures.rss_bytes / MIB:.1f} MiB resident, {figures.cpu_pct:.2f} % of a core"
        + (
            f", {figures.traffic.payload_bytes} bytes of payload in {figures.traffic.segments} segments"
            if figures.traffic
            else ""
        )
        for name, figures in found.items()
    ]
    if autossh is not None and exporter is not None:
        told = f"{exporter.told_bytes} bytes of figures told by node_exporter, without headers"
        notes.append(f"an SE does the work of both peers, so their sum stands beside it; {told}")
    return Report(
        bench="agent",
        rows=[
            Row(
                name="agent.rss_mb", value=round(ours.rss_bytes / MIB, 1), unit="MiB", goal=45, better="low", peer=both,
                peer_value=round(sum(each.rss_bytes for each in peers.values()) / MIB, 1) if peers else None,
            ),
            Row(
                name="agent.cpu_pct", value=round(ours.cpu_pct, 3), unit="% of a core", goal=0.5, better="low",
                peer=both, peer_value=round(sum(each.cpu_pct for each in peers.values()), 3) if peers else None,
            ),
            Row(
                name="agent.kbit_s", value=round(ours.kbit_s, 3), unit="kbit/s", goal=3, better="low", peer=both,
                peer_value=round(sum(each.kbit_s for each in peers.values()), 3) if peers else None,
            ),
        ],
        notes=notes,
    )  # fmt: skip


def _ssh_port(lab: LabStatus) -> int:
    return lab.controller.ssh_port


def _only(port: int) -> Traffic:
    connections = traffic_to(port)
    if len(connections) != 1:
        raise BenchError(f"{len(connections)} connections to port {port}, one expected: is the link up?")
    return connections[0]


def _watch(subjects: list[_Subject], seconds: float, scrape: Callable[[], None] | None) -> dict[str, _Figures]:
    def now() -> list[tuple[list[int], float, Traffic | None, int]]:
        pids = [subject.pids() for subject in subjects]
        return [
            (own, cpu_s(own), _only(subject.port) if subject.port else None, subject.told_bytes())
            for own, subject in zip(pids, subjects, strict=True)
        ]

    began, before = time.monotonic(), now()
    _wait(seconds, scrape)
    took_s, after = time.monotonic() - began, now()
    found = {}
    for subject, (first, cpu_before, sent_before, told_before), (last, cpu_after, sent_after, told) in zip(
        subjects, before, after, strict=True
    ):
        if first != last:
            raise BenchError(f"{subject.name} was started anew while it was watched")
        traffic = sent_after - sent_before if sent_after and sent_before else None
        found[subject.name] = _Figures(
            resident_bytes(last), (cpu_after - cpu_before) / took_s * 100, traffic, took_s, told - told_before
        )
    return found


def _wait(seconds: float, scrape: Callable[[], None] | None) -> None:
    """Lets time pass; a scraper comes by as often as an SE takes a sample."""
    end = time.monotonic() + seconds
    while (left_s := end - time.monotonic()) > 0:
        if scrape is not None:
            scrape()
        time.sleep(min(SCRAPE_S, left_s))


class _NodeExporter:
    """A running node_exporter, and who fetches its figures."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.pid = 0
        self.told_bytes = 0

    def scrape(self) -> None:
        """Fetches all figures, compressed as Prometheus asks for them."""
        connection = http.client.HTTPConnection(LOOPBACK, self._port, timeout=10)
        try:
            connection.request("GET", "/metrics", headers={"accept-encoding": "gzip"})
            self.told_bytes += len(connection.getresponse().read())
        finally:
            connection.close()

    def is_there(self) -> bool:
        """Whether it answers."""
        try:
            self.scrape()
        except OSError:
            return False
        return True


@contextlib.contextmanager
def _node_exporter(program: str, place: Path) -> Iterator[_NodeExporter]:
    (port,) = free_ports(1)
    found = _NodeExporter(port)
    command = [program, f"--web.listen-address={LOOPBACK}:{port}"]
    with child.Daemon(command, log_path=place / "node_exporter.log") as daemon:
        until(found.is_there, what=f"{program} answers", deadline_s=20)
        found.pid = daemon.pid
        yield found
