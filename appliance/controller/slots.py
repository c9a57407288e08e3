"""Who may log in now, and when the others shall come back: a storm of links is shed, not queued.

When a controller starts anew, all its SEs come at once. A log-in costs milliseconds of processor time; ten thousand
under way at a time would all be late, and be given up by both sides. So while the loop is behind with its work, or too
many begin at once, those above the first `FEW` are told a time to come back, and each a different one: as many a second
as were finished a second lately. Telling costs a hundredth of a log-in. Pure: times are monotonic seconds, given by the
caller, who calls `tick` every `TICK_S`.

    under way < FEW                                    in
    the loop is on time, few came since the last tick  in
    else                                               a slot

A slow SE, or a silent stranger, therefore keeps nobody out while there is processor time.
"""

from __future__ import annotations

from appliance.protocol.tunnel import MAX_SLOT_S

TICK_S = 0.05
FEW = 32
"""Log-ins under way that are always let in: enough to keep a processor busy."""
LATE_S = 0.1
"""How late the loop may be before it counts as behind."""
BURST = 16
"""Log-ins let in between two ticks above the first `FEW`."""
FIRST_RATE_PER_S = 200.0
HASTE = 1.2
"""Slots a second for each log-in a second: who comes too early is told again, but an idle second is lost."""
LOWEST_RATE_PER_S = 10.0
_WEIGHT = 0.05
"""Of one tick in the rate: the last second counts most."""


class Slots:
    """The state of one gateway."""

    def __init__(self) -> None:
        self.under_way = 0
        self.shed = 0
        """Log-ins that were given a slot, since the start."""
        self.rate_per_s = FIRST_RATE_PER_S
        self._is_late = False
        self._came = 0
        self._finished = 0
        self._next_at = 0.0

    def enter(self, now: float) -> float:
        """A log-in begins: returns 0.0 where it is let in (`leave` follows), else the seconds after which to come."""
        if self.under_way < FEW or (not self._is_late and self._came < BURST):
            self.under_way += 1
            self._came += 1
            return 0.0
        self.shed += 1
        # Behind those under way, and behind everybody who has a slot already.
        self._next_at = max(self._next_at, now + self.under_way / self.rate_per_s) + 1 / (self.rate_per_s * HASTE)
        if self._next_at - now > MAX_SLOT_S:
            # Everybody in sight has a slot: the rest share the later half of the time again.
            self._next_at = now + MAX_SLOT_S / 2
        return self._next_at - now

    def leave(self) -> None:
        """A log-in is over: the link is up, or lost."""
        self.under_way -= 1
        self._finished += 1

    def tick(self, late_s: float) -> None:
        """`TICK_S` passed, and `late_s` more than that: how far the loop is behind."""
        self._is_late = late_s > LATE_S
        if self.under_way >= FEW:
            rate_per_s = self._finished / (TICK_S + max(0.0, late_s))
            self.rate_per_s = max(LOWEST_RATE_PER_S, self.rate_per_s + _WEIGHT * (rate_per_s - self.rate_per_s))
        self._came = self._finished = 0
