"""Stage telemetry, what is said: the catalogue, and text that is exact, small and bounded."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import tracemalloc
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from telemetry_samples import NOW, small, typical

from appliance.errors import TelemetryError
from appliance.protocol import telemetry
from appliance.protocol.telemetry import CATALOGUE, Faults, Kind, Metric, Point, Sample, decode, dictionary, encode


def _text(wire: bytes, *, zdict: bytes = b"", level: int = 9) -> str:
    deflate = zlib.compressobj(level=level, zdict=zdict or dictionary())
    return base64.b64encode(deflate.compress(wire) + deflate.flush()).decode()


def _wire(*points: Any, time_ms: Any = 1_790_000_000_000) -> str:
    return _text(msgspec.msgpack.encode((time_ms, points)))


def _refused(fault: Faults, text: str) -> None:
    with pytest.raises(TelemetryError) as refused:
        decode(text)
    assert refused.value.code == fault.value.code


def test_typical_sample_is_small() -> None:
    assert len(encode(typical())) <= 620


def test_round_trip_gives_catalogue_order_and_digits() -> None:
    sample = Sample(
        time=1_790_000_000.12345,
        points=[
            Point("hw.temperature", ("b/0",), -3.26),
            Point("system.cpu.utilization", ("user",), 1 / 3),
            Point("hw.temperature", ("a/0",), 20),
            Point("system.cpu.time", ("user",), 10.004),
        ],
    )
    assert decode(encode(sample)) == Sample(
        time=1_790_000_000.123,
        points=[
            Point("system.cpu.time", ("user",), 10.0),
            Point("system.cpu.utilization", ("user",), 0.3333),
            Point("hw.temperature", ("a/0",), 20.0),
            Point("hw.temperature", ("b/0",), -3.3),
        ],
    )


def test_decoded_text_encodes_to_itself() -> None:
    text = encode(typical())
    assert encode(decode(text)) == text


def test_dictionary_never_changes() -> None:
    """SEs and controllers of different versions share it: a new metric is added with `in_dictionary=False`."""
    assert (
        hashlib.sha256(dictionary()).hexdigest() == "d5773be3eefa36b3f2994158dc99c4b13587dc965db1253963f5d8b46906b78b"
    )


def test_text_of_the_first_version_still_reads() -> None:
    assert decode("ePnTBf13m3SegYFxwZGAHIaJ+FupZ5U1AJfKEk0=") == Sample(
        time=NOW, points=[Point("system.cpu.utilization", ("idle",), 0.9)]
    )


def test_a_metric_that_joins_later_leaves_the_dictionary_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Metric("x", "x", "1", Kind.GAUGE, "Later.", in_dictionary=False)
    before = dictionary()
    monkeypatch.setattr(telemetry, "CATALOGUE", (*CATALOGUE, late))
    assert dictionary() == before


def test_catalogue_is_consistent() -> None:
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)
    assert len({metric.prometheus for metric in CATALOGUE}) == len(CATALOGUE)
    for metric in CATALOGUE:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.prometheus), metric.name
        assert (metric.kind is Kind.COUNTER) == metric.prometheus.endswith("_total"), metric.name
        assert metric.text.endswith("."), metric.name
        for unit, word in {"s": "_seconds", "By": "_bytes", "Cel": "_celsius", "1": "_ratio"}.items():
            if metric.unit == unit:
                assert metric.prometheus.removesuffix("_total").endswith(word), metric.name
        for attribute in metric.attributes:
            assert bool(attribute.values) != bool(attribute.examples), attribute.key


@pytest.mark.parametrize(
    ("sample", "fault"),
    [
        (Sample(time=float("nan"), points=[]), Faults.TIME),
        (Sample(time=-1, points=[]), Faults.TIME),
        (Sample(time=telemetry.MAX_TIME_S + 1, points=[]), Faults.TIME),
        (Sample(time=0, points=[Point("system.cpu.load_average.1m", (), float("inf"))]), Faults.VALUE),
        (Sample(time=0, points=[Point("system.cpu.load_average.1m", (), float("nan"))]), Faults.VALUE),
        (Sample(time=0, points=[Point("system.memory.limit", (), -1)]), Faults.VALUE),
        (Sample(time=0, points=[Point("system.memory.limit", (), 1e18 + 1024)]), Faults.VALUE),
        (Sample(time=0, points=[Point("system.memory.limits", (), 1)]), Faults.METRIC),
        (Sample(time=0, points=[Point("system.memory.limit", ("x",), 1)]), Faults.ATTRIBUTES),
        (Sample(time=0, points=[Point("system.memory.usage", ("lost",), 1)]), Faults.ATTRIBUTES),
        (Sample(time=0, points=[Point("hw.temperature", ("",), 1)]), Faults.ATTRIBUTES),
        (Sample(time=0, points=[Point("hw.temperature", ("x" * 65,), 1)]), Faults.ATTRIBUTES),
        (Sample(time=0, points=[Point("hw.temperature", ("a\nb",), 1)]), Faults.ATTRIBUTES),
        (Sample(time=0, points=[Point("hw.temperature", ("\ud800",), 1)]), Faults.ATTRIBUTES),
        (Sample(time=0, points=[Point("system.memory.limit", (), 1)] * 2), Faults.ORDER),
        (Sample(time=0, points=[Point("system.memory.limit", (), 1)] * 257), Faults.TOO_LARGE),
    ],
)
def test_encode_refuses_what_decode_would(sample: Sample, fault: Faults) -> None:
    with pytest.raises(TelemetryError) as refused:
        encode(sample)
    assert refused.value.code == fault.value.code
    assert refused.value.hint


def test_encode_refuses_a_sample_of_too_many_bytes() -> None:
    with pytest.raises(TelemetryError, match="bytes"):
        encode(Sample(time=0, points=[Point("hw.temperature", (chr(0x20000 + n) * 64,), 1) for n in range(256)]))


def test_encode_refuses_a_text_that_is_too_long() -> None:
    letters = random.Random(1)  # random letters don't compress
    names = ["".join(chr(letters.randrange(0x4E00, 0x9FA0)) for _ in range(32)) for _ in range(256)]
    with pytest.raises(TelemetryError, match="characters"):
        encode(Sample(time=0, points=[Point("hw.temperature", (name,), 1) for name in names]))


def test_largest_value_comes_back() -> None:
    sample = Sample(time=0, points=[Point("system.memory.limit", (), 1e18)])
    assert decode(encode(sample)) == sample


@pytest.mark.parametrize(
    "text",
    [
        "",
        "?",
        "é",
        "AAAA=",
        "AAAA\n",
        base64.b64encode(b"not zlib").decode(),
        base64.b64encode(zlib.compress(b"")).decode(),
        _text(b"\x92\x00\x90", zdict=b"another dictionary"),
        _text(b""),
        _text(b"\x92\x00\x90\x00"),
        _text(b"\x90"),
        _text(b"\x92\x00\x90")[:-4],
        base64.b64encode(base64.b64decode(_text(b"\x92\x00\x90")) + b"x").decode(),
        _text(msgspec.msgpack.encode({"time": 1})),
        _wire(time_ms=1.5),
        _wire(time_ms="1"),
        _wire(("system.memory.limit", (), float("nan"))),
        _wire(("system.memory.limit", (), float("inf"))),
        _wire(("system.memory.limit", (), True)),
        _wire(("system.memory.limit", (), None)),
        _wire(("system.memory.limit", ())),
        _wire(("system.memory.limit", (), 1, 1)),
        _wire(("system.memory.limit", (1,), 1)),
        _text(b"\x92\x00\x91\x93\xa1\xff\x90\x00"),
        _text(b"\x91" * 2000),
    ],
)
def test_decode_refuses_other_forms(text: str) -> None:
    _refused(Faults.MALFORMED, text)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Faults.TIME, _wire(time_ms=-1)),
        (Faults.TIME, _wire(time_ms=2**53)),
        (Faults.METRIC, _wire(("system.memory", (), 1))),
        (Faults.METRIC, _wire(("x" * 10_000, (), 1))),
        (Faults.ATTRIBUTES, _wire(("system.memory.usage", (), 1))),
        (Faults.ATTRIBUTES, _wire(("system.memory.usage", ("used", "used"), 1))),
        (Faults.ATTRIBUTES, _wire(("system.memory.usage", ("USED",), 1))),
        (Faults.ATTRIBUTES, _wire(("hw.temperature", ("x" * 65,), 1))),
        (Faults.ATTRIBUTES, _wire(("hw.temperature", ("a\x00b",), 1))),
        (Faults.VALUE, _wire(("system.memory.limit", (), -1))),
        (Faults.VALUE, _wire(("system.memory.limit", (), 10**18 + 1))),
        (Faults.VALUE, _wire(("system.memory.limit", (), -1), ("hw.temperature", ("a",), -1))),
        (Faults.ORDER, _wire(("system.memory.limit", (), 1), ("system.memory.limit", (), 1))),
        (Faults.ORDER, _wire(("system.memory.limit", (), 1), ("system.cpu.logical.count", (), 1))),
        (Faults.ORDER, _wire(("hw.temperature", ("b",), 1), ("hw.temperature", ("a",), 1))),
        (Faults.MALFORMED, _wire(*[("hw.temperature", (f"{n:03d}",), 1) for n in range(257)])),
        (Faults.TOO_LARGE, "A" * (telemetry.MAX_TEXT_CHARS + 4)),
        (Faults.TOO_LARGE, _text(bytes(10_000_000))),
    ],
)
def test_decode_refuses_what_the_catalogue_does_not_allow(fault: Faults, text: str) -> None:
    _refused(fault, text)


def test_decompression_bomb_takes_no_more_than_the_bound() -> None:
    text = _text(bytes(11_000_000))
    assert len(text) <= telemetry.MAX_TEXT_CHARS
    tracemalloc.start()
    try:
        _refused(Faults.TOO_LARGE, text)
        assert tracemalloc.get_traced_memory()[1] < 4 * telemetry.MAX_DECODED_BYTES
    finally:
        tracemalloc.stop()


def test_negative_temperatures_are_possible() -> None:
    assert decode(_wire(("hw.temperature", ("a",), -215))).points == [Point("hw.temperature", ("a",), -21.5)]


def test_message_says_what_was_expected_and_stays_short() -> None:
    with pytest.raises(TelemetryError, match=r"cpu\.mode 'x{64}', expected one of user, nice") as refused:
        decode(_wire(("system.cpu.time", ("x" * 9000,), 1)))
    assert len(str(refused.value)) < 300


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: base64.b64encode(raw).decode()))
def test_decode_of_noise_raises_nothing_else(text: str) -> None:
    with pytest.raises(TelemetryError):
        decode(text)


@given(st.binary(max_size=200))
def test_decode_of_well_compressed_noise_raises_nothing_else(wire: bytes) -> None:
    try:
        decode(_text(wire, level=1))
    except TelemetryError:
        return


@given(st.integers(0, 600), st.integers(1, 255))
def test_decode_of_a_damaged_text_raises_nothing_else(place: int, change: int) -> None:
    raw = bytearray(base64.b64decode(encode(typical())))
    raw[place % len(raw)] ^= change
    try:
        decode(base64.b64encode(raw).decode())
    except TelemetryError:
        return


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
_NAMES = st.sampled_from([metric.name for metric in CATALOGUE])


@given(st.integers(0, 2**42) | _JSON, st.lists(st.tuples(_NAMES | _JSON, st.lists(_JSON, max_size=3) | _JSON, _JSON)))
def test_whatever_decode_lets_through_encodes_again(time_ms: Any, points: list[Any]) -> None:
    try:
        sample = decode(_wire(*points, time_ms=time_ms))
    except TelemetryError:
        return
    assert len(decode(encode(sample)).points) == len(sample.points)


@st.composite
def _points(draw: st.DrawFn) -> Point:
    metric = draw(st.sampled_from(CATALOGUE))
    attributes = tuple(
        draw(
            st.sampled_from(attribute.values)
            if attribute.values
            else st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=64)
        )
        for attribute in metric.attributes
    )
    lowest = -(10**6) if metric.signed else 0
    return Point(metric.name, attributes, draw(st.integers(lowest, 2**50)) / 10**metric.digits)


@given(
    st.integers(0, telemetry.MAX_TIME_S * 1000),
    st.lists(_points(), max_size=20, unique_by=lambda point: (point.name, point.attributes)),
)
def test_every_possible_sample_comes_back(time_ms: int, points: list[Point]) -> None:
    sample = Sample(time=time_ms / 1000, points=points)
    back = decode(encode(sample))
    assert back.time == sample.time
    assert {(p.name, p.attributes): p.value for p in back.points} == {(p.name, p.attributes): p.value for p in points}


def test_small_sample_is_small() -> None:
    assert len(encode(small())) < 60


def test_a_glance_reads_what_it_is_asked_for_and_checks_all() -> None:
    sample = typical()
    names = frozenset({"system.uptime", "system.cpu.utilization"})
    expected = {(point.name, *point.attributes): point.value for point in sample.points if point.name in names}
    for _ in range(2):  # from memory the second time
        time, values = telemetry.glance(encode(sample), names)
        assert time == pytest.approx(sample.time)
        assert values == pytest.approx(expected)
    assert telemetry.glance(encode(Sample(time=NOW, points=[])), names) == (NOW, {})
    with pytest.raises(TelemetryError):
        telemetry.glance("x", names)
