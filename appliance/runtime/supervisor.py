"""Runs a daemon's named services, one thread each, until it is told to stop or a critical one fails.

| service ends       | critical                        | not critical                    |
| ------------------ | ------------------------------- | ------------------------------- |
| it was told to     | fine                            | fine                            |
| returns by itself  | fine: it had one thing to do    | fine                            |
| raises             | everything stops, `run` raises  | restarted, with a back-off that |
|                    | that error                      | a life of 30 s resets           |

Each start, end, failure and restart is one sentence in the log. When all services have returned, so does `run`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from appliance.errors import ApplianceError
from appliance.runtime import log as logs
from appliance.runtime.backoff import Backoff
from appliance.runtime.clock import Clock
from appliance.runtime.stop import StopToken

STEADY_AFTER_S = 30.0
"""A service that lived this long starts its back-off over."""

_log = logs.bind("supervisor")


class _Service(NamedTuple):
    name: str
    run: Callable[[StopToken], None]
    critical: bool


class Supervisor:
    """Starts, restarts and joins services.

    Args:
        stop: ends everything.
        clock: measures how long a service lived.
        tick: called from `run` at least each `tick_s`; for systemd's watchdog, so that a daemon whose main thread hangs
            is restarted.
        tick_s: interval of `tick`.
        join_timeout_s: how long services may take to return once told to stop; who takes longer is named and left.
    """

    def __init__(
        self,
        stop: StopToken,
        *,
        clock: Clock,
        tick: Callable[[], None] | None = None,
        tick_s: float | None = None,
        join_timeout_s: float = 10.0,
    ) -> None:
        self._stop = stop
        self._clock = clock
        self._tick = tick
        self._tick_s = tick_s if tick is not None else None
        self._join_timeout_s = join_timeout_s
        self._services: list[_Service] = []
        # SimpleQueue, since its put() may be called from anywhere, even from within a get() of the same thread.
        self._ended: queue.SimpleQueue[tuple[str, BaseException | None]] = queue.SimpleQueue()

    def add(self, name: str, run: Callable[[StopToken], None], *, critical: bool) -> None:
        """Adds a service before `run`; `run` gets a token that it must obey, and returns or raises."""
        self._services.append(_Service(name, run, critical))

    def run(self) -> None:
        """Blocks until stopped, until all services returned, or until a critical one failed.

        Raises:
            Exception: what the critical service raised, after all others were stopped and joined.
        """
        token = self._stop.child()
        withdraw = token.on_stop(lambda: self._ended.put(("", None)))
        threads = [
            threading.Thread(target=self._live, args=(service, token), name=service.name, daemon=True)
            for service in self._services
        ]
        for thread in threads:
            thread.start()
        try:
            failure = self._watch(token, len(threads))
        finally:
            withdraw()
            token.stop("the supervisor ends")
            self._join(threads)
        if failure is not None:
            raise failure

    def _watch(self, token: StopToken, count: int) -> BaseException | None:
        while count and not token.stopped:
            try:
                name, error = self._ended.get(timeout=self._tick_s)
            except queue.Empty:
                name, error = "", None
            if self._tick is not None:
                self._tick()
            if error is not None:
                token.stop(f"critical service {name!r} failed: {error}")
                return error
            count -= bool(name)
        return None

    def _join(self, threads: list[threading.Thread]) -> None:
        deadline = self._clock.monotonic() + self._join_timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - self._clock.monotonic()))
            if thread.is_alive():
                _log.error("service %r didn't stop within %g s, left behind", thread.name, self._join_timeout_s)

    def _live(self, service: _Service, token: StopToken) -> None:
        """Body of a service's thread."""
        error: BaseException | None = None
        try:
            self._repeat(service, token)
        except BaseException as raised:  # noqa: BLE001 - carried over to the thread that called run()
            error = raised
        self._ended.put((service.name, error))

    def _repeat(self, service: _Service, token: StopToken) -> None:
        backoff = Backoff()
        while not token.stopped:
            _log.info("service %r starts", service.name)
            started = self._clock.monotonic()
            try:
                service.run(token)
            except Exception as error:
                if token.wait(0):
                    _log.warning("service %r failed while it stopped: %s", service.name, error)
                    return
                known = isinstance(error, ApplianceError)
                if service.critical:
                    _log.error("critical service %r failed: %s", service.name, error, exc_info=not known)
                    raise
                if self._clock.monotonic() - started >= STEADY_AFTER_S:
                    backoff.reset()
                wait_s = backoff.next_s()
                _log.warning(
                    "service %r failed, starts again in %.1f s: %s", service.name, wait_s, error, exc_info=not known
                )
                token.wait(wait_s)
            else:
                _log.info("service %r ended%s", service.name, f": {token.reason}" if token.stopped else "")
                return
