"""Stage telemetry on the SE: cadence, spool, what a full disk and a lost answer do."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from telemetry_samples import small

from appliance.protocol.telemetry import MAX_ATTRIBUTE_CHARS, Point, decode, encode
from appliance.runtime.clock import SystemClock
from appliance.runtime.host import Host
from appliance.runtime.stop import StopToken
from appliance.se.telemetry import FIRST_AFTER_S, MAX_BATCH, MAX_BATCH_BYTES, MAX_HELD, Telemetry
from appliance.storage.spool import Spool


class _SteppedClock:
    """A clock that moves when told."""

    def __init__(self, wall: float = 1000.0) -> None:
        self.wall = wall
        self.ticks = 0.0

    def now(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.ticks

    def synchronised(self) -> bool:
        return True


class _FewFigures(Host):
    """A host that tells what the test gives it; each sample takes `takes_s`."""

    def __init__(self, clock: _SteppedClock) -> None:
        super().__init__()
        self.clock = clock
        self.takes_s: list[float] = []
        self.figures = [Point("system.process.count", (), 7)]

    def points(self) -> list[Point]:
        self.clock.ticks += self.takes_s.pop(0) if self.takes_s else 0.0
        self.clock.wall += 1
        return self.figures


class _Waits(StopToken):
    """Lets the clock run through each wait, and stops after some; keeps when each was over."""

    def __init__(self, clock: _SteppedClock, most: int) -> None:
        super().__init__()
        self.clock = clock
        self.most = most
        self.times: list[float] = []

    def wait(self, timeout_s: float | None) -> bool:
        assert timeout_s is not None
        self.clock.ticks += timeout_s
        self.times.append(self.clock.ticks)
        if len(self.times) > self.most:
            self.stop("enough")
        return self.stopped


def _telemetry(
    path: Path, *, max_bytes: int = 1 << 20, interval_s: float = 10.0
) -> tuple[Telemetry, Spool, _FewFigures]:
    clock = _SteppedClock()
    host = _FewFigures(clock)
    spool = Spool(path, max_bytes=max_bytes)
    return Telemetry(spool, interval_s, clock, host), spool, host


def _times(texts: list[str]) -> list[float]:
    return [decode(text).time for text in texts]


def test_samples_on_a_fixed_cadence(tmp_path: Path) -> None:
    telemetry, spool, host = _telemetry(tmp_path)
    host.takes_s = [0.5, 3.0, 0.0]
    stop = _Waits(host.clock, most=4)
    telemetry.run(stop)
    assert stop.times[:4] == [FIRST_AFTER_S, FIRST_AFTER_S + 10, FIRST_AFTER_S + 20, FIRST_AFTER_S + 30]
    assert len(spool) == 4


def test_leaves_out_samples_it_was_too_late_for(tmp_path: Path) -> None:
    telemetry, _, host = _telemetry(tmp_path)
    host.takes_s = [25.0]  # a machine that was suspended
    stop = _Waits(host.clock, most=2)
    telemetry.run(stop)
    assert stop.times[:2] == [FIRST_AFTER_S, FIRST_AFTER_S + 30]


def test_first_sample_does_not_wait_longer_than_the_interval(tmp_path: Path) -> None:
    telemetry, _, host = _telemetry(tmp_path, interval_s=0.25)
    stop = _Waits(host.clock, most=1)
    telemetry.run(stop)
    assert stop.times[0] == 0.25


def test_runs_for_real_until_stopped(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=1 << 20)
    telemetry = Telemetry(spool, 0.05, SystemClock(), Host())
    stop = StopToken()
    thread = threading.Thread(target=telemetry.run, args=(stop,))
    before = time.time()
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while len(spool) < 3 and time.monotonic() < deadline:
            stop.wait(0.01)
    finally:
        stop.stop("enough")
        thread.join(5)
    assert not thread.is_alive()
    samples = [decode(text) for text in telemetry.pending()[0]]
    assert len(samples) >= 3
    assert before - 0.001 <= samples[0].time < samples[1].time < samples[2].time <= time.time()
    assert {"system.cpu.time", "system.memory.limit", "system.uptime"} <= {point.name for point in samples[0].points}
    spool.close()


def test_samples_wait_with_their_own_time_until_delivered(tmp_path: Path) -> None:
    telemetry, spool, _ = _telemetry(tmp_path)
    assert telemetry.pending() == ([], 0)
    for _ in range(3):
        telemetry.sample()
    texts, last_id = telemetry.pending()
    assert _times(texts) == [1000.0, 1001.0, 1002.0]
    telemetry.sample()
    assert telemetry.pending()[0][:3] == texts, "a lost answer: they come again"
    telemetry.delivered(last_id)
    assert _times(telemetry.pending()[0]) == [1003.0]
    assert len(spool) == 1
    telemetry.delivered(telemetry.pending()[1])
    assert telemetry.pending() == ([], 0)
    telemetry.delivered(0)


def test_what_waited_survives_a_restart(tmp_path: Path) -> None:
    telemetry, spool, _ = _telemetry(tmp_path)
    telemetry.sample()
    spool.close()
    again, spool, _ = _telemetry(tmp_path)
    assert _times(again.pending()[0]) == [1000.0]


def test_a_batch_is_bounded_by_count(tmp_path: Path) -> None:
    telemetry, spool, _ = _telemetry(tmp_path)
    for second in range(MAX_BATCH + 5):
        spool.append(encode(small(second)).encode())
    texts, last_id = telemetry.pending()
    assert _times(texts) == [float(second) for second in range(MAX_BATCH)]
    telemetry.delivered(last_id)
    assert len(telemetry.pending()[0]) == 5


def test_a_batch_is_bounded_by_size_but_never_empty(tmp_path: Path) -> None:
    telemetry, spool, _ = _telemetry(tmp_path)
    for size in (MAX_BATCH_BYTES + 1, MAX_BATCH_BYTES - 10, 10, 1):
        spool.append(b"x" * size)
    sizes = []
    while batch := telemetry.pending()[0]:
        sizes.append([len(text) for text in batch])
        telemetry.delivered(telemetry.pending()[1])
    assert sizes == [[MAX_BATCH_BYTES + 1], [MAX_BATCH_BYTES - 10, 10], [1]]


def test_what_is_no_text_in_the_spool_does_not_stop_the_rest(tmp_path: Path) -> None:
    telemetry, spool, _ = _telemetry(tmp_path)
    spool.append(b"\xff\xfe")
    telemetry.sample()
    texts, _ = telemetry.pending()
    assert len(texts) == 2
    assert decode(texts[1]).time == 1000.0


def _full(_fd: int, _content: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_with_a_full_disk_the_newest_wait_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry, spool, _ = _telemetry(tmp_path)
    telemetry.sample()
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", _full)
        for _ in range(3):
            telemetry.sample()
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    assert "wait in memory" in caplog.text
    texts, last_id = telemetry.pending()
    assert _times(texts) == [1000.0], "what is on disk is older and goes first"
    telemetry.delivered(last_id)
    texts, last_id = telemetry.pending()
    assert (_times(texts), last_id < 0) == ([1001.0, 1002.0, 1003.0], True)
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", _full)
        telemetry.sample()
    telemetry.delivered(last_id)
    assert _times(telemetry.pending()[0]) == [1004.0]
    telemetry.sample()
    assert len(spool) == 2, "the disk has room again"
    assert _times(telemetry.pending()[0]) == [1004.0, 1005.0]


def test_memory_for_a_full_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry, _, _ = _telemetry(tmp_path)
    monkeypatch.setattr(os, "write", _full)
    for _ in range(MAX_HELD + 4):
        telemetry.sample()
    texts, _ = telemetry.pending()
    assert _times(texts) == [1004.0 + second for second in range(MAX_HELD)]


def test_spool_that_cannot_be_read_or_acknowledged_is_said_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry, spool, _ = _telemetry(tmp_path)
    telemetry.sample()
    segment = next(tmp_path.glob("*.seg"))
    segment.rename(tmp_path / "away")
    assert telemetry.pending() == ([], 0)
    assert "spool" in caplog.text
    (tmp_path / "away").rename(segment)
    texts, last_id = telemetry.pending()
    assert len(texts) == 1
    spool.close()
    telemetry.delivered(last_id)
    assert "acknowledge" in caplog.text


def test_a_sample_that_cannot_be_sent_is_left_out_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry, spool, host = _telemetry(tmp_path)
    good, host.figures = host.figures, [Point("hw.temperature", ("x" * (MAX_ATTRIBUTE_CHARS + 1),), 1)]
    telemetry.sample()
    telemetry.sample()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert len(spool) == 0
    host.figures = good
    telemetry.sample()
    assert len(spool) == 1


def test_says_once_which_figures_the_host_hides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    telemetry, _, host = _telemetry(tmp_path)
    host.unreadable = {"cpu": "FileNotFoundError: /proc/stat"}
    telemetry.sample()
    telemetry.sample()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cpu (FileNotFoundError: /proc/stat)" in caplog.text
