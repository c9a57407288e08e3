"""Events: what an operator may want to know, newest last, bounded, with a way to wait for the next one.

Events are a convenience and live in memory; what must be provable is in the audit.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable

from appliance.protocol.operator import Event

MAX_EVENTS = 10_000

_SECOND_BITS = 20
"""Ids begin at the second of the start, shifted by this: above all ids of an earlier process, unless it emitted more
than a million events a second, and below 2^53 until the year 2242."""

_log = logging.getLogger(__name__)


class Events:
    """The controller's event log. One loop only."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._kept: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._last_id = int(wall()) << _SECOND_BITS
        self._arrived = asyncio.Event()
        self.counts: Counter[str] = Counter()
        """Events since start, by kind."""
        self.listeners: list[Callable[[Event], None]] = []
        """Told each event at once; none of them may wait."""

    def emit(self, stage: str, kind: str, subject: str, text: str) -> None:
        """Appends an event, logs it, wakes who waits."""
        self._last_id += 1
        event = Event(id=self._last_id, time=self._wall(), stage=stage, kind=kind, subject=subject, text=text)
        self._kept.append(event)
        self.counts[kind] += 1
        _log.info(text, extra={"stage": stage, "kind": kind, "subject": subject})
        for listener in self.listeners:
            listener(event)
        self._arrived.set()
        self._arrived = asyncio.Event()

    def after(self, last_id: int) -> list[Event]:
        """Returns the kept events with an id above `last_id`, oldest first.

        An id that this process can't have given is of an earlier one whose clock was ahead: all are newer.
        """
        if last_id > self._last_id:
            last_id = 0
        found: list[Event] = []
        for event in reversed(self._kept):
            if event.id <= last_id:
                break
            found.append(event)
        return found[::-1]

    async def wait_after(self, last_id: int, *, wait_s: float) -> list[Event]:
        """Like `after`, but waits up to `wait_s` seconds where there is none yet."""
        if wait_s > 0 and not self.after(last_id):
            try:
                await asyncio.wait_for(self._arrived.wait(), wait_s)
            except TimeoutError:
                return []
        return self.after(last_id)
