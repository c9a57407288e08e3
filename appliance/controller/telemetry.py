"""Stage telemetry, the controller's half: what SEs sent lately, in memory only.

Kept per SE, as bytes as they came: the sample that came last, and a history by the SE's own time stamps. The history
holds every sample of the last `FULL_S` and one for each `COARSE_S` before that, back to `history_s`; all SEs together
stay under `max_bytes`, of which each SE has an equal share. A sample is read when it arrives, to refuse garbage, and
again when someone asks; decoded ones are not kept (50 points take ten times the room).

An SE's clock may be wrong. A sample whose time lies more than `history_s` away from the controller's, either way, shows
as the latest but doesn't enter the history: one sample from 2099 would otherwise push out everything else.

Refusing is final: the SE drops a refused sample from its spool, it would be refused again.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from appliance.errors import TelemetryError
from appliance.protocol.telemetry import Sample, decode, glance

FULL_S = 300.0
COARSE_S = 60.0
MAX_BYTES = 32 * 1024 * 1024
"""At 10,000 SEs the last minute of each, at 1,000 about half an hour: a controller is no archive."""
_ENTRY_BYTES = 180
"""What the interpreter adds to the text of one sample: string, tuple, float, list slot."""


class Figures(NamedTuple):
    """What the table of the fleet shows of a sample; None where the sample lacks it."""

    time: float
    cpu_pct: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    uptime_s: float | None


_SHOWN = frozenset({"system.cpu.utilization", "system.memory.usage", "system.memory.limit", "system.uptime"})
"""Metrics that `Figures` come from."""


def figures(text: str) -> Figures:
    """Returns the table's figures of a sample, all of which is checked. Raises as `decode`.

    CPU is all time but idle and waiting for disks, of all CPUs.
    """
    time, values = glance(text, _SHOWN)
    idle = values.get(("system.cpu.utilization", "idle"))
    waiting = values.get(("system.cpu.utilization", "iowait"), 0.0)
    used = values.get(("system.memory.usage", "used"))
    total = values.get(("system.memory.limit",))
    return Figures(
        time=time,
        cpu_pct=None if idle is None else round(max(0.0, 1.0 - idle - waiting) * 100, 2),
        memory_used_bytes=None if used is None else int(used),
        memory_total_bytes=None if total is None else int(total),
        uptime_s=values.get(("system.uptime",)),
    )


class _Kept:
    """What is kept of one SE; `samples` ascend by time."""

    __slots__ = ("figures", "latest", "room_bytes", "samples", "thin_at")

    def __init__(self) -> None:
        self.latest = ""
        self.figures = Figures(0.0, None, None, None, None)
        self.samples: list[tuple[float, str]] = []
        self.room_bytes = 0
        self.thin_at = 0.0

    def insert(self, time: float, encoded: str) -> bool:
        """Puts a sample in its place; returns False where one of that time is there already."""
        place = bisect.bisect_left(self.samples, (time,))
        if place < len(self.samples) and self.samples[place][0] == time:
            return False
        self.samples.insert(place, (time, encoded))
        self.room_bytes += len(encoded) + _ENTRY_BYTES
        return True

    def thin(self, *, oldest: float, full_from: float) -> None:
        """Drops what is older than `oldest`, and all but one a `COARSE_S` of what is older than `full_from`."""
        kept: list[tuple[float, str]] = []
        for time, encoded in self.samples:
            if time < oldest or (time < full_from and kept and time - kept[-1][0] < COARSE_S):
                continue
            kept.append((time, encoded))
        self.samples = kept
        self.room_bytes = sum(len(encoded) + _ENTRY_BYTES for _, encoded in kept)

    def shrink(self, room_bytes: int) -> None:
        """Drops the oldest until the rest fits; the newest stays."""
        gone = 0
        while self.room_bytes > room_bytes and gone < len(self.samples) - 1:
            self.room_bytes -= len(self.samples[gone][1]) + _ENTRY_BYTES
            gone += 1
        del self.samples[:gone]


class History:
    """Latest sample and recent history of each SE. For one thread (the controller's loop).

    Args:
        history_s: how far back to keep, seconds; 0 keeps the latest alone.
        max_bytes: memory for all SEs together.
    """

    def __init__(self, *, history_s: float, max_bytes: int = MAX_BYTES) -> None:
        self._history_s = history_s
        self._max_bytes = max_bytes
        self._ses: dict[str, _Kept] = {}
        self.accepted = 0
        """Samples taken since start."""
        self.refused: Counter[str] = Counter()
        """Code of the fault (`protocol.telemetry.Faults`) to how many samples had it."""

    def accept(self, se_id: str, encoded: Iterable[str], now: float) -> int:
        """Takes what one heartbeat carried, oldest first; returns how many samples are good, known ones among them.

        Never raises for what an SE may send: garbage is counted in `refused`. `now` is the controller's wall clock.
        """
        good = 0
        for text in encoded:
            try:
                shown = figures(text)
            except TelemetryError as error:
                self.refused[error.code] += 1
                continue
            good += 1
            self._keep(se_id, shown, text, now)
        self.accepted += good
        return good

    def _keep(self, se_id: str, shown: Figures, text: str, now: float) -> None:
        kept = self._ses.get(se_id)
        if kept is None:
            kept = self._ses[se_id] = _Kept()
        kept.latest = text
        kept.figures = shown
        if abs(shown.time - now) >= self._history_s or not kept.insert(shown.time, text):
            return
        if now >= kept.thin_at:
            kept.thin(oldest=now - self._history_s, full_from=now - FULL_S)
            kept.thin_at = now + COARSE_S
        kept.shrink(self._max_bytes // len(self._ses))

    def latest(self, se_id: str) -> Sample | None:
        """Returns the sample that came last, or None where none ever came."""
        kept = self._ses.get(se_id)
        return decode(kept.latest) if kept else None

    def latest_text(self, se_id: str) -> str:
        """Returns the text of the sample that came last, "" where none ever came."""
        kept = self._ses.get(se_id)
        return kept.latest if kept else ""

    def recent(self, se_id: str, since: float) -> list[Sample]:
        """Returns the kept samples from the SE's time `since` on, oldest first."""
        kept = self._ses.get(se_id)
        if kept is None:
            return []
        first = bisect.bisect_left(kept.samples, (since,))
        return [decode(text) for _, text in kept.samples[first:]]

    def drop(self, se_id: str) -> None:
        """Forgets an SE."""
        self._ses.pop(se_id, None)

    @property
    def size_bytes(self) -> int:
        """Memory that the histories take."""
        return sum(kept.room_bytes for kept in self._ses.values())

    def figures(self, se_id: str) -> Figures | None:
        """Returns the table's figures of the latest sample without decoding it, or None where there is none."""
        kept = self._ses.get(se_id)
        return kept.figures if kept else None

    def cpu_pct(self, se_id: str) -> float | None:
        """Busy share of the CPUs, percent."""
        known = self.figures(se_id)
        return known.cpu_pct if known else None

    def memory_used_bytes(self, se_id: str) -> int | None:
        """Memory not available to new programs."""
        known = self.figures(se_id)
        return known.memory_used_bytes if known else None

    def memory_total_bytes(self, se_id: str) -> int | None:
        """Memory in all."""
        known = self.figures(se_id)
        return known.memory_total_bytes if known else None

    def uptime_s(self, se_id: str) -> float | None:
        """The host's uptime when the latest sample was taken."""
        known = self.figures(se_id)
        return known.uptime_s if known else None
