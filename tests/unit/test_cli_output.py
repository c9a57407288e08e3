"""Units, tables that fit, and text from elsewhere made harmless."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from appliance.cli import figures, output
from appliance.cli.output import Column, Styled
from appliance.protocol.telemetry import CATALOGUE, Point, Sample
from appliance.protocol.why import StepResult


def terminal(width: int, *, encoding: str = "utf-8") -> Console:
    return Console(
        file=io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace"),
        width=width,
        force_terminal=True,
        color_system=None,
        highlight=False,
    )


def printed(console: Console) -> list[str]:
    console.file.flush()
    raw: bytes = console.file.buffer.getvalue()  # type: ignore[attr-defined]
    return raw.decode(console.encoding).splitlines()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"),
        (0, "0s"),
        (0.42, "0.4s"),
        (9.96, "10s"),
        (59.7, "1m"),
        (100, "2m"),
        (5399, "1h 30m"),
        (30 * 86400 - 1, "30d"),
        (86399, "1d"),
        (3600, "1h"),
        (3600 * 5 + 720, "5h 12m"),
        (86400 * 3 + 3600 * 4, "3d 4h"),
        (86400 * 2, "2d"),
        (86400 * 200 + 3600, "200d"),
        (-30, "-30s"),
    ],
)
def test_duration(seconds: float | None, shown: str) -> None:
    assert output.duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "–"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024 * 9.96, "10 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1.5 * 1024**3, "1.5 GiB"),
        (1e30, "888178419700125 PiB"),
    ],
)
def test_size(count: float | None, shown: str) -> None:
    assert output.size(count) == shown


@pytest.mark.parametrize(
    ("used", "total", "shown"),
    [
        (None, None, "–"),
        (1024, None, "1.0 KiB"),
        (430 * 1024**2, 2 * 1024**3, "0.4/2.0 GiB"),
        (412 * 1024**2, 900 * 1024**2, "412/900 MiB"),
        (50 * 1024**3, 256 * 1024**3, "50/256 GiB"),
        (512, 2048, "0/2 KiB"),
    ],
)
def test_memory(used: int | None, total: int | None, shown: str) -> None:
    assert output.memory(used, total) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "–"), (0.00042, "0.42 ms"), (0.0071, "7.1 ms"), (0.071, "71 ms"), (2.0, "2000 ms")]
)
def test_rtt(seconds: float | None, shown: str) -> None:
    assert output.rtt(seconds) == shown


def test_times() -> None:
    now = 1_700_000_000.0
    assert output.moment(0) == "–"
    assert output.moment(now) == "2023-11-14 22:13:20Z"
    assert output.moment(now - 60, now=now) == "22:12:20Z"
    assert output.moment(12, now=now) == "1970-01-01 00:00:12Z"
    assert output.moment(1e18) == "1000000000000000000"
    assert output.ago(0, now) == "never"
    assert output.ago(now - 720, now) == "12m ago"
    assert output.ago(now + 29 * 86400, now) == "in 29d"
    assert output.percent(None) == "–"
    assert (output.percent(3.44), output.percent(87.2)) == ("3.4%", "87%")
    assert (output.count(1, "SE"), output.count(12_000, "SE")) == ("1 SE", "12,000 SEs")


@given(st.text())
def test_nothing_that_could_drive_a_terminal_is_left(text: str) -> None:
    shown = output.clean(text)
    assert not any(unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for char in shown)


def test_escapes_stay_readable() -> None:
    assert output.clean("a\x1b[31mb\u202ec\nd\u009b") == "a\\x1b[31mb\\u202ec\\nd\\x9b"
    assert output.clean("Müller – grün") == "Müller – grün"


def test_markup_and_emoji_codes_of_others_are_text() -> None:
    console = terminal(80)
    output.say(console, "[bold red]x[/] :smile: ", Styled("[link=http://x]y", "green"))
    assert printed(console) == ["[bold red]x[/] :smile: [link=http://x]y"]


COLUMNS = (
    Column("NAME", least=8),
    Column("STATE"),
    Column("RTT", leaves=1, right=True),
    Column("WHY", leaves=2, least=12),
)
ROWS = [
    ["short", "UP", "0.42 ms", "–"],
    ["a-name-of-twenty-four-ch", "DOWN", "–", "no heartbeat for nine seconds, and nothing since"],
]


@pytest.mark.parametrize(
    ("width", "shown"),
    [(200, {"NAME", "STATE", "RTT", "WHY"}), (60, {"NAME", "STATE", "RTT", "WHY"}), (28, {"NAME", "STATE", "RTT"}),
     (20, {"NAME", "STATE"}), (5, {"NAME", "STATE"})],
)  # fmt: skip
def test_columns_leave_in_their_order_until_the_table_fits(width: int, shown: set[str]) -> None:
    console = terminal(width)
    assert output.table(console, COLUMNS, ROWS) == shown
    lines = printed(console)
    if width >= 20:
        assert all(len(line) <= width for line in lines)
        assert len(lines) == 2 + len(ROWS)


def test_off_a_terminal_nothing_is_left_out_or_cut() -> None:
    console = Console(file=io.StringIO(), width=10, force_terminal=False)
    long = "x" * 1000
    assert output.table(console, COLUMNS, [["n", "UP", "–", long]]) == {"NAME", "STATE", "RTT", "WHY"}
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    assert lines[1].split() == ["n", "UP", "–", long]


def test_numbers_stand_under_each_other() -> None:
    console = terminal(80)
    output.table(console, COLUMNS, ROWS)
    head, _, first, second = printed(console)
    end = head.index("RTT") + 3
    assert first[:end].endswith("0.42 ms")
    assert second[:end].endswith("–")


def test_marks_are_ascii_where_the_terminal_cannot_show_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert output.mark(terminal(80), StepResult.OK).text == "✓"
    assert output.mark(terminal(80, encoding="latin-1"), StepResult.FAILED).text == "FAIL"
    monkeypatch.setenv("TERM", "linux")
    assert output.mark(terminal(80), StepResult.OK).text == "ok"


def test_every_metric_of_the_catalogue_has_a_figure() -> None:
    for metric in CATALOGUE:
        assert figures.figure(12.5, metric)
    assert figures.figure(12.5, None) == "12.50"


def test_counters_are_told_as_rates_and_a_restart_is_no_fall() -> None:
    assert figures.rates([(10.0, 100.0), (20.0, 150.0), (30.0, 5.0), (40.0, 25.0)]) == [(20.0, 5.0), (40.0, 2.0)]
    assert figures.rates([(10.0, 1.0), (10.0, 2.0)]) == []


def test_the_course_shows_the_shape() -> None:
    assert figures.course([]) == ""
    assert figures.course([5.0, 5.0]) == "▁▁"
    assert figures.course([0.0, 7.0], width=24) == "▁█"
    drawn = figures.course([float(value) for value in range(100)])
    assert len(drawn) == 24
    assert list(drawn) == sorted(drawn)


def test_telemetry_is_one_line_a_series() -> None:
    samples = [
        Sample(
            time=1000.0 + 10 * at,
            points=[
                Point("system.cpu.time", ("user",), 5.0 * at),
                Point("system.memory.usage", ("used",), 1024.0**2 * (at + 10)),
                Point("made.up", ("\x1b[2J",), 3.0),
            ],
        )
        for at in range(4)
    ]
    console = terminal(200)
    figures.print_table(console, samples)
    text = "\n".join(printed(console))
    assert "50%" in text
    assert "13 MiB" in text
    assert "\x1b" not in text
    narrow = terminal(80)
    figures.print_table(narrow, samples[:1])
    assert "system.cpu.time" not in "\n".join(printed(narrow)), "one reading makes no rate"
