"""What commands print: units for people, tables that fit, and text from elsewhere made harmless.

Names, labels, facts and error texts come from machines that may be hostile; `clean` keeps them from driving the
terminal (escape sequences, text direction), and nothing from outside is read as rich's markup. Off a terminal tables
are plain: no colour, no rule, no column left out, so `grep` and `awk` see everything. `rich` is imported when
something is printed.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from appliance.cli import context
from appliance.protocol.fleet import State
from appliance.protocol.why import StepResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

NONE = "–"
"""Stands for what isn't known."""

_GAP = 2


class Styled(NamedTuple):
    """A cell with a style of rich."""

    text: str
    style: str


Cell = str | Styled


class Column(NamedTuple):
    """A column of a table."""

    title: str
    leaves: int = 0
    """On a terminal that is too narrow the column with the highest number leaves first; 0 stays."""
    right: bool = False
    least: int = 0
    """Narrowest useful width of a column that may be cut short; 0: it is as wide as its longest cell."""


STATE_STYLES = {
    State.UP: "green",
    State.DEGRADED: "yellow",
    State.DOWN: "bold red",
    State.QUARANTINED: "bold magenta",
    State.REVOKED: "dim",
    State.CREATING: "cyan",
    State.PENDING: "cyan",
    State.ENROLLED: "cyan",
    State.UPGRADING: "blue",
}

RESULT_STYLES = {
    StepResult.OK: "green",
    StepResult.FAILED: "bold red",
    StepResult.WAITING: "yellow",
    StepResult.UNSEEN: "dim",
}

_MARKS = {StepResult.OK: "✓", StepResult.FAILED: "✗", StepResult.WAITING: "…", StepResult.UNSEEN: "·"}
_ASCII_MARKS = {StepResult.OK: "ok", StepResult.FAILED: "FAIL", StepResult.WAITING: "wait", StepResult.UNSEEN: "-"}


# Text from elsewhere.


def clean(text: str) -> str:
    """Returns `text` as one line that can't drive a terminal: control, format and separator characters as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} else ascii(char)[1:-1] for char in text
    )


# Units.


def size(count: float | None) -> str:
    """Bytes in binary units: `620 B`, `41 MiB`, `1.5 GiB`."""
    if count is None:
        return NONE
    value, units = float(count), ["PiB", "TiB", "GiB", "MiB", "KiB", "B"]
    while round(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop()
    unit = units[-1]
    return f"{value:.0f} {unit}" if unit == "B" or value >= 9.95 else f"{value:.1f} {unit}"


def memory(used: int | None, total: int | None) -> str:
    """Used of total bytes in the total's unit: `0.4/2.0 GiB`."""
    if used is None or not total:
        return size(used)
    for exponent, unit in ((3, "GiB"), (2, "MiB")):
        if total >= 0.95 * 1024**exponent:
            digits = 1 if total < 99.95 * 1024**exponent and exponent == 3 else 0
            return f"{used / 1024**exponent:.{digits}f}/{total / 1024**exponent:.{digits}f} {unit}"
    return f"{used / 1024:.0f}/{total / 1024:.0f} KiB"


def duration(seconds: float | None) -> str:
    """Seconds in at most two units: `0.4s`, `42s`, `12m`, `5h 12m`, `3d 4h`, `127d`."""
    if seconds is None:
        return NONE
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s" if seconds else "0s"
    whole, minutes, hours = round(seconds), round(seconds / 60), round(seconds / 3600)
    if whole < 60:
        return f"{whole}s"
    if minutes < 60:
        return f"{minutes}m"
    if minutes < 24 * 60:
        return f"{minutes // 60}h {minutes % 60}m" if minutes % 60 else f"{minutes // 60}h"
    if hours < 100 * 24:
        return f"{hours // 24}d {hours % 24}h" if hours % 24 else f"{hours // 24}d"
    return f"{round(seconds / 86400)}d"


def rtt(seconds: float | None) -> str:
    """A round trip in milliseconds: `0.42 ms`, `7.1 ms`, `71 ms`."""
    if seconds is None:
        return NONE
    ms = seconds * 1000
    return f"{ms:.2f} ms" if ms < 0.995 else f"{ms:.1f} ms" if ms < 9.95 else f"{ms:.0f} ms"


def percent(value: float | None) -> str:
    """Hundredths: `3.4%`, `87%`."""
    if value is None:
        return NONE
    return f"{value:.1f}%" if value < 9.95 else f"{value:.0f}%"


def moment(at: float, *, now: float = 0.0) -> str:
    """A time in UTC: `2026-11-21 21:04:11Z`, of today's (as `now` says) only `21:04:11Z`. 0 is no time."""
    if not at:
        return NONE
    try:
        stamp = datetime.fromtimestamp(at, UTC)
    except (OverflowError, ValueError, OSError):
        return f"{at:.0f}"  # a machine's idea of time that no calendar holds
    today = bool(now) and datetime.fromtimestamp(now, UTC).date() == stamp.date()
    return stamp.strftime("%H:%M:%SZ" if today else "%Y-%m-%d %H:%M:%SZ")


def ago(at: float, now: float) -> str:
    """How long ago: `12m ago`, `in 29d`. 0 is never."""
    if not at:
        return "never"
    return f"in {duration(at - now)}" if at > now + 1 else f"{duration(max(0.0, now - at))} ago"


def count(number: int, noun: str) -> str:
    """`1 SE`, `3 SEs`; thousands get their commas."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# The screen.


def screen() -> Console:
    """The console on stdout; a character that its encoding lacks becomes an escape instead of a crash."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    return context.console()


def is_plain_ascii(console: Console) -> bool:
    """Whether marks must be ASCII: another encoding than UTF-8, or a Linux text console, whose font lacks them."""
    return not console.encoding.startswith("utf") or (console.is_terminal and os.environ.get("TERM") == "linux")


def mark(console: Console, result: StepResult) -> Styled:
    """The mark of a step."""
    marks = _ASCII_MARKS if is_plain_ascii(console) else _MARKS
    return Styled(marks[result], RESULT_STYLES[result])


def state(value: State) -> Styled:
    """A state in its colour."""
    return Styled(value.value, STATE_STYLES[value])


def text(*cells: Cell) -> Text:
    """Joins cells to one line of harmless rich text."""
    from rich.text import Text

    line = Text()
    for cell in cells:
        plain, style = cell if isinstance(cell, Styled) else (cell, "")
        line.append(clean(plain), style or None)
    return line


def say(console: Console, *cells: Cell) -> None:
    """Prints one line, folded at the terminal's width."""
    console.print(text(*cells))


def heading(console: Console, title: str) -> None:
    """Prints a title over a block."""
    console.print()
    say(console, Styled(title, "bold"))


def table(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> set[str]:
    """Prints a table and returns the titles of the columns that found room.

    Lines are put together here, since rich's own tables take a second for each thousand SEs.

    Args:
        console: on a terminal columns leave or are cut until the rest fits; elsewhere all of it is printed.
        columns: from left to right.
        rows: as many cells each as there are columns.
    """
    from rich.cells import cell_len

    lines = [[_cleaned(cell) for cell in row] for row in rows]
    natural = [
        max([len(column.title), *(cell_len(line[at].text) for line in lines)]) for at, column in enumerate(columns)
    ]
    widths = _fit(columns, natural, console.width) if console.is_terminal else dict(enumerate(natural))

    def put_together(cells: Sequence[Styled]) -> list[Styled]:
        return [
            Styled(_sized(cells[at].text, wide, right=columns[at].right), cells[at].style)
            for at, wide in widths.items()
        ]

    head = put_together([Styled(column.title, "bold") for column in columns])
    if not console.is_terminal:
        for line in (head, *map(put_together, lines)):
            console.file.write((" " * _GAP).join(cell.text for cell in line).rstrip() + "\n")
        return {column.title for column in columns}
    rule = "-" if is_plain_ascii(console) else "─"
    _print_line(console, head)
    _print_line(console, [Styled(rule * (sum(widths.values()) + _GAP * (len(widths) - 1)), "dim")])
    for line in lines:
        _print_line(console, put_together(line))
    return {columns[at].title for at in widths}


def _cleaned(cell: Cell) -> Styled:
    plain, style = cell if isinstance(cell, Styled) else (cell, "")
    return Styled(clean(plain), style)


def _sized(plain: str, width: int, *, right: bool) -> str:
    """Returns `plain` in exactly `width` columns of the terminal, cut short with an ellipsis where it is longer."""
    from rich.cells import cell_len, set_cell_size

    spare = width - cell_len(plain)
    if spare < 0:
        return set_cell_size(plain, width - 1) + "…"
    return " " * spare + plain if right else plain + " " * spare


def _print_line(console: Console, cells: Sequence[Styled]) -> None:
    from rich.text import Text

    line = Text(no_wrap=True, overflow="crop")
    for at, cell in enumerate(cells):
        line.append(" " * _GAP if at else "")
        line.append(cell.text, cell.style or None)
    line.rstrip()
    console.print(line)


def _fit(columns: Sequence[Column], natural: Sequence[int], width: int) -> dict[int, int]:
    """Returns the widths of the columns that stay, by their index."""
    kept = list(range(len(columns)))

    def needed(at: int) -> int:
        return min(natural[at], columns[at].least or natural[at])

    def over() -> int:
        return sum(needed(at) for at in kept) + _GAP * (len(kept) - 1) - width

    while over() > 0 and any(columns[at].leaves for at in kept):
        kept.remove(max(kept, key=lambda at: (columns[at].leaves, at)))
    spare = max(0, -over())
    widths = {}
    for at in kept:
        grown = min(natural[at] - needed(at), spare)
        widths[at] = needed(at) + grown
        spare -= grown
    return widths


def fields(console: Console, pairs: Sequence[tuple[str, Cell]]) -> None:
    """Prints names and values in two columns; long values are folded beside their name."""
    from rich.table import Table

    grid = Table.grid(padding=(0, _GAP, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, text(value))
    console.print(grid)
