"""What a fleet of simulated SEs costs a controller, beside what as many OpenSSH connections cost an sshd.

`appliance lab fleet` enrolls and links the SEs against a fresh controller; both run on this machine's cores. When all
are UP by the controller's own word, and have settled, one process of the fleet is frozen until all its SEs are told
DOWN; then the controller's memory and processor time are read from the kernel over the measured time. With --storm the
controller is killed before that with all SEs linked, and started again. sshd's is measured with as many connections,
2,000 at most: more are a matter of memory and patience.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
from rig import refused

from appliance.errors import ApplianceError
from appliance.lab.fleet import FleetReport
from appliance.protocol.operator import StatusView
from appliance.runtime import child
from bench import openssh
from bench.processes import BenchError, children, cpu_s, proportional_bytes, resident_bytes, until
from bench.report import Report, Row
from bench.stand import Controller, Options, Stand, ended

MB = 1_000_000


class Goals(msgspec.Struct, frozen=True, kw_only=True):
    """What is promised for a fleet of at most so many SEs."""

    ses: int
    rss_mb: float
    cpu_pct: float | None = None
    p99_ms: float | None = None
    storm_s: float | None = None
    notice_s: float


GOALS = (
    Goals(ses=1000, rss_mb=200, notice_s=10),
    Goals(ses=2000, rss_mb=250, cpu_pct=15, p99_ms=30, storm_s=15, notice_s=10),
    Goals(ses=10_000, rss_mb=700, cpu_pct=60, p99_ms=200, storm_s=60, notice_s=30),
)
LIST_GOAL_S = 1.0
GROWTH_GOAL_PCT = 2.0
GROWTH_AFTER_S = 60.0
"""Memory is compared with that of this moment; a shorter run says nothing of growth."""
WORKING = ("UP", "DEGRADED")
"""States with a link and a reverse path that work; a busy machine makes a round trip long, which is DEGRADED."""
PATIENCE_S = 60.0
"""After so long without another SE coming up, what is there is measured."""
SETTLE_S = 15.0
"""After the last SE came up: `lab fleet` begins to count, and the reverse paths' checks are over."""
PEER_LINK_BYTES = 1_700_000
"""What sshd takes for one at most: it gets as many as there are SEs, or as three quarters of the free memory hold."""
SETTINGS = {
    "enroll_rate_per_s": 100_000.0, "enroll_burst": 100_000, "source_rate_per_s": 100_000.0, "source_burst": 100_000,
    "image_key_rate_per_s": 100_000.0, "image_key_burst": 100_000,
    "max_unauthenticated": 20_000, "max_unauthenticated_per_source": 20_000,
}  # fmt: skip
"""All SEs come from one address, at once."""


class _Measured(msgspec.Struct, kw_only=True):
    up: int
    degraded: int
    notice_s: float
    rss_bytes: int
    empty_rss_bytes: int
    growth_pct: float | None
    cpu_pct: float
    seconds: float
    up_after_s: float
    list_s: float
    storm: _Storm | None = None


class _Storm(msgspec.Struct, kw_only=True):
    up_s: float
    left_out: int
    degraded: int
    slots: int
    """Log-ins that were told when to come back."""


def run(stand: Stand, options: Options) -> Report:
    """Measures the controller, then sshd."""
    with stand.place() as place:
        measured, report = _fleet(stand, place / "controller", options)
        peer_links = min(options.ses, int(0.75 * psutil.virtual_memory().available / PEER_LINK_BYTES))
        logins_per_s, per_link_bytes = _sshd(stand, place, peer_links)
    notes = [
        f"{stand.what}; {options.ses} SEs, {measured.seconds:.0f} s measured, fleet and controller on the same cores",
        f"enrolled in {report.enroll_s:.1f} s, linked in {report.link_s:.1f} s, "
        f"all UP {measured.up_after_s:.1f} s after the fleet began",
        f"an empty controller has {measured.empty_rss_bytes / MB:.1f} MB: "
        f"{(measured.rss_bytes - measured.empty_rss_bytes) / 1024 / max(1, options.ses):.1f} KiB an SE",
        f"{report.heartbeats} heartbeats, median {report.heartbeat_p50_ms:.1f} ms, {report.reconnects} reconnects, "
        f"refusals {report.refusals or 'none'}",
        f"{measured.degraded} of them DEGRADED at the end; processor time is in % of one core",
        "limits of rates, and of connections that haven't logged in, are lifted: all SEs come from one address",
    ]
    theirs = None
    if per_link_bytes is None:
        notes.append(f"no sshd to compare with: apt-get install {' '.join(openssh.missing())}")
    else:
        theirs = per_link_bytes * options.ses / MB
        notes.append(
            f"sshd: {per_link_bytes / 1024:.0f} KiB a connection (PSS), {peer_links} of them"
            f"{', multiplied' if peer_links < options.ses else ''}"
        )
    goals = next((entry for entry in GOALS if options.ses <= entry.ses), None)
    rows = [
        Row(name="fleet.up", value=measured.up, unit="SEs", goal=options.ses, better="high"),
        Row(
            name="fleet.controller_rss_mb", value=round(measured.rss_bytes / MB, 1), unit="MB",
            goal=goals.rss_mb if goals else None, better="low",
            peer=f"sshd, {options.ses} connections" if theirs else None,
            peer_value=round(theirs, 1) if theirs else None,
        ),
        Row(
            name="fleet.controller_cpu_pct", value=round(measured.cpu_pct, 2), unit="% of a core",
            goal=goals.cpu_pct if goals else None, better="low",
        ),
        Row(
            name="fleet.heartbeat_p99_ms", value=round(report.heartbeat_p99_ms, 2), unit="ms",
            goal=goals.p99_ms if goals else None, better="low",
        ),
        Row(name="fleet.lost_heartbeats", value=report.lost_heartbeats, unit="heartbeats", goal=0, better="low"),
        Row(name="fleet.list_s", value=round(measured.list_s, 3), unit="s", goal=LIST_GOAL_S, better="low"),
        Row(
            name="fleet.dead_notice_s", value=round(measured.notice_s, 1), unit="s",
            goal=goals.notice_s if goals else None, better="low",
        ),
        Row(
            name="fleet.links_per_s", value=round(report.linked / report.link_s, 1), unit="1/s", better="high",
            peer="sshd, log-ins" if logins_per_s else None, peer_value=logins_per_s,
        ),
    ]  # fmt: skip
    if measured.growth_pct is not None:
        notes.append("growth is of memory, after the first minute")
        rows.append(
            Row(
                name="fleet.growth_pct", value=round(measured.growth_pct, 2), unit="%", goal=GROWTH_GOAL_PCT,
                better="low",
            )
        )  # fmt: skip
    if measured.storm is not None:
        storm = measured.storm
        notes.append(
            f"storm: SIGKILL, started again at once; measured from the start of the new process; {storm.slots} log-ins "
            f"were told when to come back, {storm.degraded} SEs were DEGRADED when the last one was back"
        )
        rows += [
            Row(
                name="storm.up_s", value=round(storm.up_s, 1), unit="s", goal=goals.storm_s if goals else None,
                better="low",
            ),
            Row(name="storm.left_out", value=storm.left_out, unit="SEs", goal=0, better="low"),
        ]  # fmt: skip
    return Report(bench="fleet", rows=rows, notes=notes)


def _fleet(stand: Stand, root: Path, options: Options) -> tuple[_Measured, FleetReport]:
    with ExitStack() as stack:
        controller = stack.enter_context(stand.controller(root, settings=SETTINGS))
        empty_bytes = resident_bytes([controller.pid, *children(controller.pid)])
        began = time.monotonic()
        process, log = stack.enter_context(running(stand, controller, options.ses))
        up_after_s = await_up(stand, controller, options.ses, process, log) - began
        stand.say(f"{options.ses} SEs UP after {up_after_s:.1f} s; settling for {SETTLE_S:.0f} s")
        pass_time(SETTLE_S, process, log)
        storm = None
        if options.storm:
            stand.say("killing the controller")
            os.kill(controller.pid, signal.SIGKILL)
            began = time.monotonic()
            controller = stack.enter_context(stand.running(root))
            up_s = await_up(stand, controller, options.ses, process, log) - began
            states = controller.operator.status().states
            back = sum(states.get(state, 0) for state in WORKING)
            slots = refused(controller.bound["metrics_port"]).get("gateway-slot", 0)
            storm = _Storm(
                up_s=up_s, left_out=options.ses - back, degraded=states.get("DEGRADED", 0), slots=slots
            )  # fmt: skip
            stand.say(f"{back} SEs back after {up_s:.1f} s; settling for {SETTLE_S:.0f} s")
            pass_time(SETTLE_S, process, log)
        notice_s = _dead_notice(stand, controller, options.ses, process, log)
        process.send_signal(signal.SIGUSR1)  # its measured time begins
        stand.say(f"measuring for {options.seconds:.0f} s")
        measured = _steady(controller, options, process, log)
        measured.storm, measured.empty_rss_bytes, measured.up_after_s = storm, empty_bytes, up_after_s
        measured.notice_s = notice_s
        return measured, _report(process)


def _dead_notice(stand: Stand, controller: Controller, ses: int, process: subprocess.Popen[bytes], log: Path) -> float:
    """Freezes one process of the fleet, and returns the seconds until the last of its SEs is told DOWN."""
    workers = children(process.pid)
    frozen, dead = (workers[0], ses // len(workers)) if workers else (process.pid, ses)
    stand.say(f"{dead} SEs freeze")
    os.kill(frozen, signal.SIGSTOP)
    try:
        began = time.monotonic()
        until(
            lambda: controller.operator.status().states.get("DOWN", 0) >= dead, what="the dead are told DOWN",
            deadline_s=120.0, every_s=max(0.25, ses / 5000),
        )  # fmt: skip
        notice_s = time.monotonic() - began
    finally:
        os.kill(frozen, signal.SIGCONT)
    stand.say(f"told after {notice_s:.1f} s; waiting for them, then settling for {SETTLE_S:.0f} s")
    await_up(stand, controller, ses, process, log)
    pass_time(SETTLE_S, process, log)
    return notice_s


def _steady(controller: Controller, options: Options, process: subprocess.Popen[bytes], log: Path) -> _Measured:
    pids = [controller.pid, *children(controller.pid)]
    before, at = cpu_s(pids), time.monotonic()
    pass_time(min(GROWTH_AFTER_S, options.seconds), process, log)
    first_bytes = resident_bytes(pids)
    pass_time(max(0.0, at + options.seconds - time.monotonic()), process, log)
    used_s, took_s = cpu_s(pids) - before, time.monotonic() - at
    last_bytes = resident_bytes(pids)
    asked = time.monotonic()
    listed = len(controller.operator.ses())
    list_s = time.monotonic() - asked
    if listed < options.ses:
        raise BenchError(f"{listed} SEs in the list, {options.ses} expected")
    states = controller.operator.status().states
    grows = options.seconds >= 2 * GROWTH_AFTER_S
    return _Measured(
        up=states.get("UP", 0), degraded=states.get("DEGRADED", 0), rss_bytes=last_bytes, empty_rss_bytes=0,
        up_after_s=0.0, list_s=list_s, notice_s=0.0,
        growth_pct=(last_bytes - first_bytes) / first_bytes * 100 if grows else None,
        cpu_pct=used_s / took_s * 100, seconds=took_s,
    )  # fmt: skip


@contextmanager
def settled(stand: Stand, ses: int, *, settings: Mapping[str, object] = SETTINGS) -> Iterator[Fleet]:
    """A fleet that is UP and has come to rest, under a controller of its own."""
    with (
        stand.place() as place,
        stand.controller(place / "controller", settings=settings) as controller,
        running(stand, controller, ses) as (process, log),
    ):
        await_up(stand, controller, ses, process, log)
        pass_time(SETTLE_S, process, log)
        yield Fleet(controller, process, log)


class Fleet(NamedTuple):
    """Of simulated SEs, and its controller."""

    controller: Controller
    process: subprocess.Popen[bytes]
    log: Path

    def begin(self) -> None:
        """Its measured time begins."""
        self.process.send_signal(signal.SIGUSR1)

    def end(self) -> FleetReport:
        """Ends the measured time, and the fleet."""
        return _report(self.process)


def _report(process: subprocess.Popen[bytes]) -> FleetReport:
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    return msgspec.json.decode(told, type=FleetReport)


@contextmanager
def running(stand: Stand, controller: Controller, ses: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
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


def _working(status: StatusView) -> int:
    return sum(status.states.get(state, 0) for state in WORKING)


def await_up(stand: Stand, controller: Controller, ses: int, process: subprocess.Popen[bytes], log: Path) -> float:
    """Returns when (monotonic) the last SE came up. Gives up where nothing more comes, or enrolls, for a minute."""
    best, enrolled, told, progress_at = -1, 0, 0.0, time.monotonic()
    while best < ses:
        # Asking costs the controller time in proportion to the fleet.
        pass_time(max(0.25, ses / 5000), process, log)
        try:
            status = controller.operator.status()
            up, known = _working(status), status.enrolled
        except ApplianceError as error:
            stand.say(f"the controller: {error}")
            up, known = best, enrolled
        now = time.monotonic()
        if up > best or known > enrolled:
            best, enrolled, progress_at = max(up, best), known, now
        if now - told >= 5:
            told = now
            stand.say(f"{enrolled} of {ses} SEs enrolled, {max(best, 0)} UP")
        if now - progress_at > PATIENCE_S:
            stand.say(f"{best} of {ses} SEs UP, no more for a minute; measuring those")
            break
    return progress_at


def pass_time(seconds: float, process: subprocess.Popen[bytes], log: Path) -> None:
    """Lets time pass while the fleet lives."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
    raise BenchError(f"the fleet ended with {process.returncode}; the end of {log}:\n{log.read_text()[-2000:]}")


def _sshd(stand: Stand, place: Path, links: int) -> tuple[float | None, float | None]:
    """Returns log-ins a second and bytes a connection of an sshd; None where there is none."""
    if {"openssh-server", "openssh-client"} & set(openssh.missing()):
        return None, None
    stand.say(f"{links} OpenSSH connections")
    with openssh.server(place) as server, openssh.links(server, links) as took_s:
        return round(links / took_s, 1), proportional_bytes(server.sessions) / links
