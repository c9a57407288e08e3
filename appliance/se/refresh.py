"""Asks for the grant again when no link has been there for long: addresses, host keys or roots may have changed.

What enrolling needs is loaded only then, in this process: it costs some megabytes once, and the links go on being tried
meanwhile. As soon as one comes up the refresh ends, whatever it got.
"""

from __future__ import annotations

from appliance.paths import Paths
from appliance.protocol.why import Step, StepResult
from appliance.runtime import log
from appliance.runtime.clock import Clock
from appliance.runtime.stop import StopToken
from appliance.se.believed import Beliefs
from appliance.se.identity import SeState
from appliance.se.links import Links
from appliance.settings import Se

_LOOK_S = 0.2
"""Least time between two looks."""


class Refresh:
    """The service."""

    def __init__(
        self, paths: Paths, settings: Se, *, state: SeState, beliefs: Beliefs, links: Links, clock: Clock
    ) -> None:
        self._log = log.bind("enroll")
        self._paths = paths
        self._settings = settings
        self._state = state
        self._beliefs = beliefs
        self._links = links
        self._clock = clock
        self._attempt: StopToken | None = None

    def link_is_up(self) -> None:
        """Ends a refresh that is under way."""
        if self._attempt is not None:
            self._attempt.stop("a link is up")

    def run(self, stop: StopToken) -> None:
        """Watches until stopped."""
        after_s, last_at = self._settings.refresh_after_s, self._clock.monotonic()
        while True:
            down_s = min(self._links.down_for_s(), self._clock.monotonic() - last_at)
            if stop.wait(max(_LOOK_S, after_s - down_s) if down_s < after_s else 0.0):
                return
            if down_s >= after_s:
                self._refresh(stop)
                last_at = self._clock.monotonic()

    def _refresh(self, stop: StopToken) -> None:
        from appliance.se.first_boot import Enrollment

        self._log.warning("no link for %.0f s: asking for the grant again", self._links.down_for_s())
        attempt = self._attempt = stop.child()
        enrollment = Enrollment(
            self._paths,
            self._settings,
            state=self._state,
            beliefs=self._beliefs,
            clock=self._clock,
            # The steps of first boot happened and still hold; a failed refresh is in the log.
            tell=_pass_over,
            tell_line=lambda _text: None,
        )
        if self._links.down_for_s():
            enrollment.refresh(attempt)
        self._attempt = None
        if not attempt.stopped:
            self._links.follow()


def _pass_over(step: Step, result: StepResult, text: str, code: str, hint: str) -> None:
    """Takes a step of the causal chain and keeps it to itself."""
