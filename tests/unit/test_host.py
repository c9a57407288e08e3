"""runtime.host: facts and figures of this machine, and of machines that hide or spoil some."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest

from appliance.protocol.enroll import InstanceFacts
from appliance.protocol.telemetry import MAX_POINTS, Point, Sample, decode, encode
from appliance.runtime import host
from appliance.runtime.host import MAX_OF_A_KIND, Host


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="latin-1")


def _interface(root: Path, name: str, mac: str, *, real: bool = True) -> None:
    _write(root / f"sys/class/net/{name}/address", f"{mac}\n")
    if real:
        (root / f"sys/class/net/{name}/device").mkdir()


def _values(points: list[Point], name: str) -> dict[tuple[str, ...], float]:
    return {point.attributes: point.value for point in points if point.name == name}


def _hidden(*_args: object, **_more: object) -> NoReturn:
    raise FileNotFoundError("/proc/stat")


def test_facts_of_a_vm(tmp_path: Path) -> None:
    _write(tmp_path / "sys/class/dmi/id/product_uuid", "4C4C4544-0043-3010-8052-B4C04F564231\n")
    _write(tmp_path / "proc/sys/kernel/random/boot_id", "42504380-a5cf-4de4-a348-28599b6e51ee\n")
    _write(tmp_path / "var/lib/cloud/data/instance-id", "i-abcdef\n")
    _interface(tmp_path, "lo", "00:00:00:00:00:00", real=False)
    _interface(tmp_path, "eth1", "52:54:00:AA:00:02")
    _interface(tmp_path, "eth0", "52:54:00:aa:00:01")
    _interface(tmp_path, "docker0", "02:42:00:00:00:01", real=False)
    _interface(tmp_path, "ib0", "80:00:00:48:fe:80", real=True)
    (tmp_path / "sys/class/net/ib0/address").write_text("80:00:" * 10)
    assert host.facts(root=tmp_path, image_digest="sha256:00") == InstanceFacts(
        dmi_uuid="4c4c4544-0043-3010-8052-b4c04f564231",
        instance_id="i-abcdef",
        macs=["52:54:00:aa:00:01", "52:54:00:aa:00:02"],
        boot_id="42504380-a5cf-4de4-a348-28599b6e51ee",
        image_digest="sha256:00",
    )


def test_facts_of_a_container_take_what_there_is(tmp_path: Path) -> None:
    _interface(tmp_path, "eth0", "02:42:ac:11:00:02", real=False)
    assert host.facts(root=tmp_path) == InstanceFacts(macs=["02:42:ac:11:00:02"])


def test_facts_where_nothing_can_be_read(tmp_path: Path) -> None:
    assert host.facts(root=tmp_path) == InstanceFacts()


def test_facts_are_bounded_and_ascii(tmp_path: Path) -> None:
    _write(tmp_path / "var/lib/cloud/data/instance-id", "\xff" + "x" * 10_000)
    for number in range(20):
        _interface(tmp_path, f"eth{number}", f"52:54:00:aa:00:{number:02x}")
    facts = host.facts(root=tmp_path)
    assert len(facts.instance_id) == host.MAX_FACT_CHARS
    assert len(facts.macs) == MAX_OF_A_KIND


def test_facts_of_this_machine_stay_the_same() -> None:
    assert host.facts() == host.facts()
    assert host.facts().boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_points_of_this_machine_can_be_sent() -> None:
    machine = Host()
    _busy()
    points = machine.points()
    assert machine.unreadable == {}
    assert len({(point.name, point.attributes) for point in points}) == len(points)
    back = decode(encode(Sample(time=time.time(), points=points))).points
    assert len(back) == len(points)
    assert {
        "system.cpu.time",
        "system.cpu.utilization",
        "system.cpu.logical.count",
        "system.cpu.load_average.1m",
        "system.memory.usage",
        "system.memory.limit",
        "system.filesystem.usage",
        "system.process.count",
        "system.uptime",
        "appliance.boot_time",
    } <= {point.name for point in points}


def _busy() -> None:
    """Lets the CPU counters of the kernel (100 a second) move."""
    before, deadline = psutil.cpu_times(), time.monotonic() + 10
    while sum(psutil.cpu_times()) - sum(before) < 0.1 and time.monotonic() < deadline:
        pass


def test_utilization_adds_up_to_one() -> None:
    machine = Host()
    for _ in range(3):
        _busy()
        assert sum(_values(machine.points(), "system.cpu.utilization").values()) == pytest.approx(1.0)


def _cpu(**seconds: float) -> Any:
    modes = dict.fromkeys(("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest"), 0.0)
    return SimpleNamespace(**{**modes, **seconds})


def test_utilization_is_over_the_time_since_the_sample_before(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [
        _cpu(user=10, idle=90, iowait=5),
        _cpu(user=11, idle=92, iowait=4.9, irq=0.5, softirq=0.5),
        _cpu(user=11, idle=92, iowait=4.9, irq=0.5, softirq=0.5),
    ]
    monkeypatch.setattr(psutil, "cpu_times", lambda: times.pop(0))
    machine = Host()
    points = machine.points()
    assert _values(points, "system.cpu.time")["interrupt",] == 1.0
    assert _values(points, "system.cpu.utilization") == {
        ("user",): 0.25,
        ("nice",): 0.0,
        ("system",): 0.0,
        ("idle",): 0.5,
        ("iowait",): 0.0,
        ("interrupt",): 0.25,
        ("steal",): 0.0,
    }
    assert _values(machine.points(), "system.cpu.utilization") == {}, "no time is over, there is no share to tell"


def test_what_the_kernel_hides_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as kernel:
        kernel.setattr(psutil, "cpu_times", _hidden)
        kernel.setattr(psutil, "sensors_temperatures", _hidden)
        machine = Host()
        points = machine.points()
        assert machine.unreadable["cpu"] == "FileNotFoundError: /proc/stat"
        assert set(machine.unreadable) == {"cpu", "temperature"}
        assert _values(points, "system.memory.limit")
    points = machine.points()
    assert machine.unreadable == {}
    assert _values(points, "system.cpu.time")
    assert not _values(points, "system.cpu.utilization"), "the first look is the start of the measurement"


def test_swap_only_where_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0, used=0, free=0))
    assert not _values(Host().points(), "system.paging.usage")
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=10, used=3, free=7))
    assert _values(Host().points(), "system.paging.usage") == {("used",): 3, ("free",): 7}


def test_disks_are_whole_and_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["vda", "vda1", "loop0", "dm-0", "cciss/c0d0"]
    counters = {name: SimpleNamespace(read_bytes=1, write_bytes=2, read_count=3, write_count=4) for name in names}
    for name in ("vda", "cciss!c0d0"):
        (tmp_path / "sys/block" / name / "device").mkdir(parents=True)
    for name in ("loop0", "dm-0"):
        (tmp_path / "sys/block" / name).mkdir(parents=True)
    monkeypatch.setattr(psutil, "disk_io_counters", lambda perdisk: counters if perdisk else None)
    points = Host(root=tmp_path).points()
    assert _values(points, "system.disk.io") == {
        ("cciss/c0d0", "read"): 1,
        ("cciss/c0d0", "write"): 2,
        ("vda", "read"): 1,
        ("vda", "write"): 2,
    }
    assert _values(points, "system.disk.operations")["vda", "write"] == 4


def _volume(device: str, mountpoint: str, fstype: str = "ext4") -> Any:
    return SimpleNamespace(device=device, mountpoint=mountpoint, fstype=fstype, opts="rw")


def test_file_systems_are_real_and_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bind, odd = tmp_path / "bind", tmp_path / "o\ndd\udcff"
    bind.mkdir()
    odd.mkdir()
    volumes = [
        _volume("/dev/vdb", str(bind / ".." / "bind")),
        _volume("/dev/vdb", str(odd)),
        _volume("/dev/vdc", str(tmp_path / "gone")),
        _volume("/dev/vdd", "/proc"),
        _volume("/dev/loop3", str(bind), "squashfs"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: volumes)  # noqa: A006
    monkeypatch.setattr(host, "MAX_ATTRIBUTE_CHARS", 300)
    usage = _values(Host().points(), "system.filesystem.usage")
    assert {place[:2] for place in usage} == {("rootfs", "/"), ("/dev/vdb", str(tmp_path / "o?dd?"))}
    assert usage["rootfs", "/", "used"] > 0


def test_file_system_figures_are_those_of_df() -> None:
    space = shutil.disk_usage("/")
    points = Host().points()
    root = {place[2]: size for place, size in _values(points, "system.filesystem.usage").items() if place[1] == "/"}
    assert sum(root.values()) == space.total
    assert root["used"] == pytest.approx(space.used, rel=0.01)
    shares = {p[2]: share for p, share in _values(points, "system.filesystem.utilization").items() if p[1] == "/"}
    assert shares["used"] == pytest.approx(root["used"] / space.total)


def test_file_system_without_blocks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [_volume("/dev/vdd", "/proc")])  # noqa: A006
    assert {place[1] for place in _values(Host().points(), "system.filesystem.usage")} == {"/"}


def _card(received: int = 1) -> Any:
    return psutil.net_io_counters()._replace(
        bytes_sent=2, bytes_recv=received, packets_sent=4, packets_recv=3, errin=5, errout=6, dropin=7, dropout=8
    )


def test_interfaces_that_are_used_real_ones_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = _card()._replace(**dict.fromkeys(_card()._fields, 0))
    counters = {"lo": _card(), "eth9": _card(99), "ifb0": silent} | {f"br{n}": _card() for n in range(20)}
    _interface(tmp_path, "eth9", "52:54:00:aa:00:01")
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic, nowrap: counters if pernic else nowrap)
    points = Host(root=tmp_path).points()
    received = _values(points, "system.network.io")
    assert received["eth9", "receive"] == 99
    assert len(received) == 2 * MAX_OF_A_KIND
    assert ("lo", "receive") not in received
    assert ("ifb0", "receive") not in received
    told = {
        name: (_values(points, name)["eth9", "receive"], _values(points, name)["eth9", "transmit"])
        for name in ("system.network.packet.count", "system.network.errors", "system.network.packet.dropped")
    }
    assert told == {
        "system.network.packet.count": (3, 4),
        "system.network.errors": (5, 6),
        "system.network.packet.dropped": (7, 8),
    }


def test_temperatures_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    sensors = {"coretemp": [SimpleNamespace(current=40.0), SimpleNamespace(current=41.5)], "acpitz": []}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors)
    assert _values(Host().points(), "hw.temperature") == {("coretemp/0",): 40.0, ("coretemp/1",): 41.5}


def test_the_largest_machine_fits_into_a_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wide = "\U00020000" * 60  # four bytes each
    many = [f"{number:02d}{wide}" for number in range(50)]
    disk = SimpleNamespace(read_bytes=2**62 % 10**18, write_bytes=2, read_count=3, write_count=4)
    for name in many:
        (tmp_path / "sys/block" / name / "device").mkdir(parents=True)
    monkeypatch.setattr(psutil, "disk_io_counters", lambda perdisk: dict.fromkeys(many, disk) if perdisk else None)
    volumes = [_volume(f"{n:02d}{wide}", "/" * (n + 1)) for n in range(50)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: volumes)  # noqa: A006
    cards = dict.fromkeys(many, _card())
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic, nowrap: cards if pernic else nowrap)
    sensors = {name: [SimpleNamespace(current=1.0)] for name in many}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors)
    points = Host(root=tmp_path).points()
    assert 120 < len(points) <= MAX_POINTS
    assert decode(encode(Sample(time=0, points=points)))


def test_boot_time_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.boot_time() == psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", _hidden)
    assert host.boot_time() == 0.0


def test_figures_of_this_process() -> None:
    own = host.own_process()
    assert own.open_fds == len(list(Path("/proc/self/fd").iterdir())), "to look takes one, for both"
    assert own.resident_bytes > 1_000_000
    assert own.threads >= 1
    assert own.max_fds > 0
    assert 0 < own.started_at <= time.time() + 1
    assert own.cpu_s > 0
    assert own.virtual_bytes > own.resident_bytes


def test_who_listens_names_the_process() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert host.who_listens(port) is None, "bound alone is not listening"
        listener.listen()
        found = host.who_listens(port)
    assert found == (os.getpid(), psutil.Process().name())
    assert host.who_listens(port) is None


def test_who_listens_without_the_right_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def connection(pid: int | None) -> Any:
        return SimpleNamespace(status=psutil.CONN_LISTEN, laddr=SimpleNamespace(ip="::", port=22), pid=pid)

    monkeypatch.setattr(psutil, "net_connections", lambda kind: [connection(None)])
    assert host.who_listens(22) == (0, "a process of another user")
    monkeypatch.setattr(psutil, "net_connections", lambda kind: [connection(None), connection(2**22 + 1)])
    assert host.who_listens(22) == (2**22 + 1, "a process that just ended")
    monkeypatch.setattr(psutil, "net_connections", _hidden)
    assert host.who_listens(22) is None
