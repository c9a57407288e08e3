"""How a controller's cost grows with its fleet: the fleet bench at several sizes, as data, a drawing and a table.

Writes docs/fleet-growth.json (the rows as measured), docs/fleet-growth.svg and .png, and the table between two marks in
docs/performance.md; nothing there is written by hand.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence

import msgspec

from appliance.runtime import child
from bench import fleet
from bench.processes import BenchError
from bench.report import Report, Row, dated, number
from bench.stand import PROJECT, Options, Stand

SIZES = (100, 1000, 2000, 5000, 10_000)
DATA = PROJECT / "docs/fleet-growth.json"
DRAWING = PROJECT / "docs/fleet-growth.svg"
PICTURE = DRAWING.with_suffix(".png")
PAGE = PROJECT / "docs/performance.md"
BEGIN, END = "<!-- scripts/bench growth begins -->", "<!-- scripts/bench growth ends -->"
STEADY_S = 60.0
SHOWN = ("fleet.controller_rss_mb", "fleet.controller_cpu_pct", "fleet.heartbeat_p99_ms")
WIDTH, HEIGHT, MARGIN = 620, 190, 60
"""Of one curve, in pixels."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One size, measured."""

    ses: int
    report: Report


def run(stand: Stand, options: Options) -> Report:
    """Measures all sizes up to `options.ses`, and writes what came out."""
    points: list[Point] = []
    if child.find_program("rsvg-convert") is None:  # before half an hour of measuring, not after it
        raise BenchError(f"there is no rsvg-convert: apt-get install {child.package_of('rsvg-convert')}")
    sizes = [size for size in SIZES if size <= options.ses]
    for ses in sizes:
        stand.say(f"a fleet of {ses}")
        load = f"load of the machine before it {os.getloadavg()[0]:.1f}"
        # Only the largest shall show how steady it is.
        seconds = options.seconds if ses == sizes[-1] else min(options.seconds, STEADY_S)
        report = dated(fleet.run(stand, msgspec.structs.replace(options, ses=ses, seconds=seconds)))
        points.append(Point(ses=ses, report=msgspec.structs.replace(report, notes=[*report.notes, load])))
        # After each one: what is measured isn't lost where a later size fails.
        DATA.write_bytes(msgspec.json.format(msgspec.json.encode(points), indent=1) + b"\n")
    DRAWING.write_text(drawing(points), encoding="utf-8")
    child.run(["rsvg-convert", "--zoom", "2", "--output", str(PICTURE), str(DRAWING)], timeout_s=60)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), points), encoding="utf-8")
    rows = [
        msgspec.structs.replace(row, name=f"{row.name}@{point.ses}") for point in points for row in point.report.rows
    ]
    notes = [f"{point.ses}: {note}" for point in points for note in point.report.notes]
    written = ", ".join(path.name for path in (DATA, DRAWING, PICTURE, PAGE))
    return Report(bench="growth", rows=rows, notes=[*notes, f"written: {written}"])


def _value(point: Point, name: str) -> Row | None:
    return next((row for row in point.report.rows if row.name == name), None)


def with_table(page: str, points: Sequence[Point]) -> str:
    """Returns the page with the table of `points` between its marks."""
    names = list(dict.fromkeys(row.name for point in points for row in point.report.rows))
    lines = [
        f"{points[-1].report.time}, {points[-1].report.machine}.",
        "",
        "| row | unit | " + " | ".join(f"{point.ses:,}" for point in points) + " |",
        "| --- | --- | " + " | ".join("---" for _ in points) + " |",
    ]
    for name in names:
        found = [_value(point, name) for point in points]
        unit = next(row.unit for row in found if row is not None)
        lines.append(f"| `{name}` | {unit} | " + " | ".join(map(_cell, found)) + " |")
        peer = next((row.peer for row in found if row is not None and row.peer), None)
        if peer is not None:
            theirs = [number(row.peer_value) if row is not None else "-" for row in found]
            lines.append(f"| the same of {peer.split(',')[0]} | {unit} | " + " | ".join(theirs) + " |")
    lines += ["", *(f"- {point.ses:,} SEs: {note}" for point in points for note in point.report.notes)]
    marked = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    return marked.sub(lambda _: "\n".join([BEGIN, *lines, END]), page)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return number(row.value) + ("" if row.is_reached is not False else f" (missed, goal {number(row.goal)})")


def drawing(points: Sequence[Point]) -> str:
    """Returns an SVG of memory, processor time and answer time against the size of the fleet."""
    height = len(SHOWN) * (HEIGHT + MARGIN) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 2 * MARGIN}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for at, name in enumerate(SHOWN):
        parts += _curve(points, name, top=MARGIN + at * (HEIGHT + MARGIN))
    return "\n".join([*parts, "</svg>", ""])


def _curve(points: Sequence[Point], name: str, *, top: int) -> list[str]:
    rows = [(point.ses, row) for point in points if (row := _value(point, name)) is not None]
    if not rows:
        return []
    most = max(row.value for _, row in rows) or 1.0
    widest = max(ses for ses, _ in rows)
    places = [
        (MARGIN + WIDTH * ses / widest, top + HEIGHT - HEIGHT * row.value / most, ses, row.value) for ses, row in rows
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
    parts = [
        f'<text x="{MARGIN}" y="{top - 12}" font-weight="bold">{html.escape(f"{name} ({rows[0][1].unit})")}</text>',
        f'<path d="M{MARGIN},{top} V{top + HEIGHT} H{MARGIN + WIDTH}" fill="none" stroke="gray"/>',
        f'<polyline points="{line}" fill="none" stroke="steelblue" stroke-width="2"/>',
    ]
    for x, y, ses, value in places:
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="steelblue"/>',
            f'<text x="{x:.1f}" y="{y - 6:.1f}" text-anchor="middle">{number(value)}</text>',
            f'<text x="{x:.1f}" y="{top + HEIGHT + 15}" text-anchor="middle">{ses:,}</text>',
        ]
    return parts
