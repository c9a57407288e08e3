"""Renders what the controller knows as Prometheus text (exposition format 0.0.4).

Pure: takes a snapshot, yields bytes. The format wants all series of a metric together, so the SEs are walked once for
each metric; samples hold their points in the order of the catalogue, and one cursor per SE makes that a single pass
over the points. Nothing larger than a chunk is put together, whatever the size of the fleet.

Host metrics have the names of the catalogue (protocol.telemetry), with the labels `se` and `se_id` before their own.
They are shown while an SE is up: figures of a host that doesn't answer would look alive for ever. What an SE may choose
(its name, its disks, its mount points) is escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from appliance.protocol.fleet import State
from appliance.protocol.telemetry import CATALOGUE, Kind, Metric, Sample, decode
from appliance.runtime.host import OwnProcess

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CHUNK_BYTES = 64 * 1024
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})

_Labels = Sequence[tuple[str, str]]
_Series = tuple[str, float]
"""Labels in braces (or "") and the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeMetrics:
    """One SE at this moment."""

    se_id: str
    name: str
    state: State
    up: bool
    """Whether its link works: UP, DEGRADED or UPGRADING."""
    rtt_s: float | None = None
    heartbeats: int = 0
    """Answered since the controller started."""
    sample: Sample | str | None = None
    """The latest, or its text as `History.latest_text` gives it: that is read while rendering, which may be in another
    thread than the controller's loop. Points stand in the order of the catalogue, as `decode` gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerMetrics:
    """The controller at this moment. Counters count since its start."""

    version: str
    cluster_id: str
    node: int
    process: OwnProcess
    links: int
    enrolled: int
    """Grants given to new SEs."""
    refusals: Mapping[str, int] = field(default_factory=dict)
    """Code of `protocol.enroll.Refusals` to how often."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """What was turned away beside enrollments, by reason: `gateway-session`, `enroll-408`, `link-unread` and so on."""
    audit_entries: int = 0
    samples_accepted: int = 0
    samples_refused: Mapping[str, int] = field(default_factory=dict)
    """Code of `protocol.telemetry.Faults` to how often."""
    certificate_expires_at: float = 0.0
    """Of the node; seconds since 1970, 0 leaves it out."""
    expiries: Mapping[str, float] = field(default_factory=dict)
    """What ends when: root CA, issuing CA, node certificate, image keys; seconds since 1970."""


def _label_text(labels: _Labels) -> str:
    return ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels)


def _labels(labels: _Labels) -> str:
    return "{" + _label_text(labels) + "}"


def _number(value: float) -> str:
    """Writes whole numbers without a point, all others so that they read back the same."""
    value = float(value)
    return str(int(value)) if value.is_integer() else repr(value)


def _family(name: str, kind: str, text: str, series: Iterable[_Series]) -> Iterator[str]:
    """Yields the lines of one metric, none where it has no series."""
    head = f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for labels, value in series:
        yield f"{head}{name}{labels} {_number(value)}\n"
        head = ""


def _by_code(counts: Mapping[str, int]) -> list[_Series]:
    return [(_labels([("code", code)]), count) for code, count in sorted(counts.items())]


def _controller(controller: ControllerMetrics, states: Mapping[State, int]) -> Iterator[str]:
    about = _labels(
        [("version", controller.version), ("cluster_id", controller.cluster_id), ("node", str(controller.node))]
    )
    expiry = controller.certificate_expires_at
    process = controller.process
    families: tuple[tuple[str, str, str, list[_Series]], ...] = (
        ("appliance_build_info", "gauge", "Always 1; says which controller this is.", [(about, 1)]),
        (
            "appliance_ses",
            "gauge",
            "SEs in each state.",
            [(_labels([("state", state.value)]), states.get(state, 0)) for state in State],
        ),
        ("appliance_links", "gauge", "Admitted links.", [("", controller.links)]),
        ("appliance_enrolled_total", "counter", "SEs that got their first grant.", [("", controller.enrolled)]),
        (
            "appliance_enroll_refusals_total",
            "counter",
            "Refused requests to enroll, by code.",
            _by_code(controller.refusals),
        ),
        (
            "appliance_refused_total",
            "counter",
            "Connections, channels, requests and links turned away, by reason.",
            [(_labels([("reason", reason)]), count) for reason, count in sorted(controller.refused.items())],
        ),
        ("appliance_audit_entries_total", "counter", "Audit entries written.", [("", controller.audit_entries)]),
        (
            "appliance_telemetry_samples_total",
            "counter",
            "Samples taken from SEs.",
            [("", controller.samples_accepted)],
        ),
        (
            "appliance_telemetry_refused_total",
            "counter",
            "Samples refused as garbage, by code.",
            _by_code(controller.samples_refused),
        ),
        (
            "appliance_node_certificate_expiry_timestamp_seconds",
            "gauge",
            "When the node certificate ends, in seconds since 1970.",
            [("", expiry)] if expiry else [],
        ),
        (
            "appliance_expiry_timestamp_seconds",
            "gauge",
            "When a certificate or an image key ends, in seconds since 1970.",
            [(_labels([("what", what)]), ends) for what, ends in sorted(controller.expiries.items())],
        ),
        ("process_cpu_seconds_total", "counter", "CPU time of the controller.", [("", process.cpu_s)]),
        ("process_resident_memory_bytes", "gauge", "Resident memory.", [("", process.resident_bytes)]),
        ("process_virtual_memory_bytes", "gauge", "Virtual memory.", [("", process.virtual_bytes)]),
        ("process_open_fds", "gauge", "Open file descriptors.", [("", process.open_fds)]),
        ("process_max_fds", "gauge", "File descriptors that may be open.", [("", process.max_fds)]),
        ("process_threads", "gauge", "Threads.", [("", process.threads)]),
        (
            "process_start_time_seconds",
            "gauge",
            "When the process started, in seconds since 1970.",
            [("", process.started_at)],
        ),
    )
    for name, kind, text, series in families:
        yield from _family(name, kind, text, series)


def _se_state(ses: Sequence[SeMetrics], texts: Sequence[str]) -> Iterator[_Series]:
    for se, text in zip(ses, texts, strict=True):
        yield f'{{{text},state="{se.state.value}"}}', 1


def _shown(se: SeMetrics) -> Sample | None:
    """Returns the sample to show of an SE."""
    if not se.up or not se.sample:
        return None
    return decode(se.sample) if isinstance(se.sample, str) else se.sample


def _ses(ses: Sequence[SeMetrics], texts: Sequence[str], samples: Sequence[Sample | None]) -> Iterator[str]:
    labels = [f"{{{text}}}" for text in texts]
    rows = list(zip(ses, labels, strict=True))
    yield from _family(
        "appliance_se_up", "gauge", "1 while the SE's link works, else 0.", ((label, se.up) for se, label in rows)
    )
    yield from _family("appliance_se_state", "gauge", "1 for the state that the SE is in.", _se_state(ses, texts))
    yield from _family(
        "appliance_link_rtt_seconds",
        "gauge",
        "Round trip over the link, minimum of the last minute.",
        ((label, se.rtt_s) for se, label in rows if se.rtt_s is not None),
    )
    yield from _family(
        "appliance_link_heartbeats_total",
        "counter",
        "Heartbeats answered.",
        ((label, se.heartbeats) for se, label in rows),
    )
    yield from _family(
        "appliance_telemetry_timestamp_seconds",
        "gauge",
        "When the figures were taken, by the SE's clock, in seconds since 1970.",
        ((label, sample.time) for label, sample in zip(labels, samples, strict=True) if sample),
    )


def _host_series(metric: Metric, samples: Sequence[tuple[str, Sample]], cursors: list[int]) -> Iterator[_Series]:
    """Yields one metric's series of all SEs, and moves each SE's cursor behind them."""
    keys = [attribute.key.replace(".", "_") for attribute in metric.attributes]
    own_texts: dict[tuple[str, ...], str] = {}  # SEs from one image have the same disks and interfaces
    for place, (text, sample) in enumerate(samples):
        points, cursor = sample.points, cursors[place]
        while cursor < len(points) and points[cursor].name == metric.name:
            attributes = points[cursor].attributes
            own = own_texts.get(attributes)
            if own is None:
                own = own_texts[attributes] = "".join(
                    f",{_label_text([pair])}" for pair in zip(keys, attributes, strict=True)
                )
            yield f"{{{text}{own}}}", points[cursor].value
            cursor += 1
        cursors[place] = cursor


def _hosts(samples: Sequence[tuple[str, Sample]]) -> Iterator[str]:
    cursors = [0] * len(samples)
    for metric in CATALOGUE:
        kind = "counter" if metric.kind is Kind.COUNTER else "gauge"
        yield from _family(metric.prometheus, kind, metric.text, _host_series(metric, samples, cursors))


def _chunks(lines: Iterable[str]) -> Iterator[bytes]:
    chunk = bytearray()
    for line in lines:
        chunk += line.encode("utf-8", errors="replace")
        if len(chunk) >= CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    if chunk:
        yield bytes(chunk)


def render(controller: ControllerMetrics, ses: Iterable[SeMetrics]) -> Iterator[bytes]:
    """Yields the exposition in chunks of about `CHUNK_BYTES`. `ses` is walked once, before the first chunk."""
    fleet = list(ses)
    texts = [_label_text([("se", se.name), ("se_id", se.se_id)]) for se in fleet]
    states = Counter(se.state for se in fleet)

    def lines() -> Iterator[str]:
        yield from _controller(controller, states)
        samples = [_shown(se) for se in fleet]
        yield from _ses(fleet, texts, samples)
        yield from _hosts([(text, sample) for text, sample in zip(texts, samples, strict=True) if sample])

    return _chunks(lines())
