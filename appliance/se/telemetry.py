"""Stage telemetry, the SE's half: samples on a fixed cadence, kept on disk until the controller has them.

`run` samples whether or not there is a link; each sample carries its own time. The heartbeat takes what waits with
`pending` and says `delivered` when it was answered. An answer settles the whole batch, also samples that the controller
counted as garbage: they would be refused again, and a spool that waits for them would never drain.

With a full disk the newest samples wait in memory (their figures say why the disk is full), and go to the spool as soon
as it takes them.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque

from appliance.errors import StorageError, TelemetryError
from appliance.protocol.telemetry import Sample, encode
from appliance.runtime import log as logs
from appliance.runtime.clock import Clock
from appliance.runtime.host import Host
from appliance.runtime.stop import StopToken
from appliance.storage.spool import Spool

MAX_BATCH = 60
MAX_BATCH_BYTES = 48 * 1024
"""Of one heartbeat: ten minutes of samples at once, while a body may have 256 KiB."""
MAX_HELD = 30
"""Samples kept in memory while the disk is full."""
FIRST_AFTER_S = 1.0
"""Utilisation needs a stretch of time to be over: the first sample waits this long."""

_log = logs.bind("telemetry")


class Telemetry:
    """Samples `host` into `spool`, and hands out what waits. `run` has one thread; the rest is for any.

    Args:
        spool: of encoded samples, ASCII.
        interval_s: between two samples.
        clock: its wall time stamps the samples, its monotonic time keeps the cadence.
        host: nobody else may sample it.
    """

    def __init__(self, spool: Spool, interval_s: float, clock: Clock, host: Host) -> None:
        self._spool = spool
        self._interval_s = interval_s
        self._clock = clock
        self._host = host
        self._mutex = threading.Lock()
        self._held: deque[tuple[int, str]] = deque(maxlen=MAX_HELD)
        """Number and text of samples that the spool didn't take; newer than all that it has."""
        self._numbers = itertools.count(1)
        self._said: dict[str, str] = {}

    def run(self, stop: StopToken) -> None:
        """Samples until stopped. Where the machine was too slow for a sample (or slept), that one is left out."""
        due_at = self._clock.monotonic() + min(FIRST_AFTER_S, self._interval_s)
        while not stop.wait(max(0.0, due_at - self._clock.monotonic())):
            self.sample()
            behind_s = max(0.0, self._clock.monotonic() - due_at)
            due_at += self._interval_s * (1 + behind_s // self._interval_s)

    def sample(self) -> None:
        """Takes one sample."""
        time = self._clock.now()
        points = self._host.points()
        unreadable = "; ".join(f"{kind} ({reason})" for kind, reason in self._host.unreadable.items())
        self._say("reading figures", f"this host hides some figures: {unreadable}" if unreadable else "")
        try:
            text = encode(Sample(time=time, points=points))
        except TelemetryError as error:
            self._say("encoding", f"a sample was left out: {error}")
            return
        self._say("encoding", "")
        with self._mutex:
            self._held.append((next(self._numbers), text))
            try:
                while self._held:
                    self._spool.append(self._held[0][1].encode("ascii"))
                    self._held.popleft()
            except StorageError as error:
                self._say("spooling", f"{error}; the last {MAX_HELD} samples wait in memory")
            else:
                self._say("spooling", "")

    def pending(self) -> tuple[list[str], int]:
        """Returns samples that wait, oldest first, and the id to hand to `delivered`; ([], 0) where none does.

        At most `MAX_BATCH` samples and `MAX_BATCH_BYTES` of text, so a long outage is caught up over some heartbeats.
        """
        try:
            items = self._spool.peek(MAX_BATCH)
        except StorageError as error:
            self._say("reading the spool", str(error))
            items = []
        else:
            self._say("reading the spool", "")
        waiting = [(number, item.decode("ascii", errors="replace")) for number, item in items]
        if not waiting:  # held ones are newer than all of the spool: they wait for their turn
            with self._mutex:
                waiting = [(-number, text) for number, text in self._held]
        batch: list[str] = []
        last_id = size_bytes = 0
        for number, text in waiting:
            size_bytes += len(text)
            if batch and size_bytes > MAX_BATCH_BYTES:
                break
            batch.append(text)
            last_id = number
        return batch, last_id

    def delivered(self, last_id: int) -> None:
        """The controller answered a heartbeat that carried all samples up to `last_id` (as `pending` gave it)."""
        if last_id < 0:
            with self._mutex:
                while self._held and self._held[0][0] <= -last_id:
                    self._held.popleft()
            return
        try:
            self._spool.acknowledge(last_id)
        except StorageError as error:  # may be sent again after a restart; the controller knows them by their time
            self._say("acknowledging", str(error))
        else:
            self._say("acknowledging", "")

    def _say(self, matter: str, text: str) -> None:
        """Logs what is wrong with a matter when that changes, not at each sample; "" when nothing is any more."""
        if self._said.get(matter, "") == text:
            return
        self._said[matter] = text
        if text:
            _log.warning(text)
        else:
            _log.info("%s works again", matter)
