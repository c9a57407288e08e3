"""Samples for the tests of the stage telemetry."""

from __future__ import annotations

from appliance.protocol.telemetry import Point, Sample

NOW = 1_790_000_000.0


def typical(time: float = NOW) -> Sample:
    """A VM in service for weeks: two disks, two file systems, swap, one interface, one thermometer."""
    points = [
        *(
            Point("system.cpu.time", (mode,), seconds)
            for mode, seconds in {
                "user": 481_223.18,
                "nice": 1_022.71,
                "system": 99_871.44,
                "idle": 3_012_551.09,
                "iowait": 8_912.55,
                "interrupt": 4_410.02,
                "steal": 733.96,
            }.items()
        ),
        *(
            Point("system.cpu.utilization", (mode,), share)
            for mode, share in {
                "user": 0.1372,
                "nice": 0.0,
                "system": 0.0418,
                "idle": 0.8105,
                "iowait": 0.0061,
                "interrupt": 0.0034,
                "steal": 0.001,
            }.items()
        ),
        Point("system.cpu.logical.count", (), 2),
        Point("system.cpu.load_average.1m", (), 0.43),
        Point("system.cpu.load_average.5m", (), 0.38),
        Point("system.cpu.load_average.15m", (), 0.31),
        *(
            Point("system.memory.usage", (state,), size)
            for state, size in {
                "used": 1_203_544_064,
                "free": 311_902_208,
                "buffers": 88_317_952,
                "cached": 2_611_478_528,
            }.items()
        ),
        Point("system.memory.limit", (), 4_119_023_616),
        Point("system.paging.usage", ("used",), 12_320_768),
        Point("system.paging.usage", ("free",), 2_135_158_784),
        *(
            Point(metric, (disk, way), value)
            for metric, disk, way, value in (
                ("system.disk.io", "vda", "read", 18_220_191_744),
                ("system.disk.io", "vda", "write", 221_087_104_512),
                ("system.disk.operations", "vda", "read", 712_338),
                ("system.disk.operations", "vda", "write", 9_912_705),
                ("system.disk.io", "vdb", "read", 331_776),
                ("system.disk.io", "vdb", "write", 0),
                ("system.disk.operations", "vdb", "read", 81),
                ("system.disk.operations", "vdb", "write", 0),
            )
        ),
        *(
            Point("system.filesystem.usage", (device, mount, state), size)
            for device, mount, state, size in (
                ("/dev/vda1", "/", "used", 7_318_245_376),
                ("/dev/vda1", "/", "free", 12_003_819_520),
                ("/dev/vda1", "/", "reserved", 1_073_741_824),
                ("/dev/vda15", "/boot/efi", "used", 12_161_024),
                ("/dev/vda15", "/boot/efi", "free", 117_522_432),
                ("/dev/vda15", "/boot/efi", "reserved", 0),
            )
        ),
        Point("system.filesystem.utilization", ("/dev/vda1", "/", "used"), 0.3589),
        Point("system.filesystem.utilization", ("/dev/vda1", "/", "free"), 0.5886),
        Point("system.filesystem.utilization", ("/dev/vda15", "/boot/efi", "used"), 0.0938),
        Point("system.filesystem.utilization", ("/dev/vda15", "/boot/efi", "free"), 0.9062),
        *(
            Point(metric, ("eth0", way), value)
            for metric, way, value in (
                ("system.network.io", "receive", 88_123_901_223),
                ("system.network.io", "transmit", 41_004_188_037),
                ("system.network.packet.count", "receive", 101_288_731),
                ("system.network.packet.count", "transmit", 77_018_264),
                ("system.network.packet.dropped", "receive", 318),
                ("system.network.packet.dropped", "transmit", 0),
                ("system.network.errors", "receive", 0),
                ("system.network.errors", "transmit", 0),
            )
        ),
        Point("system.process.count", (), 143),
        Point("system.uptime", (), 1_811_402.77),
        Point("appliance.boot_time", (), 1_788_188_597),
        Point("hw.temperature", ("coretemp/0",), 41.5),
    ]
    return Sample(time=time, points=points)


def small(time: float = NOW, idle: float = 0.9) -> Sample:
    """One figure."""
    return Sample(time=time, points=[Point("system.cpu.utilization", ("idle",), idle)])
