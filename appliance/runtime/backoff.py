"""How long to wait before the next try: full jitter under a ceiling that doubles. Pure but for its `random`."""

from __future__ import annotations

import random as _random
from collections.abc import Callable

FLOOR_S = 0.05
"""Never less, so that a peer that refuses at once isn't called in a tight loop."""


class Backoff:
    """Waiting times for one thing that is tried again and again.

    A thousand SEs that lost one controller in the same second must not come back in the same second; so each wait is
    drawn from the whole range (full jitter), not from its upper half.

    Args:
        first_s: ceiling of the first wait.
        most_s: what the ceiling grows to.
        random: returns numbers from [0, 1).
    """

    def __init__(
        self, *, first_s: float = 0.5, most_s: float = 30.0, random: Callable[[], float] = _random.random
    ) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._random = random
        self._ceiling_s = first_s

    def next_s(self) -> float:
        """Returns the next wait in seconds and doubles the ceiling."""
        ceiling_s = min(self._ceiling_s, self._most_s)
        self._ceiling_s = min(ceiling_s * 2, self._most_s)
        return max(FLOOR_S, self._random() * ceiling_s)

    def reset(self) -> None:
        """Starts over; for after a try that held."""
        self._ceiling_s = self._first_s
