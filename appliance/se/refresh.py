"""Asks for the grant again when no link has been there for long: addresses, host keys or roots may have changed.

What enrolling needs is loaded only then, in this process: it costs some megabytes once, and the links go on being tried
meanwhile. As soon as one comes up the refresh ends, whatever it got.
"""

from __future__ import annotations

from collections.abc import Callable

from appliance.paths import Paths
from appliance.protocol.why import Step, StepResult
from appliance.runtime import log
from appliance.runtime.clock import Clock
from appliance.runtime.stop import StopToken
from appliance.se.believed import Beliefs
from appliance.se.identity import SeState
from appliance.se.links import Links
from appliance.se.ssh import KEY_REFUSED
from appliance.settings import Se

Tell = Callable[[Step, StepResult, str, str, str], None]
"""Takes a step of the causal chain: step, result, text, code, hint."""

_LOOK_S = 0.2
"""Least time between two looks."""


class Refresh:
    """The service."""

    def __init__(
        self, paths: Paths, settings: Se, *, state: SeState, beliefs: Beliefs, links: Links, clock: Clock, tell: Tell
    ) -> None:
        self._log = log.bind("enroll")
        self._paths = paths
        self._settings = settings
        self._state = state
        self._beliefs = beliefs
        self._links = links
        self._clock = clock
        self._tell = tell
        self._attempt: StopToken | None = None
        self._refusal: tuple[str, str, str] | None = None
        """Text, code and hint of what the controller said last when it was asked for the grant."""

    def tell(self, step: Step, result: StepResult, text: str, code: str, hint: str) -> None:
        """Takes a step of the causal chain from a link and hands it on.

        A gateway tells nobody why it doesn't take a key; the enroll port, asked with that key, does.
        """
        if code == KEY_REFUSED and self._refusal is not None:
            text, code, hint = self._refusal
        self._tell(step, result, text, code, hint)

    def _note(self, step: Step, result: StepResult, text: str, code: str, hint: str) -> None:
        """The steps of first boot happened and still hold; only a refusal is news."""
        if step is Step.GRANT:
            self._refusal = (text, code, hint) if result is StepResult.FAILED else None

    def link_is_up(self) -> None:
        """Ends a refresh that is under way."""
        self._refusal = None
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
            tell=self._note,
            tell_line=lambda _text: None,
        )
        if self._links.down_for_s():
            enrollment.refresh(attempt)
        self._attempt = None
        if not attempt.stopped:
            self._links.follow()
