"""The machine this process runs on: facts about itself and its figures. The only home of psutil.

Everything is optional: a container has no DMI, a hardened unit may hide /proc/stat, a VM has no thermometer. What can't
be read is left out, and `Host.unreadable` says what and why; nothing here stops a daemon.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import NamedTuple

import psutil

from appliance.protocol.enroll import InstanceFacts
from appliance.protocol.telemetry import MAX_ATTRIBUTE_CHARS, Point

MAX_OF_A_KIND = 8
"""Disks, file systems, interfaces and sensors that a sample tells of, each; keeps it within its bounds."""
MAX_FACT_CHARS = 64

_UNREADABLE = (OSError, psutil.Error, ValueError, RuntimeError, LookupError, AttributeError, NotImplementedError)
"""What psutil raises where the kernel says something else than it expects, or nothing."""
_READ_ONLY_MEDIA = frozenset({"squashfs", "iso9660", "udf", "erofs", "cramfs"})
"""File systems that are full by nature."""


class Listener(NamedTuple):
    """Who listens on a port. `pid` is 0 where only root may know."""

    pid: int
    name: str


class OwnProcess(NamedTuple):
    """This process's figures, in the units of their names."""

    cpu_s: float
    resident_bytes: int
    virtual_bytes: int
    open_fds: int
    max_fds: int
    threads: int
    started_at: float


def _read_fact(path: Path) -> str:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            return file.read(MAX_FACT_CHARS).strip()
    except OSError:
        return ""


def _mac_addresses(root: Path) -> list[str]:
    """MAC addresses of the interfaces that have a device behind them; of all, where none has.

    Bridges and container links come and go: they would look like another machine at each hello.
    """
    by_interface: dict[Path, str] = {}
    for interface in root.glob("sys/class/net/*"):
        mac = _read_fact(interface / "address").lower()
        if len(mac) == 17 and mac != "00:00:00:00:00:00":
            by_interface[interface] = mac
    real = {mac for interface, mac in by_interface.items() if (interface / "device").exists()}
    return sorted(real or set(by_interface.values()))[:MAX_OF_A_KIND]


def facts(*, root: Path = Path("/"), image_digest: str = "") -> InstanceFacts:
    """Returns what this VM says about itself; what it can't read is empty.

    The DMI UUID is readable by root only, the instance-id is cloud-init's. `image_digest` is known to the seed.
    """
    return InstanceFacts(
        dmi_uuid=_read_fact(root / "sys/class/dmi/id/product_uuid").lower(),
        instance_id=_read_fact(root / "var/lib/cloud/data/instance-id"),
        macs=_mac_addresses(root),
        boot_id=_read_fact(root / "proc/sys/kernel/random/boot_id").lower(),
        image_digest=image_digest,
    )


def addresses() -> list[str]:
    """Returns this machine's addresses but those of the loopback and of the link alone, IPv4 first."""
    found: set[str] = set()
    for name, entries in psutil.net_if_addrs().items():
        found.update(entry.address for entry in entries if name != "lo" and entry.family in {AF_INET, AF_INET6})
    return sorted(
        (text for text in found if "%" not in text and not text.startswith("fe80:")),
        key=lambda text: (":" in text, text),
    )[:MAX_OF_A_KIND]


def boot_time() -> float:
    """Returns when the machine booted, seconds since 1970 by its own clock; 0 where the kernel doesn't say."""
    try:
        return psutil.boot_time()
    except _UNREADABLE:
        return 0.0


def own_process() -> OwnProcess:
    """Returns the figures of this process."""
    process = psutil.Process()
    with process.oneshot():
        cpu = process.cpu_times()
        memory = process.memory_info()
        return OwnProcess(
            cpu_s=cpu.user + cpu.system,
            resident_bytes=memory.rss,
            virtual_bytes=memory.vms,
            open_fds=process.num_fds(),
            max_fds=process.rlimit(psutil.RLIMIT_NOFILE)[0],
            threads=process.num_threads(),
            started_at=process.create_time(),
        )


def who_listens(port: int) -> Listener | None:
    """Returns the process that listens on TCP `port` at any address, or None where nobody does or nobody may know."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except _UNREADABLE:
        return None
    pids = [c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port]
    if not pids:
        return None
    pid = next((pid for pid in pids if pid), 0)
    try:
        return Listener(pid, psutil.Process(pid).name() if pid else "a process of another user")
    except psutil.Error:
        return Listener(pid, "a process that just ended")


def _clean(text: str) -> str:
    """Makes an attribute value of a name that the machine's owner chose (a mount point may hold any byte)."""
    return "".join(c if c.isprintable() else "?" for c in text)[:MAX_ATTRIBUTE_CHARS] or "?"


class Host:
    """Samples the machine. Utilisation is over the time since the call before, so each sampler has its own `Host`.

    Args:
        root: where /sys is; figures always come from the running kernel.
    """

    def __init__(self, *, root: Path = Path("/")) -> None:
        self._root = root
        try:
            self._cpu_before = self._cpu_times()
        except _UNREADABLE:
            self._cpu_before = {}
        self.unreadable: dict[str, str] = {}
        """Kind of figure to the reason why the last sample lacks it."""

    def points(self) -> list[Point]:
        """Returns all figures of this moment, at most one point for each series."""
        self.unreadable = {}
        kinds: dict[str, Callable[[], Iterable[Point]]] = {
            "cpu": self._cpu,
            "load": self._load,
            "memory": self._memory,
            "swap": self._swap,
            "disk": self._disks,
            "filesystem": self._filesystems,
            "network": self._network,
            "process": self._processes,
            "uptime": self._uptime,
            "temperature": self._temperatures,
        }
        series: dict[tuple[str, tuple[str, ...]], Point] = {}
        for kind, read in kinds.items():
            try:
                for point in read():
                    series.setdefault((point.name, point.attributes), point)
            except _UNREADABLE as error:
                self.unreadable[kind] = f"{type(error).__name__}: {error}"
        return list(series.values())

    @staticmethod
    def _cpu_times() -> dict[str, float]:
        """Seconds per mode, of all CPUs together. The kernel counts guests under user and nice already."""
        times = psutil.cpu_times()
        return {
            "user": times.user,
            "nice": times.nice,
            "system": times.system,
            "idle": times.idle,
            "iowait": times.iowait,
            "interrupt": times.irq + times.softirq,
            "steal": times.steal,
        }

    def _cpu(self) -> Iterator[Point]:
        now, before = self._cpu_times(), self._cpu_before
        self._cpu_before = now
        for mode, seconds in now.items():
            yield Point("system.cpu.time", (mode,), seconds)
        # iowait and steal may go back a little (proc(5)): that counts as no time at all
        spent = {mode: max(0.0, seconds - before.get(mode, seconds)) for mode, seconds in now.items()}
        total = sum(spent.values())
        if total > 0:
            for mode, seconds in spent.items():
                yield Point("system.cpu.utilization", (mode,), seconds / total)
        if count := psutil.cpu_count():
            yield Point("system.cpu.logical.count", (), count)

    @staticmethod
    def _load() -> Iterator[Point]:
        for minutes, value in zip((1, 5, 15), os.getloadavg(), strict=True):
            yield Point(f"system.cpu.load_average.{minutes}m", (), value)

    @staticmethod
    def _memory() -> Iterator[Point]:
        memory = psutil.virtual_memory()
        yield Point("system.memory.limit", (), memory.total)
        yield Point("system.memory.usage", ("used",), memory.total - memory.available)
        for state in ("free", "buffers", "cached"):
            yield Point("system.memory.usage", (state,), getattr(memory, state))

    @staticmethod
    def _swap() -> Iterator[Point]:
        swap = psutil.swap_memory()
        if swap.total:
            yield Point("system.paging.usage", ("used",), swap.used)
            yield Point("system.paging.usage", ("free",), swap.free)

    def _disks(self) -> Iterator[Point]:
        """Whole disks with a device behind them: neither partitions nor loop, ram and mapped devices, whose traffic
        is a disk's already."""
        counters = psutil.disk_io_counters(perdisk=True)
        real = (
            name for name in sorted(counters) if (self._root / "sys/block" / name.replace("/", "!") / "device").exists()
        )
        for name in list(real)[:MAX_OF_A_KIND]:
            disk, device = counters[name], _clean(name)
            yield Point("system.disk.io", (device, "read"), disk.read_bytes)
            yield Point("system.disk.io", (device, "write"), disk.write_bytes)
            yield Point("system.disk.operations", (device, "read"), disk.read_count)
            yield Point("system.disk.operations", (device, "write"), disk.write_count)

    @staticmethod
    def _filesystems() -> Iterator[Point]:
        """File systems on devices, each once; the root file system in any case (it is an overlay in a container).

        Network file systems are left out on purpose: to ask one whose server is gone blocks for ever.
        """
        mounts = {"/": "rootfs"}
        devices: set[str] = set()
        for volume in sorted(psutil.disk_partitions(all=False), key=lambda volume: len(volume.mountpoint)):
            if volume.fstype not in _READ_ONLY_MEDIA and volume.device not in devices:
                devices.add(volume.device)
                mounts[volume.mountpoint] = volume.device
        for mountpoint, device in list(mounts.items())[:MAX_OF_A_KIND]:
            try:
                space = os.statvfs(mountpoint)
            except OSError:  # unmounted meanwhile, or not ours to see
                continue
            if not space.f_blocks:
                continue
            states = {
                "used": space.f_blocks - space.f_bfree,
                "free": space.f_bavail,
                "reserved": max(0, space.f_bfree - space.f_bavail),
            }
            for state, blocks in states.items():
                place = (_clean(device), _clean(mountpoint), state)
                yield Point("system.filesystem.usage", place, blocks * space.f_frsize)
                if state != "reserved":
                    yield Point("system.filesystem.utilization", place, blocks / space.f_blocks)

    def _network(self) -> Iterator[Point]:
        """Interfaces but the loopback; those with a device behind them first, the silent ones not at all."""
        counters = psutil.net_io_counters(pernic=True, nowrap=False)
        used = [name for name in sorted(counters) if name != "lo" and any(counters[name])]
        used.sort(key=lambda name: not (self._root / "sys/class/net" / name / "device").exists())
        for name in used[:MAX_OF_A_KIND]:
            card, interface = counters[name], _clean(name)
            for metric, received, sent in (
                ("system.network.io", card.bytes_recv, card.bytes_sent),
                ("system.network.packet.count", card.packets_recv, card.packets_sent),
                ("system.network.packet.dropped", card.dropin, card.dropout),
                ("system.network.errors", card.errin, card.errout),
            ):
                yield Point(metric, (interface, "receive"), received)
                yield Point(metric, (interface, "transmit"), sent)

    @staticmethod
    def _processes() -> Iterator[Point]:
        yield Point("system.process.count", (), len(psutil.pids()))

    @staticmethod
    def _uptime() -> Iterator[Point]:
        # unlike a difference of wall clocks this stays right when the clock is set
        yield Point("system.uptime", (), time.clock_gettime(time.CLOCK_BOOTTIME))
        yield Point("appliance.boot_time", (), psutil.boot_time())

    @staticmethod
    def _temperatures() -> Iterator[Point]:
        sensors = [
            (_clean(f"{chip}/{place}"), sensor.current)
            for chip, row in sorted(psutil.sensors_temperatures().items())
            for place, sensor in enumerate(row)
        ]
        for name, celsius in sensors[:MAX_OF_A_KIND]:
            yield Point("hw.temperature", (name,), celsius)
