"""Stage telemetry on the controller: garbage, duplicates, wrong clocks, and bounds of memory."""

from __future__ import annotations

import itertools

import pytest
from telemetry_samples import NOW, small, typical

from appliance.controller.telemetry import COARSE_S, FULL_S, Figures, History, figures
from appliance.protocol.telemetry import Faults, Point, Sample, decode, encode

HOUR_S = 3600.0


def _fill(history: History, se_id: str, *, seconds: int, interval_s: int = 10, start: float = NOW) -> float:
    """Sends one sample each interval; returns the time of the last."""
    at = start
    for second in range(0, seconds, interval_s):
        at = start + second
        assert history.accept(se_id, [encode(small(at))], at) == 1
    return at


def test_latest_and_recent() -> None:
    history = History(history_s=HOUR_S)
    texts = [encode(small(NOW + second)) for second in range(3)]
    assert history.accept("a", texts, NOW + 2) == 3
    assert history.latest("a") == small(NOW + 2)
    assert history.latest_text("a") == texts[2]
    assert history.recent("a", 0) == [small(NOW), small(NOW + 1), small(NOW + 2)]
    assert history.recent("a", NOW + 1) == [small(NOW + 1), small(NOW + 2)]
    assert history.recent("a", NOW + 3) == []
    assert history.accepted == 3


def test_unknown_se_has_nothing() -> None:
    history = History(history_s=HOUR_S)
    assert history.latest("a") is None
    assert history.latest_text("a") == ""
    assert history.recent("a", 0) == []
    assert history.figures("a") is None
    assert history.cpu_pct("a") is None
    assert history.memory_used_bytes("a") is None
    assert history.memory_total_bytes("a") is None
    assert history.uptime_s("a") is None
    history.drop("a")


def test_figures_for_the_table() -> None:
    history = History(history_s=HOUR_S)
    history.accept("a", [encode(typical())], NOW)
    assert history.cpu_pct("a") == 18.34
    assert history.memory_used_bytes("a") == 1_203_544_064
    assert history.memory_total_bytes("a") == 4_119_023_616
    assert history.uptime_s("a") == 1_811_402.77


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], Figures(NOW, None, None, None, None)),
        ([Point("system.cpu.utilization", ("idle",), 1.0001)], Figures(NOW, 0.0, None, None, None)),
        ([Point("system.cpu.utilization", ("iowait",), 0.5)], Figures(NOW, None, None, None, None)),
        ([Point("system.memory.limit", (), 5)], Figures(NOW, None, None, 5, None)),
    ],
)
def test_figures_that_a_sample_lacks_are_none(points: list[Point], expected: Figures) -> None:
    assert figures(encode(Sample(time=NOW, points=points))) == expected


def test_garbage_is_counted_by_fault_and_does_not_stop_the_rest() -> None:
    history = History(history_s=HOUR_S)
    texts = ["", encode(small(NOW)), "A" * 20_000, "garbage", encode(small(NOW + 1))]
    assert history.accept("a", texts, NOW) == 2
    assert history.refused == {Faults.MALFORMED.value.code: 2, Faults.TOO_LARGE.value.code: 1}
    assert history.latest("a") == small(NOW + 1)


def test_garbage_alone_leaves_no_trace_of_an_se() -> None:
    history = History(history_s=HOUR_S)
    assert history.accept("a", ["garbage"], NOW) == 0
    assert history.latest("a") is None
    assert history.size_bytes == 0


def test_a_repeated_batch_is_kept_once() -> None:
    history = History(history_s=HOUR_S)
    texts = [encode(small(NOW + second)) for second in range(3)]
    history.accept("a", texts, NOW + 2)
    assert history.accept("a", texts, NOW + 2) == 3, "they may leave the spool"
    assert [sample.time for sample in history.recent("a", 0)] == [NOW, NOW + 1, NOW + 2]


def test_late_samples_find_their_place() -> None:
    history = History(history_s=HOUR_S)
    for second in (5, 1, 3, 1):
        history.accept("a", [encode(small(NOW + second))], NOW + 5)
    assert [sample.time - NOW for sample in history.recent("a", 0)] == [1, 3, 5]
    latest = history.latest("a")
    assert latest is not None
    assert latest.time == NOW + 1, "the latest is what came last: an SE's clock may have been set back"


@pytest.mark.parametrize("off_s", [-30 * 365 * 86400.0, -HOUR_S - 1, HOUR_S + 1, 70 * 365 * 86400.0])
def test_a_wrong_clock_shows_but_does_not_enter_the_history(off_s: float) -> None:
    history = History(history_s=HOUR_S)
    history.accept("a", [encode(small(NOW))], NOW)
    assert history.accept("a", [encode(small(NOW + off_s, idle=0.25))], NOW) == 1
    assert history.cpu_pct("a") == 75.0
    assert [sample.time for sample in history.recent("a", 0)] == [NOW]
    history.accept("a", [encode(small(NOW + 10))], NOW + 10)
    assert [sample.time for sample in history.recent("a", 0)] == [NOW, NOW + 10]


def test_history_is_full_for_five_minutes_and_coarse_for_the_hour() -> None:
    history = History(history_s=HOUR_S)
    last = _fill(history, "a", seconds=3 * 3600)
    times = [sample.time for sample in history.recent("a", 0)]
    assert last - HOUR_S - COARSE_S <= times[0] <= last - HOUR_S + COARSE_S
    assert times[-1] == last
    assert all(after - before == 10 for before, after in itertools.pairwise(times) if before >= last - FULL_S)
    assert all(after - before <= COARSE_S for before, after in itertools.pairwise(times))
    assert len(times) <= FULL_S / 10 + HOUR_S / COARSE_S + COARSE_S / 10 + 3


def test_a_backlog_after_an_outage_is_thinned_too() -> None:
    history = History(history_s=HOUR_S)
    for start in range(0, 3600, 600):
        texts = [encode(small(NOW + start + second)) for second in range(0, 600, 10)]
        history.accept("a", texts, NOW + 3600 + start / 60)
    _fill(history, "a", seconds=180, start=NOW + 3700)
    assert len(history.recent("a", 0)) <= FULL_S / 10 + HOUR_S / COARSE_S + COARSE_S / 10 + 3


def test_without_history_only_the_latest_is_kept() -> None:
    history = History(history_s=0)
    _fill(history, "a", seconds=60)
    assert history.cpu_pct("a") == 10.0
    assert history.recent("a", 0) == []


def test_all_ses_together_stay_within_the_bound() -> None:
    history = History(history_s=HOUR_S, max_bytes=100_000)
    last = _fill(history, "a", seconds=3600)
    alone = len(history.recent("a", 0))
    for number in range(9):
        _fill(history, f"se-{number}", seconds=300, start=last - 300)
    _fill(history, "a", seconds=20, start=last + 10)
    assert history.size_bytes <= 100_000
    shared = history.recent("a", 0)
    assert 0 < len(shared) < alone
    assert shared[-1].time == last + 20


def test_the_newest_stays_however_small_the_share() -> None:
    history = History(history_s=HOUR_S, max_bytes=1)
    _fill(history, "a", seconds=60)
    assert [sample.time for sample in history.recent("a", 0)] == [NOW + 50]


def test_a_dropped_se_is_forgotten() -> None:
    history = History(history_s=HOUR_S)
    history.accept("a", [encode(small(NOW))], NOW)
    history.drop("a")
    assert history.latest("a") is None
    assert history.size_bytes == 0


def test_room_is_counted_as_it_is() -> None:
    history = History(history_s=HOUR_S)
    text = encode(typical())
    history.accept("a", [text], NOW)
    assert len(text) < history.size_bytes < len(text) + 200
    assert history.recent("a", 0) == [decode(text)]
