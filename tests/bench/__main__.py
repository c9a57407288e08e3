"""Runs benches by name; see scripts/bench for how it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from appliance.errors import ApplianceError
from bench.processes import BenchError
from bench.report import Progress, Report, combine, dated, table
from bench.stand import Options, Stand

BENCHES = ("start", "enroll", "agent", "recovery", "bulk", "fleet", "image")
BY_NAME_ONLY = ("floods", "growth", "loaded", "resets")
"""Not among `all`: they take too long."""
BUSY_LOAD = 0.5


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measures the product beside a peer.")
    parser.add_argument("name", choices=[*BENCHES, *BY_NAME_ONLY, "all"], help="which bench")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--source", action="store_true", help="measure the sources instead of the frozen executables")
    parser.add_argument("--ses", type=int, default=1000, help="fleet: how many SEs (1000)")
    parser.add_argument("--storm", action="store_true", help="fleet: kill the controller under its SEs, start it again")
    parser.add_argument("--count", type=int, default=1000, help="enroll, loaded, resets: how many (1000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="agent, fleet: measured time (60)")
    parser.add_argument("--settle", type=float, default=60.0, help="agent: idle time before it is measured (60)")
    parser.add_argument("--keep", action="store_true", help="keep state and logs")
    return parser.parse_args()


def main() -> int:
    """Returns 0 where all could be measured, whether goals were reached or not."""
    arguments = _arguments()
    say = Progress()
    options = Options(
        ses=arguments.ses, count=arguments.count, seconds=arguments.seconds, settle_s=arguments.settle,
        storm=arguments.storm,
        keep=arguments.keep,
    )  # fmt: skip
    stand = Stand(frozen=not arguments.source, say=say, keep=options.keep)
    if stand.frozen and not stand.directory_form.is_file():
        print(f"bench: there is no {stand.directory_form}: run scripts/build, or give --source", file=sys.stderr)
        return 1
    reports, failed = [], 0
    for name in BENCHES if arguments.name == "all" else (arguments.name,):
        run: Callable[[Stand, Options], Report] = importlib.import_module(f"bench.{name}").run
        say(f"{name}: load of the machine before it {Path('/proc/loadavg').read_text().split()[0]}")
        load = float(Path("/proc/loadavg").read_text().split()[0])
        try:
            report = run(stand, options)
        except (ApplianceError, BenchError) as error:
            hint = getattr(error, "hint", "")
            print(f"bench: {name}: {error}" + (f"\n  {hint}" if hint else ""), file=sys.stderr)
            failed += 1
            continue
        if load > BUSY_LOAD:
            note = f"the machine was busy with other things before it began: load {load}"
            report = msgspec.structs.replace(report, notes=[*report.notes, note])
        reports.append(report)
    if reports:
        whole = dated(combine("all", reports) if arguments.name == "all" else reports[0])
        print(msgspec.json.format(msgspec.json.encode(whole), indent=2).decode() if arguments.json else table(whole))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
