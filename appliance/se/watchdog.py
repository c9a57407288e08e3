"""The one who ends a link when its time is up: drives `protocol.tunnel.Watchdog` by the clock, in a thread of its own.

It never sends and never reads, so nothing that paramiko waits for can keep it waiting: it looks at when the last byte
came, says when a ping is due, and shuts the connection down when the peer is dead. Before the link has greeted, it
holds one deadline over the whole log-in instead (key exchange, authentication, hello, confirm).
"""

from __future__ import annotations

import threading
from typing import Protocol

from appliance.protocol.tunnel import DEADLINE_S, Watchdog
from appliance.runtime.clock import Clock

GOODBYE_S = 0.5
MIN_INTERVAL_S = 0.05
MAX_INTERVAL_S = 600.0
"""What a controller may ask for; outside of it the nearer end is taken."""


class Watched(Protocol):
    """The connection."""

    @property
    def received_at(self) -> float:
        """When the last byte came, monotonic seconds."""
        ...

    def close(self) -> None:
        """Ends it without waiting."""
        ...


class Guard:
    """Watches one connection from dial to end.

    Args:
        wire: what is watched and closed.
        clock: monotonic time.
        login_deadline_s: for all up to `greeted`.
        deadline_s: of a ping.
    """

    def __init__(self, wire: Watched, clock: Clock, *, login_deadline_s: float, deadline_s: float = DEADLINE_S) -> None:
        self._wire = wire
        self._clock = clock
        self._deadline_s = deadline_s
        self._login_ends_at = clock.monotonic() + login_deadline_s
        self._login_deadline_s = login_deadline_s
        self._watchdog: Watchdog | None = None
        self._changed = threading.Condition()
        self._due = 0
        self._is_over = False
        self._leave_by: float | None = None
        self._reason = ""
        self._thread = threading.Thread(target=self._run, name="link guard", daemon=True)

    @property
    def reason(self) -> str:
        """Why the guard ended the connection; "" while it didn't."""
        return self._reason

    @property
    def is_leaving(self) -> bool:
        """Whether `leave` was called."""
        return self._leave_by is not None

    def start(self) -> None:
        """Begins with the log-in's deadline."""
        self._thread.start()

    def greeted(self, interval_s: float) -> None:
        """The link is there: from now on it is pinged each `interval_s`, the first time at once."""
        with self._changed:
            self._watchdog = Watchdog(
                interval_s=_bounded(interval_s), deadline_s=self._deadline_s, now=self._clock.monotonic()
            )
            self._changed.notify_all()

    def answered(self, interval_s: float) -> None:
        """A ping was answered, and the controller wants this interval from now on."""
        with self._changed:
            if self._watchdog is not None:
                self._watchdog.interval_s = _bounded(interval_s)
            # Or it would sleep until the ping's deadline, which is later than the next ping where intervals are short.
            self._changed.notify_all()

    def wait_due(self) -> bool:
        """Waits until a ping is due, and takes it. False when the link is over, or is to be left."""
        with self._changed:
            while not (self._due or self._is_over or self.is_leaving):
                self._changed.wait()
            self._due = 0
            return not (self._is_over or self.is_leaving)

    def leave(self) -> None:
        """Asks for the end: `wait_due` returns False, and after `GOODBYE_S` the connection is ended in any case."""
        with self._changed:
            # Before the greeting nobody waits here, and there is nothing to take leave of.
            self._leave_by = self._clock.monotonic() + (GOODBYE_S if self._watchdog is not None else 0.0)
            self._changed.notify_all()

    def lost(self) -> None:
        """The connection ended by itself: `wait_due` returns False now, not when the next ping fails."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def end(self) -> None:
        """Ends the connection now."""
        self.lost()
        self._wire.close()

    def join(self) -> None:
        """Waits for the thread, which ends as soon as the connection was ended."""
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._is_over:
                wake_at, self._reason = self._look(self._clock.monotonic())
                if self._reason:
                    self._is_over = True
                else:
                    self._changed.wait(max(0.0, wake_at - self._clock.monotonic()))
            self._changed.notify_all()
        self._wire.close()

    def _look(self, now: float) -> tuple[float, str]:
        """Returns when to look again, and why the link is over where it is."""
        watchdog = self._watchdog
        if self._leave_by is not None:
            return self._leave_by, "told to stop" if now >= self._leave_by else ""
        if watchdog is None:
            late = now >= self._login_ends_at
            return self._login_ends_at, f"no log-in within {self._login_deadline_s:g} s" if late else ""
        watchdog.alive(self._wire.received_at)
        if watchdog.is_dead(now):
            return now, f"the controller is silent: two pings unanswered, {self._deadline_s:g} s each"
        if watchdog.should_ping(now):
            watchdog.pinged(now)
            self._due += 1
            self._changed.notify_all()
        return watchdog.next_at(), ""


def _bounded(interval_s: float) -> float:
    return max(MIN_INTERVAL_S, min(interval_s, MAX_INTERVAL_S))
