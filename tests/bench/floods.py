"""What a fleet's heartbeats feel of hostile peers: their p99 under each flood, beside the quiet one of the same size.

The floods come from a thread of the lowest priority, since other machines would make them; the controller's share of
the work is in the figures.
"""

from __future__ import annotations

import time

import msgspec
from floods import FLOODS, Flood, Target, from_outside
from rig import refused

from appliance.lab.fleet import FleetReport
from appliance.protocol.seed import Bundle
from bench import fleet
from bench.report import Report, Row
from bench.stand import Options, Stand

SETTINGS = {"source_rate_per_s": 100_000.0, "source_burst": 100_000}
"""The fleet and the floods come from one address; all other limits are as they are shipped."""
FACTOR = 2.0
"""Of the quiet p99: the goal."""


def run(stand: Stand, options: Options) -> Report:
    """Measures a quiet fleet, then one under each flood, each of `--ses` for `--seconds`."""
    quiet, _ = _measured(stand, options, None)
    rows = [Row(name="flood.none_p99_ms", value=round(quiet.heartbeat_p99_ms, 2), unit="ms", better="low")]
    notes = [f"{stand.what}; {options.ses} SEs UP, {options.seconds:.0f} s measured, floods on the same cores"]
    for flood in FLOODS:
        report, turned_away = _measured(stand, options, flood)
        goal = round(FACTOR * quiet.heartbeat_p99_ms, 2)
        rows += [
            Row(
                name=f"flood.{flood.name}_p99_ms", value=round(report.heartbeat_p99_ms, 2), unit="ms", goal=goal,
                better="low",
            ),
            Row(
                name=f"flood.{flood.name}_lost", value=report.lost_heartbeats + report.reconnects,
                unit="heartbeats and links", goal=0, better="low",
            ),
        ]  # fmt: skip
        notes.append(
            f"{flood.name} x {flood.large}: {report.heartbeats} heartbeats, median {report.heartbeat_p50_ms:.1f} ms; "
            f"turned away: {', '.join(f'{count} {reason}' for reason, count in turned_away.items()) or 'nobody'}"
        )
    return Report(bench="floods", rows=rows, notes=notes)


def _measured(stand: Stand, options: Options, flood: Flood | None) -> tuple[FleetReport, dict[str, int]]:
    stand.say(f"{options.ses} SEs, {flood.name if flood else 'no flood'}")
    with fleet.settled(stand, options.ses, settings=SETTINGS) as found:
        at = found.controller
        bundle = msgspec.json.decode(at.bundle(uses=len(FLOODS)).read_bytes(), type=Bundle)
        target = Target(bundle, at.bound["enroll_port"], at.bound["ssh_port"], at.operator)
        before = refused(at.bound["metrics_port"])
        found.begin()
        if flood:
            from_outside(flood.work(target, flood.large, time.monotonic() + options.seconds))
        else:
            fleet.pass_time(options.seconds, found.process, found.log)
        report = found.end()
        counted = {reason: now - before.get(reason, 0) for reason, now in refused(at.bound["metrics_port"]).items()}
        return report, {reason: more for reason, more in counted.items() if more}
