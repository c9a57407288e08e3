"""What the kernel knows of a process and of a TCP connection. No part of what is measured is asked about itself."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from appliance.runtime import child

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
IP_TCP_HEADER_BYTES = 20 + 20 + 12
"""IPv4, TCP, and the time stamps that both ends of a Linux connection send with each segment (RFC 7323)."""


class BenchError(Exception):
    """The bench can't go on; the text is for whoever started it."""


def until(condition: Callable[[], Any], *, what: str, deadline_s: float, every_s: float = 0.02) -> Any:
    """Polls until `condition` gives something true, and returns that. Raises `BenchError` after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise BenchError(f"not within {deadline_s:.0f} s: {what}")
        time.sleep(every_s)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie doesn't)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Returns the living processes below `pid`, at any depth, without itself."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and is_alive(int(entry.name)):
            try:
                fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    ask = [pid]
    while ask:
        below = parents.get(ask.pop(), [])
        found += below
        ask += below
    return found


def _kib(pid: int, file: str, key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text("ascii"), re.MULTILINE)
    return int(match[1]) if match else 0


def resident_bytes(pids: Iterable[int]) -> int:
    """Resident set of processes, added up (proc(5), VmRSS); pages that they share count for each."""
    return 1024 * sum(_kib(pid, "status", "VmRSS") for pid in pids)


def proportional_bytes(pids: Iterable[int]) -> int:
    """The same with each shared page divided among its users (proc(5), Pss): right for many processes of one kind."""
    return 1024 * sum(_kib(pid, "smaps_rollup", "Pss") for pid in pids)


def cpu_s(pids: Iterable[int]) -> float:
    """Processor time of processes since they began, seconds, in steps of 10 ms."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total * _TICK_S


class Traffic(NamedTuple):
    """Of one TCP connection since it began, seen from one end, both ways."""

    payload_bytes: int
    segments: int

    @property
    def wire_bytes(self) -> int:
        """With the headers of IP and TCP, acknowledgements too."""
        return self.payload_bytes + self.segments * IP_TCP_HEADER_BYTES

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.payload_bytes - earlier.payload_bytes, self.segments - earlier.segments)


def traffic_to(port: int) -> list[Traffic]:
    """Traffic of the established connections to a TCP port of this machine, by the kernel's own counters (ss -ti)."""
    if child.find_program("ss") is None:
        raise BenchError("the program 'ss' isn't on this machine: apt-get install iproute2")
    command = ["ss", "-tinHO", "state", "established", f"( dport = :{port} )"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    return [
        Traffic(
            _counter(line, "bytes_sent") + _counter(line, "bytes_received"),
            _counter(line, "segs_out") + _counter(line, "segs_in"),
        )
        for line in shown.splitlines()
    ]


def _counter(line: str, name: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", line)
    return int(match[1]) if match else 0
