"""bench.growth: what is written of measured figures."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from bench.growth import BEGIN, END, PAGE, Point, drawing, with_table
from bench.report import Report, Row


def point(ses: int, cpu_pct: float) -> Point:
    rows = [
        Row(name="fleet.controller_cpu_pct", value=cpu_pct, unit="% of a core", goal=15, better="low"),
        Row(name="fleet.up", value=ses, unit="SEs", goal=ses, better="high"),
    ]
    return Point(ses=ses, report=Report(bench="fleet", rows=rows, notes=["a note"], machine="m", time="t"))


POINTS = [point(100, 1.5), point(2000, 20)]


def test_the_table_takes_the_place_of_the_older_one_and_tells_what_was_missed() -> None:
    page = with_table(f"before\n{BEGIN}\nold\n{END}\nafter\n", POINTS)
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert "| `fleet.controller_cpu_pct` | % of a core | 1.50 | 20 (missed, goal 15) |" in page
    assert with_table(page, POINTS) == page


def test_the_page_has_a_place_for_it() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1


def test_the_drawing_is_xml_with_a_dot_for_each_figure() -> None:
    root = ET.fromstring(drawing(POINTS))
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 2
