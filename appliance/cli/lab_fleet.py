"""`appliance lab fleet`: a simulated fleet against a running controller."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance.cli.context import CliContext, json_option, pass_context, print_json
from appliance.cli.lab import layout_of, root_option
from appliance.errors import UsageError

if TYPE_CHECKING:
    from appliance.lab.fleet import FleetReport


@click.command("fleet")
@click.option("--ses", type=click.IntRange(1, 50_000), default=100, show_default=True, help="How many SEs in all.")
@click.option("--bundle", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Bundle of an image key.")
@click.option("--seconds", type=click.FloatRange(0), default=30.0, show_default=True, help="Measured time; 0: no end.")
@click.option("--processes", type=click.IntRange(0, 64), default=0, help="Over how many processes; 0 chooses.")
@click.option("--prefix", default="sim-", show_default=True, help="Begin of the SEs' names.")
@root_option
@json_option
@pass_context
def command(
    context: CliContext, ses: int, bundle: Path | None, seconds: float, processes: int, prefix: str, root: Path | None
) -> None:
    """Simulated SEs, many in one process: real enrollment, links, heartbeats and reverse paths.

    Without --bundle the first bundle of the lab's controller is taken, or of the controller at appliance's --root.
    SIGINT ends the measured time, SIGUSR1 begins it anew.
    """
    from appliance.lab.fleet import SES_PER_PROCESS, combine

    bundle = bundle or _bundle(context, root)
    processes = processes or -(-ses // SES_PER_PROCESS)
    reports: list[FleetReport]
    if processes == 1:
        reports = [_run_here(bundle, ses=ses, seconds=seconds, prefix=prefix)]
    else:
        reports = _run_children(bundle, ses=ses, seconds=seconds, prefix=prefix, processes=processes)
    report = combine(reports)
    if context.json:
        print_json(report)
        return
    click.echo(
        f"{report.linked} of {report.ses} SEs linked; {report.heartbeats} heartbeats in {report.measured_s:.0f} s, "
        f"{report.lost_heartbeats} lost, p50 {report.heartbeat_p50_ms:.1f} ms, p99 {report.heartbeat_p99_ms:.1f} ms; "
        f"enrolled in {report.enroll_s:.1f} s, linked in {report.link_s:.1f} s"
    )


def _bundle(context: CliContext, root: Path | None) -> Path:
    """Returns the first bundle of the controller that is meant."""
    from appliance.controller.material import Files

    layout = layout_of(context, root)
    paths = layout.controller if root is not None or layout.file.exists() else context.paths
    found = sorted(Files(paths.controller_state).bundles.glob("*.json"))
    if not found:
        hint = "pass --bundle, or --root of a lab that is up"
        raise UsageError(f"no bundle below {paths.controller_state}", hint=hint)
    return found[0]


def _run_here(bundle: Path, *, ses: int, seconds: float, prefix: str) -> FleetReport:
    import uvloop

    from appliance.lab.fleet import Fleet
    from appliance.protocol import strict_json
    from appliance.protocol.seed import MAX_BUNDLE_BYTES, Bundle

    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if ses + 200 > hard:
        raise UsageError(f"{ses} SEs need {ses + 200} open files, {hard} are allowed", hint="use more --processes")
    loaded = strict_json.decode(bundle.read_bytes(), Bundle, max_bytes=MAX_BUNDLE_BYTES)

    async def run() -> FleetReport:
        fleet = Fleet(loaded, ses=ses, prefix=prefix, say=lambda text: click.echo(text, err=True))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, fleet.stop)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, fleet.begin)
        return await fleet.run(seconds)

    return uvloop.run(run())


def _run_children(bundle: Path, *, ses: int, seconds: float, prefix: str, processes: int) -> list[FleetReport]:
    from appliance.lab.fleet import FleetReport
    from appliance.protocol import strict_json
    from appliance.runtime.child import clean_environment, self_command

    children: list[subprocess.Popen[bytes]] = []
    outputs: list[bytes] = [b""] * processes
    is_stopping = False

    def drain(index: int) -> None:
        outputs[index] = children[index].communicate()[0]

    def begin(*_signal: object) -> None:
        for child in children:
            child.send_signal(signal.SIGUSR1)

    def stop(*_signal: object) -> None:
        # Nothing is raised here: an interrupted Thread.join takes a thread that still runs for one that ended.
        nonlocal is_stopping
        is_stopping = True
        for child in children:
            child.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # also where a shell started this in the background, which ignores it
    for index in range(processes):
        share = ses // processes + (1 if index < ses % processes else 0)
        args = [
            *self_command(), "lab", "fleet", "--ses", str(share), "--bundle", str(bundle), "--seconds", str(seconds),
            "--processes", "1", "--prefix", f"{prefix}{index}-", "--json",
        ]  # fmt: skip
        children.append(subprocess.Popen(args, env=clean_environment(), stdout=subprocess.PIPE))
        if is_stopping:
            children[-1].terminate()
    signal.signal(signal.SIGUSR1, begin)
    threads = [threading.Thread(target=drain, args=(index,)) for index in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [child.returncode for child in children if child.returncode]
    if failed:
        raise UsageError(f"{len(failed)} of {processes} processes failed", hint="their messages stand above")
    return [strict_json.decode(output, FleetReport, max_bytes=1 << 20) for output in outputs]
