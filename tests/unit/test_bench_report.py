"""What scripts/bench prints: the JSON's exact shape, and a table that says which goals were missed."""

from __future__ import annotations

import json

import msgspec
import pytest
from bench.processes import IP_TCP_HEADER_BYTES, Traffic
from bench.report import Report, Row, combine, dated, number, table

ROWS = [
    Row(name="a.low", value=1.5, unit="s", goal=2, better="low", peer="ssh", peer_value=3.25),
    Row(name="a.high", value=99, unit="1/s", goal=100, better="high"),
    Row(name="a.free", value=0.1234, unit="ms", better="low", peer="none there"),
]


def test_a_row_in_json_has_exactly_the_promised_fields() -> None:
    report = json.loads(msgspec.json.encode(Report(bench="a", rows=ROWS)))
    assert report["bench"] == "a"
    assert report["rows"][0] == {
        "name": "a.low", "value": 1.5, "unit": "s", "goal": 2.0, "better": "low", "peer": "ssh", "peer_value": 3.25,
    }  # fmt: skip
    assert report["rows"][1]["peer"] is None


def test_goals_are_judged_by_their_better_side() -> None:
    assert [row.is_reached for row in ROWS] == [True, False, None]
    assert Row(name="x", value=2, unit="", goal=2, better="low").is_reached, "the goal itself is good enough"


def test_the_table_says_what_was_missed() -> None:
    shown = table(dated(combine("all", [Report(bench="a", rows=ROWS, notes=["under load"])]))).splitlines()
    assert shown[1].split() == ["a.low", "1.50", "s", "<=", "2", "reached", "3.25", "ssh"]
    assert shown[2].split() == ["a.high", "99", "1/s", ">=", "100", "MISSED"]
    assert shown[3].split() == ["a.free", "0.123", "ms", "-", "none", "there"]
    assert shown[-1] == "- a: under load"
    assert "cores" in shown[-2]


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0.0, "0"), (0.1, "0.100"), (4.25, "4.25"), (42.35, "42.4"), (1234.5, "1234")]
)
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_bytes_on_the_wire_count_headers() -> None:
    spent = Traffic(payload_bytes=300, segments=7) - Traffic(payload_bytes=100, segments=3)
    assert spent.wire_bytes == 200 + 4 * IP_TCP_HEADER_BYTES
