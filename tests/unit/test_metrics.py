"""controller.metrics: Prometheus text that reads back as what went in, whatever an SE calls itself."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_text import Family, read
from telemetry_samples import NOW, small, typical

from appliance.controller.metrics import CHUNK_BYTES, CONTENT_TYPE, ControllerMetrics, SeMetrics, render
from appliance.protocol.fleet import State
from appliance.protocol.telemetry import CATALOGUE, Kind, Point, Sample, decode, encode
from appliance.runtime.host import OwnProcess

_PROCESS = OwnProcess(
    cpu_s=12.5,
    resident_bytes=123_456_789,
    virtual_bytes=234_567_890,
    open_fds=40,
    max_fds=20_000,
    threads=9,
    started_at=1_789_999_000.25,
)
_CONTROLLER = ControllerMetrics(
    version="1.2.3",
    cluster_id="c-1",
    node=1,
    process=_PROCESS,
    links=2,
    enrolled=3,
    refusals={"ENROLL-005": 4, "ENROLL-001": 1},
    audit_entries=17,
    samples_accepted=100,
    samples_refused={"TELEMETRY-002": 1},
    certificate_expires_at=1_797_776_000.0,
)


def _se(number: int = 1, **changes: object) -> SeMetrics:
    se = SeMetrics(
        se_id=f"id-{number}",
        name=f"se-{number}",
        state=State.UP,
        up=True,
        rtt_s=0.0125,
        heartbeats=7,
        sample=decode(encode(typical())),
    )
    return dataclasses.replace(se, **changes)  # type: ignore[arg-type]


def _read(*ses: SeMetrics, controller: ControllerMetrics = _CONTROLLER) -> dict[str, Family]:
    return read(b"".join(render(controller, ses)))


def _value(family: Family, **labels: str) -> float:
    return family.samples[frozenset(labels.items())]


def test_controller_alone() -> None:
    families = _read()
    assert _value(families["appliance_build_info"], version="1.2.3", cluster_id="c-1", node="1") == 1
    assert _value(families["appliance_links"]) == 2
    assert _value(families["appliance_enrolled_total"]) == 3
    assert _value(families["appliance_enroll_refusals_total"], code="ENROLL-005") == 4
    assert _value(families["appliance_audit_entries_total"]) == 17
    assert _value(families["appliance_telemetry_samples_total"]) == 100
    assert _value(families["appliance_telemetry_refused_total"], code="TELEMETRY-002") == 1
    assert _value(families["appliance_node_certificate_expiry_timestamp_seconds"]) == 1_797_776_000
    assert _value(families["process_cpu_seconds_total"]) == 12.5
    assert _value(families["process_resident_memory_bytes"]) == 123_456_789
    assert _value(families["process_start_time_seconds"]) == 1_789_999_000.25
    assert {dict(labels)["state"] for labels in families["appliance_ses"].samples} == set(State)
    assert "appliance_se_up" not in families
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_metrics_without_a_series_are_left_out() -> None:
    bare = dataclasses.replace(_CONTROLLER, refusals={}, samples_refused={}, certificate_expires_at=0.0)
    families = _read(controller=bare)
    assert "appliance_enroll_refusals_total" not in families
    assert "appliance_telemetry_refused_total" not in families
    assert "appliance_node_certificate_expiry_timestamp_seconds" not in families


def test_an_se_and_its_host() -> None:
    families = _read(_se(1), _se(2, rtt_s=None, heartbeats=0, sample=None))
    one, two = {"se": "se-1", "se_id": "id-1"}, {"se": "se-2", "se_id": "id-2"}
    assert _value(families["appliance_se_up"], **one) == _value(families["appliance_se_up"], **two) == 1
    assert _value(families["appliance_se_state"], **one, state="UP") == 1
    assert len(families["appliance_se_state"].samples) == 2
    assert families["appliance_link_rtt_seconds"].samples == {frozenset(one.items()): 0.0125}
    assert _value(families["appliance_link_heartbeats_total"], **one) == 7
    assert _value(families["appliance_telemetry_timestamp_seconds"], **one) == NOW
    assert _value(families["appliance_ses"], state="UP") == 2
    assert _value(families["system_cpu_time_seconds_total"], **one, cpu_mode="idle") == 3_012_551.09
    assert _value(families["system_memory_limit_bytes"], **one) == 4_119_023_616
    disk = {"system_device": "vda", "disk_io_direction": "read"}
    assert _value(families["system_disk_io_bytes_total"], **one, **disk) == 18_220_191_744
    volume = {"system_device": "/dev/vda1", "system_filesystem_mountpoint": "/", "system_filesystem_state": "used"}
    assert _value(families["system_filesystem_utilization_ratio"], **one, **volume) == 0.3589


def test_every_point_of_every_se_is_there_once() -> None:
    families = _read(*(_se(number) for number in range(5)))
    host = {metric.prometheus for metric in CATALOGUE}
    assert sum(len(families[name].samples) for name in families if name in host) == 5 * len(typical().points)
    assert host <= set(families)


def test_a_sample_may_come_as_its_text() -> None:
    assert _read(_se(sample=encode(typical())), _se(2, sample="")) == _read(_se(), _se(2, sample=None))


def test_types_and_help_come_from_the_catalogue() -> None:
    families = _read(_se())
    for metric in CATALOGUE:
        family = families[metric.prometheus]
        assert family.kind == ("counter" if metric.kind is Kind.COUNTER else "gauge")
        assert family.text == metric.text
    for name, family in families.items():
        assert (family.kind == "counter") == name.endswith("_total"), name


def test_an_se_that_is_not_up_shows_no_figures_of_its_host() -> None:
    families = _read(_se(up=False, state=State.DOWN))
    assert _value(families["appliance_se_up"], se="se-1", se_id="id-1") == 0
    assert _value(families["appliance_se_state"], se="se-1", se_id="id-1", state="DOWN") == 1
    assert "appliance_telemetry_timestamp_seconds" not in families
    assert not {metric.prometheus for metric in CATALOGUE} & set(families)


@pytest.mark.parametrize(
    "name", ['a"b', "a\\b", "a\nb", "\\n", 'x"} 1\nappliance_se_up{se="y', "ü{}, =", "", "\r\t\x00"]
)
def test_names_cannot_break_out_of_their_label(name: str) -> None:
    families = _read(_se(name=name), _se(2))
    assert _value(families["appliance_se_up"], se=name, se_id="id-1") == 1
    assert len(families["appliance_se_up"].samples) == 2


def test_a_name_that_is_no_unicode_does_not_break_the_rest() -> None:
    assert len(_read(_se(name="\udcff"))["appliance_se_up"].samples) == 1


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.text('\\"\nn{},=', max_size=12))
def test_any_name_reads_back(name: str, device: str) -> None:
    """The attribute is such as `decode` would never let through: the renderer doesn't rely on it."""
    sample = Sample(time=NOW, points=[Point("system.disk.io", (device, "read"), 1)])
    families = _read(_se(name=name, sample=sample))
    labels = {"se": name, "se_id": "id-1", "system_device": device, "disk_io_direction": "read"}
    assert _value(families["system_disk_io_bytes_total"], **labels) == 1


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_value_reads_back(value: float) -> None:
    sample = Sample(time=NOW, points=[Point("hw.temperature", ("a",), value)])
    families = _read(_se(sample=sample))
    assert _value(families["hw_temperature_celsius"], se="se-1", se_id="id-1", hw_id="a") == value


def test_a_value_that_is_no_number_does_not_break_the_scrape() -> None:
    content = b"".join(render(_CONTROLLER, [_se(rtt_s=float("inf")), _se(2, rtt_s=float("nan"))]))
    assert b'appliance_link_rtt_seconds{se="se-1",se_id="id-1"} inf\n' in content
    assert b'appliance_link_rtt_seconds{se="se-2",se_id="id-2"} nan\n' in content


def test_a_large_fleet_comes_in_chunks_and_is_never_whole_in_memory() -> None:
    ses = [_se(number) for number in range(400)]
    tracemalloc.start()
    try:
        sizes = [len(chunk) for chunk in render(_CONTROLLER, ses)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) > 30 * CHUNK_BYTES
    assert max(sizes) < 2 * CHUNK_BYTES
    assert all(size >= CHUNK_BYTES for size in sizes[:-1])
    assert peak < sum(sizes) / 4


def test_the_fleet_is_read_before_the_first_chunk() -> None:
    """Chunks may be sent from another thread, later, when the loop has moved on."""
    walked = []

    def fleet() -> Iterator[SeMetrics]:
        for number in range(3):
            walked.append(number)
            yield _se(number, sample=small())

    chunks = render(_CONTROLLER, fleet())
    assert walked == [0, 1, 2]
    assert len(read(b"".join(chunks))["appliance_se_up"].samples) == 3
