"""What a fleet of simulated SEs costs a controller, beside what as many OpenSSH connections cost an sshd.

`appliance lab fleet` enrolls and links the SEs against a fresh controller; both run on this machine's cores. When all
are UP by the controller's own word, and have settled, the controller's memory and processor time are read from the
kernel over the measured time. sshd's memory is measured for a few connections and multiplied.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from appliance.errors import ApplianceError
from appliance.lab.fleet import FleetReport
from appliance.runtime import child
from bench import openssh
from bench.processes import BenchError, children, cpu_s, proportional_bytes, resident_bytes
from bench.report import Report, Row
from bench.stand import Controller, Options, Stand, ended

MB = 1_000_000
RSS_GOAL = (1000, 200)
"""At so many SEs, so many MB."""
SETTLE_S = 15.0
"""After the last SE came up: `lab fleet` begins to count, and the reverse paths' checks are over."""
PEER_LINKS = 20
_SETTINGS = {
    "enroll_rate_per_s": 100_000.0, "enroll_burst": 100_000, "source_rate_per_s": 100_000.0, "source_burst": 100_000,
    "max_unauthenticated": 20_000, "max_unauthenticated_per_source": 20_000,
}  # fmt: skip
"""All SEs come from one address, at once."""


class _Measured(msgspec.Struct, kw_only=True):
    up: int
    rss_bytes: int
    empty_rss_bytes: int
    cpu_pct: float
    seconds: float
    up_after_s: float


def run(stand: Stand, options: Options) -> Report:
    """Measures the controller, then sshd."""
    with stand.place() as place:
        with stand.controller(place / "controller", settings=_SETTINGS) as controller:
            measured, report = _fleet(stand, controller, options)
        logins_per_s, per_link_bytes = _sshd(stand, place)
    notes = [
        f"{stand.what}; {options.ses} SEs, {measured.seconds:.0f} s measured, fleet and controller on the same cores",
        f"enrolled in {report.enroll_s:.1f} s, linked in {report.link_s:.1f} s, "
        f"all UP {measured.up_after_s:.1f} s after the fleet began",
        f"an empty controller has {measured.empty_rss_bytes / MB:.1f} MB: "
        f"{(measured.rss_bytes - measured.empty_rss_bytes) / 1024 / max(1, options.ses):.1f} KiB an SE",
        f"{report.heartbeats} heartbeats, median {report.heartbeat_p50_ms:.1f} ms, {report.reconnects} reconnects, "
        f"refusals {report.refusals or 'none'}",
        "processor time is in % of one core",
    ]
    if per_link_bytes is None:
        notes.append(f"no sshd to compare with: apt-get install {' '.join(openssh.missing())}")
        theirs = None
    else:
        theirs = per_link_bytes * options.ses / MB
        notes.append(
            f"sshd: {per_link_bytes / 1024:.0f} KiB a connection (PSS, measured with {PEER_LINKS}, multiplied)"
        )
    many, goal_mb = RSS_GOAL
    rows = [
        Row(name="fleet.up", value=measured.up, unit="SEs", goal=options.ses, better="high"),
        Row(
            name="fleet.controller_rss_mb", value=round(measured.rss_bytes / MB, 1), unit="MB",
            goal=goal_mb if options.ses <= many else None, better="low",
            peer=f"sshd, {options.ses} connections" if theirs else None,
            peer_value=round(theirs, 1) if theirs else None,
        ),
        Row(name="fleet.controller_cpu_pct", value=round(measured.cpu_pct, 2), unit="% of a core", better="low"),
        Row(name="fleet.heartbeat_p99_ms", value=round(report.heartbeat_p99_ms, 2), unit="ms", better="low"),
        Row(name="fleet.lost_heartbeats", value=report.lost_heartbeats, unit="heartbeats", better="low"),
        Row(
            name="fleet.links_per_s", value=round(report.linked / report.link_s, 1), unit="1/s", better="high",
            peer="sshd, log-ins" if logins_per_s else None, peer_value=logins_per_s,
        ),
    ]  # fmt: skip
    return Report(bench="fleet", rows=rows, notes=notes)


def _fleet(stand: Stand, controller: Controller, options: Options) -> tuple[_Measured, FleetReport]:
    pids = [controller.pid, *children(controller.pid)]
    empty_bytes = resident_bytes(pids)
    began = time.monotonic()
    with _running(stand, controller, options.ses) as (process, log):
        up_after_s = _await_up(stand, controller, options.ses, process, log) - began
        stand.say(f"{options.ses} SEs UP after {up_after_s:.1f} s; settling for {SETTLE_S:.0f} s")
        _pass(SETTLE_S, process, log)
        stand.say(f"measuring for {options.seconds:.0f} s")
        before, at = cpu_s(pids), time.monotonic()
        _pass(options.seconds, process, log)
        used_s, took_s = cpu_s(pids) - before, time.monotonic() - at
        measured = _Measured(
            up=_up(controller), rss_bytes=resident_bytes(pids), empty_rss_bytes=empty_bytes,
            cpu_pct=used_s / took_s * 100, seconds=took_s, up_after_s=up_after_s,
        )  # fmt: skip
        process.send_signal(signal.SIGINT)  # ends the measured time; it reports and leaves
        told, _ = process.communicate(timeout=120)
    return measured, msgspec.json.decode(told, type=FleetReport)


@contextmanager
def _running(stand: Stand, controller: Controller, ses: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    log = controller.paths.root / "fleet.log"
    command = [
        *stand.program, "lab", "fleet", "--ses", str(ses), "--bundle", str(controller.bundle(uses=ses)),
        "--seconds", "0", "--json",
    ]  # fmt: skip
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
            env=child.clean_environment(),
        )  # fmt: skip
    with ended(process):
        yield process, log


def _up(controller: Controller) -> int:
    states = controller.operator.status().states
    return states.get("UP", 0)


def _await_up(stand: Stand, controller: Controller, ses: int, process: subprocess.Popen[bytes], log: Path) -> float:
    """Returns when (monotonic) the last SE came up. Gives up where nothing more comes for a minute."""
    best, told, progress_at = -1, 0.0, time.monotonic()
    while best < ses:
        _pass(0.25, process, log)
        try:
            up = _up(controller)
        except ApplianceError as error:
            stand.say(f"the controller: {error}")
            up = best
        now = time.monotonic()
        if up > best:
            best, progress_at = up, now
        if now - told >= 5:
            told = now
            stand.say(f"{max(best, 0)} of {ses} SEs UP")
        if now - progress_at > 60:
            stand.say(f"{best} of {ses} SEs UP, no more for a minute; measuring those")
            break
    return progress_at


def _pass(seconds: float, process: subprocess.Popen[bytes], log: Path) -> None:
    """Lets time pass while the fleet lives."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    raise BenchError(f"the fleet ended with {process.returncode}; the end of {log}:\n{log.read_text()[-2000:]}")


def _sshd(stand: Stand, place: Path) -> tuple[float | None, float | None]:
    """Returns log-ins a second and bytes a connection of an sshd; None where there is none."""
    if {"openssh-server", "openssh-client"} & set(openssh.missing()):
        return None, None
    stand.say(f"{PEER_LINKS} OpenSSH connections")
    with openssh.server(place) as server, openssh.links(server, PEER_LINKS) as took_s:
        return round(PEER_LINKS / took_s, 1), proportional_bytes(server.sessions) / PEER_LINKS
