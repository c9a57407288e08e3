"""controller.renewal: which warnings are due, and when."""

from __future__ import annotations

from appliance.controller.renewal import DAY_S, WARN_DAYS, Warnings

END = 1000 * DAY_S


def told(warnings: Warnings, days_left: float) -> list[str]:
    return warnings.due({"root CA": float(END)}, END - days_left * DAY_S)


def test_each_threshold_is_told_once() -> None:
    warnings = Warnings()
    assert told(warnings, 31) == []
    for days in WARN_DAYS:
        assert told(warnings, days) == [f"the root CA expires in {days} days"]
        assert told(warnings, days - 0.1) == []
    assert told(warnings, -1) == []


def test_who_comes_late_hears_the_nearest_warning_only() -> None:
    assert told(Warnings(), 1.4) == ["the root CA expires in 1 days"]
    assert told(Warnings(), -3) == ["the root CA expires now: it has expired"]


def test_what_was_renewed_is_warned_of_again() -> None:
    warnings = Warnings()
    assert told(warnings, 6)
    assert told(warnings, 90) == []
    assert told(warnings, 6) == ["the root CA expires in 6 days"]
