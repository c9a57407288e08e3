"""One link: an authenticated SSH connection from an SE, as the controller sees it.

Holds what the fleet's state is derived from. Decides nothing; who changes what is written at each field.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from appliance.controller.rate import Bucket
from appliance.protocol.fleet import LinkView, Reason

if TYPE_CHECKING:
    import asyncssh

    from appliance import settings

_log = logging.getLogger(__name__)

REFUSED_RESTS_S = 0.02
"""For how long a link isn't read after each refusal beyond its share: a flood of them takes a tenth of the time."""
WINDOW_S = 30.0
FEW = 3
"""Two windows of this length, of so many values at least, make up 'the last minute' of a minimum."""


class Minimum:
    """Minimum of the last 30 to 60 seconds, in two numbers a link instead of a list; and of all its life.

    Of one or two values each may have met a busy moment of either side. So a window, however seldom values come, ends
    with its third at the soonest, and `settled` has nothing to say before.
    """

    __slots__ = ("_before", "_count", "_current", "_since", "least")

    def __init__(self) -> None:
        self.least: float | None = None
        """Of all that was noted; of round trips it is what the way takes without a queue on it."""
        self._since = 0.0
        self._count = 0
        self._current: float | None = None
        self._before: float | None = None

    def add(self, value: float, now: float) -> None:
        """Notes one value; `now` is monotonic."""
        if self._count >= FEW and now - self._since >= WINDOW_S:
            self._before, self._current, self._count = self._current, None, 0
        if self._current is None:
            self._current, self._since = value, now
        self._current = min(self._current, value)
        self._count += 1
        self.least = value if self.least is None else min(self.least, value)

    @property
    def value(self) -> float | None:
        """The minimum, or None where nothing was noted yet."""
        if self._current is None or self._before is None:
            return self._current
        return min(self._current, self._before)

    @property
    def settled(self) -> float | None:
        """The minimum, or None where there were too few values for one."""
        return self.value if self._before is not None or self._count >= FEW else None


class Least:
    """The least of the last `FEW` values: one or two that were held up don't count, and no old one does."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[float, ...] = ()

    def add(self, value: float) -> None:
        """Notes one value."""
        self._last = (*self._last, value)[-FEW:]

    @property
    def value(self) -> float:
        """The least, 0 where nothing was noted yet."""
        return min(self._last, default=0.0)


class Link:
    """The state of one link. Times are monotonic seconds unless said otherwise."""

    __slots__ = (
        "agent_version",
        "audit_seen",
        "beats",
        "channels",
        "confirmed",
        "conn",
        "heartbeats",
        "hello_done",
        "is_gone",
        "lags",
        "last_seen",
        "link_id",
        "lost_reason",
        "lost_text",
        "machine",
        "on_up",
        "open_doors",
        "opened_at",
        "probes",
        "protocol",
        "quarantined",
        "rekeys_since",
        "reverse_at",
        "reverse_error",
        "reverse_granted",
        "reverse_ok",
        "rolled_back",
        "rtt",
        "se_id",
        "source",
        "spool_bytes",
        "terms",
        "thumbprint",
        "ticket",
        "tries",
        "trust_version",
        "was_rtt_high",
    )

    def __init__(
        self,
        conn: asyncssh.SSHServerConnection,
        *,
        link_id: int,
        se_id: str,
        thumbprint: str,
        source: str,
        terms: settings.Controller,
        now: float,
    ) -> None:
        self.conn = conn
        self.terms = terms
        self.link_id = link_id
        self.se_id = se_id
        self.thumbprint = thumbprint
        """Of the key that logged in: a new one may have taken its place since."""
        self.source = source
        self.machine = source
        """What tells this peer from a copy of it: the address it came from, and what it says of itself."""
        self.opened_at = self.last_seen = now
        self.channels = 0
        """Open channels the SE asked for."""
        self.is_gone = False
        """Closed, or about to be: who waited for something meanwhile must not take it up any more."""
        self.rekeys_since = 0.0
        """When the watch first saw the key exchange that is under way, 0 while there is none."""
        self.hello_done = False
        self.ticket = ""
        """Handed out in hello, awaits its confirmation."""
        self.protocol = 1
        """What hello agreed on."""
        self.confirmed = False
        self.probes: set[str] = set()
        """Refusals that belong to its self-test: each kind once, between confirm and the first heartbeat."""
        self.open_doors: tuple[str, ...] = ()
        """What its self-test was granted although it must not."""
        self.quarantined = False
        self.rolled_back = False
        """Admitted with an older ticket than the newest one known."""
        self.on_up: Callable[[], None] = lambda: None
        """Called at the first heartbeat."""
        self.heartbeats = 0
        self.beats = Bucket(terms.heartbeat_burst, now)
        """What it may still send of heartbeats."""
        self.rtt = Minimum()
        self.lags = Least()
        """How long after its own time, by our clock, its heartbeats came, seconds. What held one up, a freeze of this
        process or a full queue, only adds to that: the least lag is the one that tells of its clock. Of few, so that a
        clock that was set is told within seconds, either way: none is held up for a minute, or its link were lost."""
        self.was_rtt_high = False
        self.spool_bytes = self.trust_version = 0
        self.audit_seen = 0
        """Sequence of the newest audit head that was sent over it."""
        self.agent_version = ""
        self.reverse_granted = False
        """The SE asked for its own reverse address."""
        self.reverse_ok: bool | None = None
        self.reverse_error = ""
        self.reverse_at = 0.0
        """When the check last told, seconds since 1970."""
        self.lost_reason = Reason.LINK_LOST
        self.lost_text = ""

    def view(self) -> LinkView:
        """What the fleet's derivation sees."""
        return LinkView(
            confirmed=self.confirmed,
            heartbeats=self.heartbeats,
            reverse_ok=self.reverse_ok,
            rtt_s=self.rtt.settled,
            skew_s=-self.lags.value,
            spool_bytes=self.spool_bytes,
            reverse_error=self.reverse_error,
            rolled_back=self.rolled_back,
            open_doors=self.open_doors,
        )

    tries: Bucket
    """What it may still be refused before it has to wait; there from its first refusal beside its self-test on."""

    def was_refused(self, now: float) -> bool:
        """Notes a refusal; returns whether nothing more of this link shall be read for `REFUSED_RESTS_S`."""
        if not hasattr(self, "tries"):
            self.tries = Bucket(self.terms.refusal_burst, now)
        return not self.tries.take(now, rate_per_s=self.terms.refusal_rate_per_s, burst=self.terms.refusal_burst)

    def close(self, reason: Reason, text: str) -> None:
        """Closes the link now; a peer that no longer reads can't hold it up."""
        if not self.lost_text:
            self.lost_reason, self.lost_text = reason, text
        self.is_gone = True
        self.conn.abort()

    @property
    def is_rekeying(self) -> bool:
        """Whether a key exchange is under way."""
        return not self.conn._kex_complete  # noqa: SLF001 - asyncssh has no name for it
