"""What a bench says: rows with a goal and a peer each, as JSON or as a table. Nothing here measures."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

Better = Literal["low", "high"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    """None: nothing is promised."""
    better: Better
    peer: str | None = None
    peer_value: float | None = None
    """None: there is no such peer, or it isn't installed (a note says so)."""

    @property
    def is_reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.better == "low" else self.value >= self.goal


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one bench, or several, measured."""

    bench: str
    rows: list[Row]
    notes: list[str] = []
    """What one must know to read the rows: what was measured, how, and what was missing."""
    machine: str = ""
    time: str = ""


def combine(bench: str, reports: Sequence[Report]) -> Report:
    """Puts reports together, in order."""
    return Report(
        bench=bench,
        rows=[row for report in reports for row in report.rows],
        notes=[f"{report.bench}: {note}" for report in reports for note in report.notes],
    )


def dated(report: Report) -> Report:
    """Returns the report with this machine and the present time in it."""
    return msgspec.structs.replace(report, machine=machine(), time=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))


def machine() -> str:
    """This machine in one line, with the load that others put on it."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{os.cpu_count()} cores ({model}), {memory_gib:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def number(value: float | None) -> str:
    """Three significant digits, whole numbers whole; a dash for None."""
    if value is None:
        return "-"
    if value == round(value) or abs(value) >= 1000:
        return f"{value:.0f}"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f}"


def table(report: Report) -> str:
    """Returns the rows for people, with what the goals say, and the notes below."""
    verdicts = {None: "", True: "reached", False: "MISSED"}
    lines = [["ROW", "VALUE", "UNIT", "GOAL", "", "PEER'S", "PEER"]]
    for row in report.rows:
        goal = "" if row.goal is None else f"{'<=' if row.better == 'low' else '>='} {number(row.goal)}"
        theirs = number(row.peer_value) if row.peer else ""
        lines.append([row.name, number(row.value), row.unit, goal, verdicts[row.is_reached], theirs, row.peer or ""])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    right = {1, 5}
    shown = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    shown += ["", f"{report.time} on {report.machine}", *(f"- {note}" for note in report.notes)]
    return "\n".join(shown)


class Progress:
    """Says lines on stderr, with the seconds since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)
