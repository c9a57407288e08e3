"""An SE's recent telemetry as a table: one line a series, with its newest, lowest and highest value and its course."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from appliance.cli import output
from appliance.cli.output import Cell, Column
from appliance.protocol.telemetry import CATALOGUE, Kind, Metric, Sample

if TYPE_CHECKING:
    from rich.console import Console

_METRICS = {metric.name: metric for metric in CATALOGUE}
_BARS = "▁▂▃▄▅▆▇█"
_COURSE_WIDTH = 24

_COLUMNS = (
    Column("METRIC"),
    Column("OF", least=10),
    Column("NOW", right=True),
    Column("LEAST", leaves=2, right=True),
    Column("MOST", leaves=1, right=True),
    Column("COURSE", leaves=3),
)

Series = list[tuple[float, float]]
"""Times (seconds since 1970) and values."""


def rates(series: Series) -> Series:
    """Turns a counter into its rate a second; a fall means that the counter began anew with the host."""
    return [
        (at, (value - before) / (at - was))
        for (was, before), (at, value) in itertools.pairwise(series)
        if at > was and value >= before
    ]


def course(values: Sequence[float], *, width: int = _COURSE_WIDTH) -> str:
    """Draws values as bars between their lowest and highest, the mean of a stretch each."""
    width = min(width, len(values))
    means = []
    for bar in range(width):
        stretch = values[bar * len(values) // width : (bar + 1) * len(values) // width]
        means.append(sum(stretch) / len(stretch))
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def figure(value: float, metric: Metric | None) -> str:
    """Writes a value in its metric's unit (UCUM); a counter's is a rate."""
    unit = metric.unit if metric else ""
    is_rate = metric is not None and metric.kind is Kind.COUNTER
    if metric is not None and metric.name.endswith("boot_time"):
        return output.moment(value)
    if unit == "By":
        shown = output.size(value)
    elif unit == "1" or (unit == "s" and is_rate):
        return output.percent(value * 100)  # seconds a second are a share, too
    elif unit == "s":
        return output.duration(value)
    elif unit == "Cel":
        return f"{value:.1f} °C"
    else:
        shown = f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:.2f}"
    return f"{shown}/s" if is_rate else shown


def print_table(console: Console, samples: Sequence[Sample]) -> None:
    """Prints the series of `samples` (oldest first) in the catalogue's order."""
    found: dict[tuple[str, tuple[str, ...]], Series] = {}
    for sample in samples:
        for point in sample.points:
            found.setdefault((point.name, point.attributes), []).append((sample.time, point.value))
    rows: list[list[Cell]] = []
    last_name = ""
    for (name, attributes), raw in found.items():
        metric = _METRICS.get(name)
        series = rates(raw) if metric is not None and metric.kind is Kind.COUNTER else raw
        if not series:
            continue
        values = [value for _, value in series]
        rows.append(
            [
                name if name != last_name or not console.is_terminal else "",
                " ".join(attributes),
                figure(values[-1], metric),
                figure(min(values), metric),
                figure(max(values), metric),
                "" if output.is_plain_ascii(console) else course(values),
            ]
        )
        last_name = name
    output.table(console, _COLUMNS, rows)
