"""The last descriptors of the process are kept for those inside: operators, the store, the reverse paths.

A new descriptor has the lowest number that is free (POSIX.1-2017, open()). So the number of an accepted connection says
how many are left, and whoever would take one of the last is turned away; `status` and `why` say so meanwhile.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable

RESERVED = 64
"""Fewer where the limit is low: an eighth of it."""
TOLD_S = 60.0
"""How long the last shortage is told."""


class Descriptors:
    """Who may have one. The limit is read each time: an operator may raise it on the running process (prlimit)."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._short_at = -math.inf
        self.refused = 0
        """Connections that found none, or one of the reserve."""

    def spares(self, descriptor: int) -> bool:
        """Whether a connection may keep the number it was accepted under; one that may not is counted."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit == resource.RLIM_INFINITY or descriptor < limit - min(RESERVED, limit // 8):
            return True
        self.ran_out()
        return False

    def ran_out(self) -> None:
        """There is none for one more connection."""
        self.refused += 1
        self._short_at = self._monotonic()

    def problem(self) -> str:
        """What an operator should know, "" where there were enough lately."""
        if self._monotonic() - self._short_at > TOLD_S:
            return ""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"connections are turned away: nearly all of {limit} file descriptors are in use; "
            "raise LimitNOFILE of the unit, or lower controller.max_links"
        )
