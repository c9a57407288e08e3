"""Who may log in now, who waits in line, and when the others shall come back: a storm of links is shed, not queued.

When a controller starts anew, all its SEs come at once. A log-in costs milliseconds of processor time; ten thousand
under way at a time would all be late, and be given up by both sides. So while the loop is behind with its work, or too
many begin at once, those above the first `FEW` wait: as many as can have their turn within `LINE_S` in line, connected
and not yet spoken to, which costs no processor time; the others are told a time to come back, and each a different one.
Pure: times are monotonic seconds, given by the caller, who calls `tick` every `TICK_S`.

    nobody in line before it, and: under way < FEW, or the
    loop is on time, few began since the last tick, and what
    has logged in comes up within COMING_UP_S                 in
    less than LINE_S of log-ins in line                       in line
    else                                                      a slot

The line is what keeps the processor busy: whatever a slot was reckoned with, whoever comes too early waits a moment
instead of getting another one, and while somebody is late others are there. A slow SE, or a silent stranger, keeps
nobody out while there is processor time. Turns go round the networks that wait, so that a crowd from one doesn't hold
up the others.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from appliance.protocol.tunnel import MAX_SLOT_S

TICK_S = 0.05
FEW = 32
"""Log-ins under way that are always let in: enough to keep a processor busy."""
LATE_S = 0.1
"""How late the loop may be before it counts as behind."""
BURST = 16
"""Log-ins let in between two ticks above the first `FEW`."""
COMING_UP_S = 4.0
"""How long those may take that have logged in, by the rate of late: a loop that is on time can still have more hellos
than its store writes, and whoever waits for too long is given up and comes again."""
FIRST_RATE_PER_S = 200.0
HASTE = 1.2
"""Slots a second for each log-in a second: who comes early waits in line, but an idle second is lost."""
LOWEST_RATE_PER_S = 10.0
LINE_S = 8.0
"""The longest wait in line, by the rate of late: well below the 20 s after which an SE gives a log-in up."""
PATIENCE_S = 12.0
"""Who waited for so long, because the rate fell meanwhile, gets a slot: its SE would soon give up."""
_WEIGHT = 0.02
"""Of one tick in the rate: the last seconds count most."""

Waiting = TypeVar("Waiting")


class _Place(NamedTuple, Generic[Waiting]):
    since: float
    who: Waiting


class Line(Generic[Waiting]):
    """Who waits, by network: first come, first served within each, and the networks in turn."""

    def __init__(self) -> None:
        self._networks: OrderedDict[str, deque[_Place[Waiting]]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def of(self, network: str) -> int:
        """How many wait from there."""
        return len(self._networks.get(network, ()))

    def append(self, network: str, who: Waiting, now: float) -> None:
        """Puts one at the end."""
        self._networks.setdefault(network, deque()).append(_Place(now, who))
        self._length += 1

    def pop(self) -> Waiting:
        """Takes the next one out. Raises `IndexError` where nobody waits."""
        if not self._networks:
            raise IndexError("nobody waits")
        return self._take(next(iter(self._networks)))

    def pop_late(self, now: float) -> Iterator[Waiting]:
        """Takes those out that waited too long."""
        for network in [name for name, there in self._networks.items() if there[0].since < now - PATIENCE_S]:
            while network in self._networks and self._networks[network][0].since < now - PATIENCE_S:
                yield self._take(network)

    def _take(self, network: str) -> Waiting:
        there = self._networks.pop(network)
        place = there.popleft()
        if there:
            self._networks[network] = there
        self._length -= 1
        return place.who


class Slots:
    """The state of one gateway."""

    def __init__(self) -> None:
        self.under_way = 0
        self.coming_up = 0
        """Those under way that have logged in: strangers aren't among them."""
        self.shed = 0
        """Log-ins that were given a slot, since the start."""
        self.rate_per_s = FIRST_RATE_PER_S
        self._is_late = False
        self._came = 0
        self._finished = 0
        self._has_pace = False
        self._next_at = 0.0

    def may_enter(self) -> bool:
        """Whether one more log-in may begin now."""
        if self.under_way < FEW:
            return True
        return not self._is_late and self._came < BURST and self.coming_up < self.rate_per_s * COMING_UP_S

    def enter(self) -> None:
        """A log-in begins; `leave` follows."""
        self.under_way += 1
        self._came += 1

    def logged_in(self) -> None:
        """One of those under way has logged in; `leave` will say so."""
        self.coming_up += 1

    def leave(self, *, logged_in: bool = False) -> None:
        """A log-in is over: the link is up, or lost."""
        self.under_way -= 1
        self.coming_up -= logged_in
        self._finished += 1

    @property
    def places(self) -> int:
        """How many may wait in line."""
        return int(self.rate_per_s * LINE_S)

    def slot(self, now: float) -> float:
        """Returns the seconds after which one that finds no place shall come: behind all that wait or have a slot."""
        self.shed += 1
        # Not much before those in line have had their turn: the later half of them is enough to go on with.
        self._next_at = max(self._next_at, now + LINE_S / 2) + 1 / (self.rate_per_s * HASTE)
        if self._next_at - now > MAX_SLOT_S:
            # Everybody in sight has a slot: the rest share the later half of the time again.
            self._next_at = now + MAX_SLOT_S / 2
        return self._next_at - now

    def tick(self, late_s: float, waiting: int) -> None:
        """`TICK_S` passed, and `late_s` more than that: how far the loop is behind; `waiting` are in line."""
        self._is_late = late_s > LATE_S
        if waiting:
            # The first log-ins of a storm take a while to come through; that says nothing of how many follow.
            self._has_pace = self._has_pace or self._finished > 0
            if self._has_pace:
                rate_per_s = self._finished / (TICK_S + max(0.0, late_s))
                self.rate_per_s = max(LOWEST_RATE_PER_S, self.rate_per_s + _WEIGHT * (rate_per_s - self.rate_per_s))
        else:
            self._has_pace = False
        self._came = self._finished = 0
