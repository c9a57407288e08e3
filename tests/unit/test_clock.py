"""The system's clock and what overrides it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator

import pytest

from appliance.runtime import clock as clocks
from appliance.runtime.clock import SystemClock


def test_it_tells_the_system_s_time() -> None:
    clock = SystemClock()
    before = time.time()
    assert before <= clock.now() <= time.time()
    assert clock.monotonic() <= clock.monotonic()


def test_the_offset_moves_wall_time_only() -> None:
    clock = SystemClock(offset_s=-3600.0)
    wall, began = time.time(), time.monotonic()
    assert wall <= clock.now() + 3600.0 <= time.time()
    assert began <= clock.monotonic() <= time.monotonic()


@pytest.mark.parametrize("told", [True, False])
def test_being_told_is_enough(told: bool) -> None:
    assert SystemClock(synchronised=told).synchronised() is told


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    clocks._adjtimex.cache_clear()
    yield
    clocks._adjtimex.cache_clear()


class Kernel:
    """Stands for the C library."""

    def __init__(self, *, result: int, status: int) -> None:
        self._result, self._status = result, status

    def adjtimex(self, reference: object) -> int:
        timex = reference._obj  # type: ignore[attr-defined]
        assert timex.modes == 0, "nothing may be set"
        timex.status = self._status
        return self._result


@pytest.mark.parametrize(
    ("result", "status", "expected"), [(0, 0, True), (0, 0x2001, True), (5, 0x40, False), (-1, 0, False)]
)
def test_the_kernel_s_word_counts(monkeypatch: pytest.MonkeyPatch, result: int, status: int, expected: bool) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Kernel(result=result, status=status))
    assert SystemClock().synchronised() is expected


def test_a_kernel_that_cannot_be_asked_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert SystemClock().synchronised() is False


def test_the_real_kernel_answers() -> None:
    assert SystemClock().synchronised() in {True, False}
