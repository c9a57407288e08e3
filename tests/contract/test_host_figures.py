"""runtime.host against the kernel's own words in /proc, on the machine that runs the tests.

A counter moves while it is read: each is read before and after, and the sampled value must lie between.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.protocol.telemetry import Point
from appliance.runtime import host
from appliance.runtime.host import Host

_TICKS = os.sysconf("SC_CLK_TCK")


def _values(points: list[Point], name: str) -> dict[tuple[str, ...], float]:
    return {point.attributes: point.value for point in points if point.name == name}


_Counters = dict[tuple[str, ...], float]


def _check_between(read: Callable[[], _Counters], name: str, *, slack: float = 0.0) -> None:
    before = read()
    sampled = _values(Host().points(), name)
    after = read()
    assert sampled
    for attributes, value in sampled.items():
        assert before[attributes] - slack <= value <= after[attributes] + slack, attributes


def _meminfo() -> dict[str, int]:
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


def test_cpu_time_is_that_of_proc_stat() -> None:
    def read() -> _Counters:
        words = Path("/proc/stat").read_text().splitlines()[0].split()
        user, nice, system, idle, iowait, irq, softirq, steal = (int(word) / _TICKS for word in words[1:9])
        return {
            ("user",): user,
            ("nice",): nice,
            ("system",): system,
            ("idle",): idle,
            ("iowait",): iowait,
            ("interrupt",): irq + softirq,
            ("steal",): steal,
        }

    # idle and iowait may go back a little, by proc(5)
    _check_between(read, "system.cpu.time", slack=0.05)


def test_boot_time_is_that_of_proc_stat() -> None:
    btime = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    assert _values(Host().points(), "appliance.boot_time") == {(): int(btime.split()[1])}
    assert host.boot_time() == int(btime.split()[1])


def test_uptime_is_that_of_proc_uptime() -> None:
    _check_between(lambda: {(): float(Path("/proc/uptime").read_text().split()[0])}, "system.uptime", slack=0.02)


def test_load_is_that_of_proc_loadavg() -> None:
    def read() -> dict[str, float]:
        words = Path("/proc/loadavg").read_text().split()
        return {f"{minutes}m": float(word) for minutes, word in zip((1, 5, 15), words, strict=False)}

    before = read()
    points = Host().points()
    after = read()
    for minutes in before:
        (value,) = _values(points, f"system.cpu.load_average.{minutes}").values()
        assert min(before[minutes], after[minutes]) - 0.01 <= value <= max(before[minutes], after[minutes]) + 0.01


def test_memory_is_that_of_proc_meminfo() -> None:
    def read() -> _Counters:
        memory = _meminfo()
        return {
            ("used",): memory["MemTotal"] - memory["MemAvailable"],
            ("free",): memory["MemFree"],
            ("buffers",): memory["Buffers"],
            ("cached",): memory["Cached"] + memory["SReclaimable"],
        }

    before = read()
    points = Host().points()
    after = read()
    assert _values(points, "system.memory.limit") == {(): _meminfo()["MemTotal"]}
    slack = 64 * 1024 * 1024  # unlike counters these go both ways, while other processes come and go
    for state, value in _values(points, "system.memory.usage").items():
        assert min(before[state], after[state]) - slack <= value <= max(before[state], after[state]) + slack, state


def test_swap_is_that_of_proc_meminfo() -> None:
    memory = _meminfo()
    usage = _values(Host().points(), "system.paging.usage")
    assert sum(usage.values()) == memory["SwapTotal"]


def _network(column: int, way: str) -> _Counters:
    rows = (line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:])
    return {(name.strip(), way): float(words.split()[column]) for name, words in rows}


@pytest.mark.parametrize(
    ("name", "receive", "transmit"),
    [
        ("system.network.io", 0, 8),
        ("system.network.packet.count", 1, 9),
        ("system.network.errors", 2, 10),
        ("system.network.packet.dropped", 3, 11),
    ],
)
def test_network_is_that_of_proc_net_dev(name: str, receive: int, transmit: int) -> None:
    if not _values(Host().points(), name):
        pytest.skip("no interface but the loopback has carried anything on this machine")
    _check_between(lambda: _network(receive, "receive") | _network(transmit, "transmit"), name)


@pytest.mark.parametrize(
    ("name", "columns", "unit"), [("system.disk.io", (5, 9), 512), ("system.disk.operations", (3, 7), 1)]
)
def test_disks_are_those_of_proc_diskstats(name: str, columns: tuple[int, int], unit: int) -> None:
    def read() -> _Counters:
        rows = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
        ways = zip(("read", "write"), columns, strict=True)
        return {(row[2], way): float(row[column]) * unit for way, column in ways for row in rows}

    if not _values(Host().points(), name):
        pytest.skip("no disk with a device behind it on this machine")
    _check_between(read, name)


def test_processes_are_those_of_proc() -> None:
    def count() -> int:
        return sum(path.name.isdecimal() for path in Path("/proc").iterdir())

    before = count()
    (value,) = _values(Host().points(), "system.process.count").values()
    assert value == pytest.approx((before + count()) / 2, abs=50)


def test_cpus_are_those_of_the_kernel() -> None:
    assert _values(Host().points(), "system.cpu.logical.count") == {(): os.cpu_count()}
