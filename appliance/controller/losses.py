"""How often an SE's link was lost lately: one that comes and goes is UP whenever somebody looks.

Pure: times are monotonic seconds, given by the caller.
"""

from __future__ import annotations

WITHIN_S = 600.0
MANY = 3
"""So many losses within that time are told."""
_MOST = 100
"""Are counted of one SE: who redials without end must not fill memory."""


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

    def told(self, se_id: str, now: float) -> str:
        """A sentence where an SE's link was lost many times lately, else ""."""
        count = sum(1 for time in self._times.get(se_id, ()) if now - time <= WITHIN_S)
        if count < MANY:
            return ""
        times = f"{count} times" if count < _MOST else f"{count} times or more"
        return f"its link was lost {times} within {WITHIN_S / 60:.0f} minutes, the last time: {self._last[se_id]}"
