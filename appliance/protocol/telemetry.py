"""Stage telemetry: host figures under OpenTelemetry's names, and the text they travel in.

A sample is a time and points `(metric, attributes, value)`. `CATALOGUE` is the closed set of metrics that an SE sends
and a controller accepts: names, units (UCUM), kinds and attribute keys as in the OpenTelemetry semantic conventions
(1.44, groups `system` and `hw`; load averages as the OpenTelemetry collector names them).

The text (`encode`, `decode`) is base64 of a zlib stream (RFC 1950) with a preset dictionary, of the msgpack array

    [time in ms, [[metric name, [attribute value ...], value as an integer of 10^-digits of the unit] ...]]

Integers, because a rounded figure of six digits takes three bytes so and nine as a float; it also leaves no NaN and no
infinity to say. Points stand in strictly ascending order of (place in the catalogue, attributes): one form only for
one sample, no series twice, and whoever renders by metric needs no index.

The dictionary is made from the metrics with `in_dictionary`. It must never change, or else neighbours of different
versions stop understanding each other: a metric that joins later is added at the end with `in_dictionary=False`.

What comes from the other side is bounded in text, in decompressed bytes, in points and in each value. Whether a sample
is new, late or from the future is not judged here.
"""

from __future__ import annotations

import base64
import binascii
import enum
import functools
import itertools
import math
import zlib
from typing import Annotated, NamedTuple

import msgspec

from appliance.errors import TelemetryError

MAX_TEXT_CHARS = 16 * 1024
MAX_DECODED_BYTES = 64 * 1024
"""Of one sample after decompression: a small text can't ask for more."""
MAX_POINTS = 256
MAX_ATTRIBUTE_CHARS = 64
MAX_KNOWN_SERIES = 4096
"""Series remembered as good, for speed; bounded, for SEs may name their disks as they like."""
MAX_KNOWN_SHAPES = 128
"""Rows of series remembered as good, likewise: at most as many times `MAX_POINTS`."""
MAX_TIME_S = 253_402_300_799
"""The last second of the year 9999, which is as far as calendars reach."""
_MAX_SCALED = 10**18
"""In the last digit of a metric. A float holds it exactly, so what `decode` lets through can be encoded again."""


class Fault(NamedTuple):
    """One way in which a sample is no sample."""

    code: str
    text: str


class Faults(Fault, enum.Enum):
    """All faults that `encode` and `decode` name."""

    TOO_LARGE = Fault("TELEMETRY-001", "The sample is too large")
    MALFORMED = Fault("TELEMETRY-002", "The sample is not in the form of this stage")
    METRIC = Fault("TELEMETRY-003", "The metric is not in the catalogue")
    ATTRIBUTES = Fault("TELEMETRY-004", "The attributes are not those of the metric")
    VALUE = Fault("TELEMETRY-005", "The value is not possible")
    ORDER = Fault("TELEMETRY-006", "A series comes twice or out of order")
    TIME = Fault("TELEMETRY-007", "The time is not possible")

    def error(self, got: str) -> TelemetryError:
        """Returns the error for this fault; `got` says what was found, against what was expected."""
        return TelemetryError(
            f"{self.value.text}: {got}",
            hint="the SE and the controller should run the same version; see docs/stages/telemetry.md",
            code=self.value.code,
        )


class Kind(enum.StrEnum):
    """OpenTelemetry instruments. Prometheus knows an up-down counter as a gauge."""

    COUNTER = "counter"
    UPDOWN = "updowncounter"
    GAUGE = "gauge"


class Attribute(NamedTuple):
    """An attribute key with its closed set of `values`, or with `examples` where any short text may come."""

    key: str
    values: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()


class Metric(NamedTuple):
    """One metric of the catalogue. `digits`: decimal places of the unit that are kept."""

    name: str
    prometheus: str
    unit: str
    kind: Kind
    text: str
    attributes: tuple[Attribute, ...] = ()
    digits: int = 0
    signed: bool = False
    in_dictionary: bool = True


_MODE = Attribute("cpu.mode", ("user", "nice", "system", "idle", "iowait", "interrupt", "steal"))
_MEMORY = Attribute("system.memory.state", ("used", "free", "buffers", "cached"))
_PAGING = Attribute("system.paging.state", ("used", "free"))
_DISK = Attribute("system.device", examples=("nvme0n1", "sda", "vda"))
_DISK_WAY = Attribute("disk.io.direction", ("read", "write"))
_VOLUME = Attribute("system.device", examples=("/dev/sda1", "/dev/vda1"))
_MOUNT = Attribute("system.filesystem.mountpoint", examples=("/var", "/"))
_SPACE = Attribute("system.filesystem.state", ("used", "free", "reserved"))
_CARD = Attribute("network.interface.name", examples=("ens3", "eth0"))
_CARD_AS_DEVICE = Attribute("system.device", examples=("ens3", "eth0"))
_NET_WAY = Attribute("network.io.direction", ("receive", "transmit"))
_SENSOR = Attribute("hw.id", examples=("coretemp/0",))

CATALOGUE: tuple[Metric, ...] = (
    Metric(
        "system.cpu.time",
        "system_cpu_time_seconds_total",
        "s",
        Kind.COUNTER,
        "Time that all logical CPUs together spent in each mode.",
        (_MODE,),
        digits=2,
    ),
    Metric(
        "system.cpu.utilization",
        "system_cpu_utilization_ratio",
        "1",
        Kind.GAUGE,
        "Share of CPU time in each mode since the sample before; all modes add up to 1.",
        (_MODE,),
        digits=4,
    ),
    Metric(
        "system.cpu.logical.count",
        "system_cpus",
        "{cpu}",
        Kind.UPDOWN,
        "Logical CPUs.",
    ),
    Metric(
        "system.cpu.load_average.1m",
        "system_cpu_load_average_1m",
        "{thread}",
        Kind.GAUGE,
        "Load average over 1 minute.",
        digits=2,
    ),
    Metric(
        "system.cpu.load_average.5m",
        "system_cpu_load_average_5m",
        "{thread}",
        Kind.GAUGE,
        "Load average over 5 minutes.",
        digits=2,
    ),
    Metric(
        "system.cpu.load_average.15m",
        "system_cpu_load_average_15m",
        "{thread}",
        Kind.GAUGE,
        "Load average over 15 minutes.",
        digits=2,
    ),
    Metric(
        "system.memory.usage",
        "system_memory_usage_bytes",
        "By",
        Kind.UPDOWN,
        "Memory by state; used is what is not available to new programs.",
        (_MEMORY,),
    ),
    Metric("system.memory.limit", "system_memory_limit_bytes", "By", Kind.UPDOWN, "Memory in all."),
    Metric("system.paging.usage", "system_paging_usage_bytes", "By", Kind.UPDOWN, "Swap by state.", (_PAGING,)),
    Metric(
        "system.disk.io",
        "system_disk_io_bytes_total",
        "By",
        Kind.COUNTER,
        "Bytes read from and written to each disk.",
        (_DISK, _DISK_WAY),
    ),
    Metric(
        "system.disk.operations",
        "system_disk_operations_total",
        "{operation}",
        Kind.COUNTER,
        "Completed reads and writes of each disk.",
        (_DISK, _DISK_WAY),
    ),
    Metric(
        "system.filesystem.usage",
        "system_filesystem_usage_bytes",
        "By",
        Kind.UPDOWN,
        "Space of each file system by state; reserved is root's alone.",
        (_VOLUME, _MOUNT, _SPACE),
    ),
    Metric(
        "system.filesystem.utilization",
        "system_filesystem_utilization_ratio",
        "1",
        Kind.GAUGE,
        "Share of each file system's space by state.",
        (_VOLUME, _MOUNT, _SPACE),
        digits=4,
    ),
    Metric(
        "system.network.io",
        "system_network_io_bytes_total",
        "By",
        Kind.COUNTER,
        "Bytes over each interface.",
        (_CARD, _NET_WAY),
    ),
    Metric(
        "system.network.packet.count",
        "system_network_packet_count_total",
        "{packet}",
        Kind.COUNTER,
        "Packets over each interface.",
        (_CARD_AS_DEVICE, _NET_WAY),
    ),
    Metric(
        "system.network.packet.dropped",
        "system_network_packet_dropped_total",
        "{packet}",
        Kind.COUNTER,
        "Packets dropped although they were in order.",
        (_CARD, _NET_WAY),
    ),
    Metric(
        "system.network.errors",
        "system_network_errors_total",
        "{error}",
        Kind.COUNTER,
        "Errors of each interface.",
        (_CARD, _NET_WAY),
    ),
    Metric("system.process.count", "system_processes", "{process}", Kind.UPDOWN, "Processes."),
    Metric("system.uptime", "system_uptime_seconds", "s", Kind.GAUGE, "Time since the host booted.", digits=2),
    Metric(
        "appliance.boot_time",
        "system_boot_time_seconds",
        "s",
        Kind.GAUGE,
        "When the host booted, in seconds since 1970 by its own clock.",
    ),
    Metric(
        "hw.temperature",
        "hw_temperature_celsius",
        "Cel",
        Kind.GAUGE,
        "Temperature at each sensor.",
        (_SENSOR,),
        digits=1,
        signed=True,
    ),
)


class Point(msgspec.Struct, frozen=True, array_like=True):
    """One figure: catalogue name, attribute values in the catalogue's key order, value in the catalogue's unit."""

    name: str
    attributes: tuple[str, ...]
    value: float


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All figures of one moment. `time` is the SE's wall clock, seconds since 1970."""

    time: float
    points: list[Point]


_MAX_ATTRIBUTES = 8
_WirePoint = tuple[str, Annotated[tuple[str, ...], msgspec.Meta(max_length=_MAX_ATTRIBUTES)], int]

_PLACES = {metric.name: place for place, metric in enumerate(CATALOGUE)}
_ENCODER = msgspec.msgpack.Encoder()
# Lengths are limited while decoding: 64 KiB hold 16,000 empty points, which take 3 ms to build.
_DECODER = msgspec.msgpack.Decoder(tuple[int, Annotated[list[_WirePoint], msgspec.Meta(max_length=MAX_POINTS)]])


def dictionary() -> bytes:
    """Returns the preset dictionary: each series of the catalogue as a sample writes it, without its value."""
    return b"".join(
        _ENCODER.encode((metric.name, values, 0))[:-1]
        for metric in CATALOGUE
        if metric.in_dictionary
        for values in itertools.product(*(attribute.values or attribute.examples for attribute in metric.attributes))
    )


_DICTIONARY = dictionary()


class _Series(NamedTuple):
    """A metric with attributes that were checked. Series sort in the order of a sample's points."""

    place: int
    attributes: tuple[str, ...]
    name: str
    scale: int
    """What a value is multiplied with to travel as an integer."""
    lowest: int


@functools.lru_cache(maxsize=MAX_KNOWN_SERIES)
def _series(name: str, attributes: tuple[str, ...]) -> _Series:
    """Returns a series of the catalogue, or raises what is wrong with it.

    The same few series come with each sample of each SE: to look them up again takes a third of the time.
    """
    if name not in _PLACES:
        raise Faults.METRIC.error(f"{name[:MAX_ATTRIBUTE_CHARS]!r}")
    place = _PLACES[name]
    metric = CATALOGUE[place]
    if len(attributes) != len(metric.attributes):
        raise Faults.ATTRIBUTES.error(f"{name} with {len(attributes)}, expected {len(metric.attributes)}")
    for attribute, value in zip(metric.attributes, attributes, strict=True):
        if attribute.values:
            if value not in attribute.values:
                raise Faults.ATTRIBUTES.error(
                    f"{name} with {attribute.key} {value[:MAX_ATTRIBUTE_CHARS]!r}, "
                    f"expected one of {', '.join(attribute.values)}"
                )
        elif not 0 < len(value) <= MAX_ATTRIBUTE_CHARS or not value.isprintable():
            raise Faults.ATTRIBUTES.error(
                f"{name} with {attribute.key} {value[:MAX_ATTRIBUTE_CHARS]!r}, "
                f"expected 1 to {MAX_ATTRIBUTE_CHARS} printable characters"
            )
    lowest = -_MAX_SCALED if metric.signed else 0
    return _Series(place, attributes, metric.name, 10**metric.digits, lowest)


_FIRST = _Series(-1, (), "", 1, 0)
"""Before all others."""


def _check_time(time_ms: int) -> None:
    if not 0 <= time_ms <= MAX_TIME_S * 1000:
        raise Faults.TIME.error(f"{time_ms} ms since 1970")


def _check_size(points: int) -> None:
    if points > MAX_POINTS:
        raise Faults.TOO_LARGE.error(f"{points} points, at most {MAX_POINTS} expected")


def encode(sample: Sample) -> str:
    """Writes a sample as text. The points may come in any order; values are rounded to the catalogue's digits.

    Raises:
        TelemetryError: the sample has something that `decode` would refuse.
    """
    _check_size(len(sample.points))
    if not math.isfinite(sample.time):
        raise Faults.TIME.error(f"{sample.time}")
    time_ms = round(sample.time * 1000)
    _check_time(time_ms)
    values: dict[_Series, int] = {}
    for point in sample.points:
        series = _series(point.name, point.attributes)
        if not math.isfinite(point.value):
            raise Faults.VALUE.error(f"{point.name} is {point.value}")
        values[series] = scaled = round(point.value * series.scale)
        if not series.lowest <= scaled <= _MAX_SCALED:
            raise Faults.VALUE.error(f"{point.name} is {point.value}")
    if len(values) < len(sample.points):
        raise Faults.ORDER.error(f"{len(sample.points)} points, but {len(values)} series")
    wire_points = [(series.name, series.attributes, scaled) for series, scaled in sorted(values.items())]
    wire = _ENCODER.encode((time_ms, wire_points))
    if len(wire) > MAX_DECODED_BYTES:
        raise Faults.TOO_LARGE.error(f"{len(wire)} bytes, at most {MAX_DECODED_BYTES} expected")
    deflate = zlib.compressobj(level=9, memLevel=9, zdict=_DICTIONARY)
    text = base64.b64encode(deflate.compress(wire) + deflate.flush()).decode("ascii")
    if len(text) > MAX_TEXT_CHARS:
        raise Faults.TOO_LARGE.error(f"{len(text)} characters, at most {MAX_TEXT_CHARS} expected")
    return text


def _inflate(text: str) -> bytes:
    if len(text) > MAX_TEXT_CHARS:
        raise Faults.TOO_LARGE.error(f"{len(text)} characters, at most {MAX_TEXT_CHARS} expected")
    inflate = zlib.decompressobj(zdict=_DICTIONARY)
    try:
        wire = inflate.decompress(binascii.a2b_base64(text, strict_mode=True), MAX_DECODED_BYTES)
    except (ValueError, zlib.error) as error:
        raise Faults.MALFORMED.error(str(error)) from None
    if inflate.unconsumed_tail:
        raise Faults.TOO_LARGE.error(f"more than {MAX_DECODED_BYTES} bytes after decompression")
    if not inflate.eof or inflate.unused_data:
        raise Faults.MALFORMED.error("the compressed stream ends too early or too late")
    return wire


class _Shape:
    """The series of a sample, checked and in order, without their values."""

    __slots__ = ("has_signed", "places", "series")

    def __init__(self, series: list[_Series]) -> None:
        self.series = series
        self.has_signed = any(entry.lowest < 0 for entry in series)
        self.places: dict[frozenset[str], list[tuple[int, tuple[str, ...], int]]] = {}
        """For each set of names asked for: place, key and scale of their series."""


@functools.lru_cache(maxsize=MAX_KNOWN_SHAPES)
def _shape(columns: tuple[tuple[str, tuple[str, ...]], ...]) -> _Shape:
    """Returns the shape of a sample with these series, or raises what is wrong with one.

    An SE sends the same series each time, and SEs of one image mostly the same ones: to look at each of them again
    takes three quarters of the time that a sample takes.
    """
    before = _FIRST
    found = []
    for name, attributes in columns:
        series = _series(name, attributes)
        if series <= before:
            raise Faults.ORDER.error(f"{name} {attributes} after {before.name} {before.attributes}")
        before = series
        found.append(series)
    return _Shape(found)


def _read(text: str) -> tuple[int, _Shape, tuple[int, ...]]:
    """Returns time (ms), series and their values, checked. Raises as `decode`."""
    try:
        time_ms, wire_points = _DECODER.decode(_inflate(text))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Faults.MALFORMED.error(str(error)) from None
    _check_time(time_ms)
    if not wire_points:
        return time_ms, _shape(()), ()
    names, attributes, values = zip(*wire_points, strict=True)
    shape = _shape(tuple(zip(names, attributes, strict=True)))
    lowest = min(values)
    if max(values) > _MAX_SCALED or (lowest < 0 and (lowest < -_MAX_SCALED or not shape.has_signed)):
        raise Faults.VALUE.error(f"a value of {max(values)} or {lowest}")
    if lowest < 0:
        for series, scaled in zip(shape.series, values, strict=True):
            if scaled < series.lowest:
                raise Faults.VALUE.error(f"{series.name} is {scaled} / {series.scale}")
    return time_ms, shape, values


def decode(text: str) -> Sample:
    """Reads a sample from text that an SE sent.

    Raises:
        TelemetryError: it is not exactly what `encode` writes; `code` is that of one of `Faults`.
    """
    time_ms, shape, values = _read(text)
    points = [
        Point(series.name, series.attributes, scaled / series.scale)
        for series, scaled in zip(shape.series, values, strict=True)
    ]
    return Sample(time=time_ms / 1000, points=points)


def glance(text: str, names: frozenset[str]) -> tuple[float, dict[tuple[str, ...], float]]:
    """Checks all of a sample as `decode` does, and reads only some of it: ten times as fast.

    Args:
        text: what an SE sent.
        names: metrics to read.

    Returns:
        The sample's time, and values by metric and attributes: `("system.cpu.utilization", "idle")`.

    Raises:
        TelemetryError: as `decode`.
    """
    time_ms, shape, values = _read(text)
    places = shape.places.get(names)
    if places is None:
        places = shape.places[names] = [
            (place, (series.name, *series.attributes), series.scale)
            for place, series in enumerate(shape.series)
            if series.name in names
        ]
    return time_ms / 1000, {key: values[place] / scale for place, key, scale in places}
