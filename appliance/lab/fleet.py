"""A simulated fleet: many `SimulatedSe` in one process, enrolled, linked and beating until told to stop.

Life of a fleet: enroll all, link all, then a measured time in which every SE beats at the interval the controller
gives, brings telemetry, and redials with back-off when its link is lost. What was measured is one `FleetReport`;
reports of several processes add up.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import asyncssh
import msgspec

from appliance.errors import ApplianceError, EnrollError
from appliance.lab.simulated import Beats, SharedSshd, SimulatedSe
from appliance.lab.simulated_link import TurnError
from appliance.protocol import telemetry
from appliance.protocol.seed import Bundle
from appliance.protocol.telemetry import Sample
from appliance.runtime.backoff import Backoff
from appliance.runtime.host import Host

_log = logging.getLogger(__name__)

ENROLL_AT_ONCE = 16
LINK_TIMEOUT_S = 30.0
BEAT_TIMEOUT_S = 9.0
TELEMETRY_S = 10.0
WARM_UP_S = 5.0
"""Between the last link and the measured time: the reverse paths' checks are still under way."""
SES_PER_PROCESS = 2500


class FleetReport(msgspec.Struct, kw_only=True):
    """What one or several processes of a fleet measured."""

    ses: int
    enrolled: int
    linked: int
    """Links that stood at the end of the measured time."""
    enroll_s: float
    link_s: float
    measured_s: float
    heartbeats: int
    lost_heartbeats: int
    reconnects: int
    heartbeat_p50_ms: float
    heartbeat_p99_ms: float
    refusals: dict[str, int]


def percentile(values: Iterable[float], part: float) -> float:
    """The value below which `part` (0 .. 1) of `values` lie; 0 where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0


class SharedTelemetry:
    """One encoded sample of this host for all SEs of the process, made anew every `TELEMETRY_S`."""

    def __init__(self) -> None:
        self._host = Host()
        self._made_at = 0.0
        self._encoded = ""

    def __call__(self) -> list[str]:
        now = time.time()
        if now - self._made_at >= TELEMETRY_S:
            self._encoded = telemetry.encode(Sample(time=now, points=self._host.points()))
            self._made_at = now
        return [self._encoded]


class Fleet:
    """All simulated SEs of one process."""

    def __init__(self, bundle: Bundle, *, ses: int, prefix: str, say: Callable[[str], None]) -> None:
        self._bundle = bundle
        self._count = ses
        self._prefix = prefix
        self._say = say
        self._beats = Beats()
        self._refusals: dict[str, int] = {}
        self._reconnects = 0
        self._linked = 0
        self._stop = asyncio.Event()
        self._measured_from = 0.0
        self.ses: list[SimulatedSe] = []

    def stop(self) -> None:
        """Ends the measured time early."""
        self._stop.set()

    @property
    def is_measuring(self) -> bool:
        """Whether the measured time has begun: whatever is lost from now on is in the report."""
        return self._measured_from > 0

    def begin(self) -> None:
        """Begins the measured time anew: what was measured so far is forgotten."""
        self._beats.rtts_s.clear()
        self._beats.answered = self._beats.lost = self._reconnects = 0
        self._refusals.clear()
        self._measured_from = time.monotonic()

    async def run(self, seconds: float) -> FleetReport:
        """Runs the whole life; `seconds` is the measured time, 0 means until `stop`."""
        sshd = SharedSshd()
        shared = SharedTelemetry()
        self.ses = [
            SimulatedSe(
                self._bundle,
                name=f"{self._prefix}{index}",
                sshd=sshd,
                beats=self._beats,
                telemetry=shared,
            )
            for index in range(1, self._count + 1)
        ]
        tasks: list[asyncio.Task[None]] = []
        try:
            began = time.monotonic()
            await self._all("enrolled", ENROLL_AT_ONCE, [self._enroll(se) for se in self.ses])
            enroll_s = time.monotonic() - began
            enrolled = [se for se in self.ses if se.grant is not None]
            began = time.monotonic()
            ready = [asyncio.Event() for _ in enrolled]
            tasks = [asyncio.create_task(self._live(se, up)) for se, up in zip(enrolled, ready, strict=True)]
            await self._all("linked", len(ready) or 1, [self._until(up) for up in ready])
            link_s = time.monotonic() - began
            await self._wait(WARM_UP_S)
            refused = dict(self._refusals)
            self.begin()
            self._refusals.update(refused)
            self._say("measuring")
            await self._wait(seconds or None)
            rtts = list(self._beats.rtts_s)
            return FleetReport(
                ses=self._count,
                enrolled=len(enrolled),
                linked=self._linked,
                enroll_s=enroll_s,
                link_s=link_s,
                measured_s=time.monotonic() - self._measured_from,
                heartbeats=self._beats.answered,
                lost_heartbeats=self._beats.lost,
                reconnects=self._reconnects,
                heartbeat_p50_ms=percentile(rtts, 0.5) * 1000,
                heartbeat_p99_ms=percentile(rtts, 0.99) * 1000,
                refusals=dict(self._refusals),
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for se in self.ses:
                se.close()

    async def _wait(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return

    async def _until(self, event: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()), asyncio.create_task(self._stop.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _all(self, what: str, at_once: int, work: list[Coroutine[Any, Any, None]]) -> None:
        turns = asyncio.Semaphore(at_once)
        done = 0
        told = time.monotonic()

        async def one(job: Coroutine[Any, Any, None]) -> None:
            nonlocal done, told
            async with turns:
                await job
            done += 1
            if time.monotonic() - told >= 2 or done == len(work):
                told = time.monotonic()
                self._say(f"{done} of {len(work)} {what}")

        await asyncio.gather(*(one(job) for job in work))

    async def _enroll(self, se: SimulatedSe) -> None:
        backoff = Backoff(most_s=10.0)
        while not self._stop.is_set():
            try:
                await se.enroll()
                return
            except EnrollError as error:
                self._refusals[error.code] = self._refusals.get(error.code, 0) + 1
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self._refusals[type(error).__name__] = self._refusals.get(type(error).__name__, 0) + 1
            await self._wait(backoff.next_s())

    async def _live(self, se: SimulatedSe, up: asyncio.Event) -> None:
        """Links, beats, redials, for ever."""
        backoff = Backoff()
        while True:
            try:
                async with asyncio.timeout(LINK_TIMEOUT_S):
                    await se.link()
                    await se.beat(telemetry=True)
            except TurnError as error:
                self._refusals["slot"] = self._refusals.get("slot", 0) + 1
                se.close()
                await asyncio.sleep(error.wait_s)
                continue
            except (ApplianceError, asyncssh.Error, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self._refusals[type(error).__name__] = self._refusals.get(type(error).__name__, 0) + 1
                se.close()
                await asyncio.sleep(backoff.next_s())
                continue
            if up.is_set():
                self._reconnects += 1
            up.set()
            backoff.reset()
            self._linked += 1
            try:
                await self._beat(se)
            except (ApplianceError, asyncssh.Error, OSError, TimeoutError, asyncio.IncompleteReadError):
                self._beats.lost += 1
            finally:
                self._linked -= 1
                se.close()
            await asyncio.sleep(backoff.next_s())

    async def _beat(self, se: SimulatedSe) -> None:
        # Spread over the interval, as a fleet that came up by itself is.
        await asyncio.sleep(random.uniform(0, se.interval_s))  # noqa: S311 - no secret
        last_telemetry = time.monotonic()
        while True:
            due = time.monotonic() - last_telemetry >= TELEMETRY_S
            if due:
                last_telemetry = time.monotonic()
            started = time.monotonic()
            async with asyncio.timeout(BEAT_TIMEOUT_S):
                await se.beat(telemetry=due)
            await asyncio.sleep(max(0.0, se.interval_s - (time.monotonic() - started)))


def combine(reports: list[FleetReport]) -> FleetReport:
    """Adds up the reports of several processes; percentiles are those of the worst process."""
    refusals: dict[str, int] = {}
    for report in reports:
        for code, count in report.refusals.items():
            refusals[code] = refusals.get(code, 0) + count
    return FleetReport(
        ses=sum(report.ses for report in reports),
        enrolled=sum(report.enrolled for report in reports),
        linked=sum(report.linked for report in reports),
        enroll_s=max(report.enroll_s for report in reports),
        link_s=max(report.link_s for report in reports),
        measured_s=min(report.measured_s for report in reports),
        heartbeats=sum(report.heartbeats for report in reports),
        lost_heartbeats=sum(report.lost_heartbeats for report in reports),
        reconnects=sum(report.reconnects for report in reports),
        heartbeat_p50_ms=max(report.heartbeat_p50_ms for report in reports),
        heartbeat_p99_ms=max(report.heartbeat_p99_ms for report in reports),
        refusals=refusals,
    )
