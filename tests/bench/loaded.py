"""Enrollments beside a fleet that is UP: how many a second, and what the fleet's heartbeats feel of it."""

from __future__ import annotations

import time
from typing import NamedTuple

import uvloop

from appliance.lab.fleet import FleetReport, percentile
from bench import fleet
from bench.enroll import enroll_many
from bench.processes import cpu_s
from bench.report import Report, Row
from bench.stand import Options, Stand

CLIENTS = 16
RATE_GOAL_PER_S = 200
OFFERED = 1.05
"""Of the goal: what comes while heartbeats are measured. At the most that a controller can do all would wait."""


def run(stand: Stand, options: Options) -> Report:
    """Brings a fleet up, measures its heartbeats in quiet, then beside enrollments."""
    quiet, _ = _measured(stand, options, count=0)
    beside, enrolled = _measured(stand, options, count=options.count)
    return Report(
        bench="loaded",
        rows=[
            Row(
                name="enroll.per_s_loaded", value=round(options.count / enrolled.fastest_s, 1), unit="1/s",
                goal=RATE_GOAL_PER_S, better="high",
            ),
            Row(
                name="enroll.per_s_sustained", value=round(options.count / enrolled.paced_s, 1), unit="1/s",
                goal=RATE_GOAL_PER_S, better="high",
            ),
            Row(
                name="enroll.p99_ms_loaded", value=round(percentile(enrolled.each_s, 0.99) * 1000, 1), unit="ms",
                better="low",
            ),
            Row(
                name="fleet.heartbeat_p99_ms_loaded", value=round(beside.heartbeat_p99_ms, 2), unit="ms",
                goal=round(2 * quiet.heartbeat_p99_ms, 2), better="low",
            ),
            Row(
                name="fleet.lost_heartbeats_loaded", value=beside.lost_heartbeats, unit="heartbeats", goal=0,
                better="low",
            ),
        ],
        notes=[
            f"{stand.what}; {options.ses} SEs UP, {options.count} enrollments by {CLIENTS} clients on these cores, "
            f"then as many at {OFFERED * RATE_GOAL_PER_S:.0f} a second, which heartbeats are measured beside",
            f"in quiet the fleet's heartbeats had a p99 of {quiet.heartbeat_p99_ms:.1f} ms; the goal is twice that",
        ],
    )  # fmt: skip


class _Enrolled(NamedTuple):
    """What the clients saw."""

    fastest_s: float
    """For all of them, as fast as they could."""
    paced_s: float
    """For as many once more, so many a second."""
    each_s: list[float]
    """For each of the fast ones."""


def _measured(stand: Stand, options: Options, *, count: int) -> tuple[FleetReport, _Enrolled]:
    with fleet.settled(stand, options.ses) as found:
        fastest_s = paced_s = 0.0
        each_s: list[float] = []
        if count:
            stand.say(f"{count} enrollments by {CLIENTS} clients, as fast as they can")
            fastest_s, each_s = uvloop.run(enroll_many(found.controller, count, clients=CLIENTS))
        found.begin()
        used_s, began = cpu_s([found.controller.pid]), time.monotonic()
        if count:
            per_s = OFFERED * RATE_GOAL_PER_S
            stand.say(f"{count} more, {per_s:.0f} a second")
            paced_s, _ = uvloop.run(enroll_many(found.controller, count, clients=CLIENTS, per_s=per_s))
        else:
            stand.say(f"measuring for {options.seconds:.0f} s")
            fleet.pass_time(options.seconds, found.process, found.log)
        took_s = time.monotonic() - began
        used = (cpu_s([found.controller.pid]) - used_s) / took_s * 100
        stand.say(f"the controller took {used:.0f} % of a core")
        return found.end(), _Enrolled(fastest_s, paced_s, each_s)
