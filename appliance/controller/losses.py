"""How and how often an SE's link was lost lately: one that is UP again says nothing of it, and one that comes and goes
is UP whenever somebody looks.

Pure: times are monotonic seconds, given by the caller.
"""

from __future__ import annotations

from typing import NamedTuple

WITHIN_S = 600.0
MANY = 3
"""A link that was lost so many times within that time comes and goes."""
_MOST = 100
"""Are counted of one SE: who redials without end must not fill memory."""


class Lately(NamedTuple):
    """What befell one SE's link."""

    text: str
    """A sentence, "" where nothing did."""
    comes_and_goes: bool


class Losses:
    """Of all SEs."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}
        """By SE, oldest first."""
        self._last: dict[str, str] = {}

    def note(self, se_id: str, text: str, now: float) -> None:
        """An admitted link of an SE was lost, as `text` says."""
        times = [time for time in self._times.get(se_id, ()) if now - time <= WITHIN_S]
        self._times[se_id] = [*times, now][-_MOST:]
        self._last[se_id] = text

    def forget(self, se_id: str) -> None:
        """An SE is no more."""
        self._times.pop(se_id, None)
        self._last.pop(se_id, None)

    def lately(self, se_id: str, now: float) -> Lately:
        """What is known of the last `WITHIN_S`."""
        count = sum(1 for time in self._times.get(se_id, ()) if now - time <= WITHIN_S)
        if count == 0:
            return Lately("", comes_and_goes=False)
        times = {1: "once", 2: "twice"}.get(count, f"{count} times") + (" or more" if count >= _MOST else "")
        last = f"{', the last time' if count > 1 else ''}: {self._last[se_id]}"
        text = f"its link was lost {times} within {WITHIN_S / 60:.0f} minutes{last}"
        return Lately(text, comes_and_goes=count >= MANY)
