"""17: peers that take what they can get. Through all of it the fleet stays UP, loses no heartbeat, and none comes late.

The fleet are simulated SEs in a process of their own, as in the bench; this process floods. What is judged is what a
busy machine can't excuse: the watchdog's deadline. `scripts/bench floods` measures how late heartbeats come.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from floods import FLOODS, Flood, Target, from_outside
from rig import RunningController, refused, running, until

from appliance.lab.fleet import FleetReport
from appliance.protocol import tunnel
from appliance.protocol.operator import ImageKeyTermsWish


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningController]:
    settings = {"source_burst": 100_000, "source_rate_per_s": 100_000.0, "heartbeat_interval_s": 1.0}
    with running(tmp_path_factory.mktemp("flood"), settings=settings) as found:
        yield found


class FleetRun:
    """A fleet of simulated SEs in a process of its own."""

    def __init__(self, controller: RunningController, folder: Path, *, ses: int, prefix: str) -> None:
        self._controller = controller
        self._prefix = prefix
        self.ses = ses
        created = controller.operator.create_image_key(ImageKeyTermsWish(max_uses=ses, expires_in_s=86400, note=prefix))
        bundle = folder / f"{prefix}.json"
        bundle.write_bytes(msgspec.json.encode(created.bundle))
        command = [
            sys.executable, "-m", "appliance", "lab", "fleet", "--ses", str(ses), "--bundle", str(bundle),
            "--seconds", "0", "--prefix", prefix, "--json",
        ]  # fmt: skip
        self._log = folder / f"{prefix}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)

    def up(self) -> int:
        """How many of it the controller calls UP."""
        ses = self._controller.operator.ses()
        return sum(1 for se in ses if se.name.startswith(self._prefix) and se.state.value == "UP")

    def until_up(self) -> None:
        """Waits until all are, and what they lose is counted."""
        until(lambda: self.up() == self.ses, what="the fleet is UP", deadline_s=180.0)
        until(lambda: "measuring" in self._log.read_text(), what="the measured time begins", deadline_s=60.0)

    def report(self) -> FleetReport:
        """Ends it."""
        self._process.send_signal(signal.SIGINT)
        told, _ = self._process.communicate(timeout=60)
        return msgspec.json.decode(told, type=FleetReport)

    def close(self) -> None:
        """Makes sure that nothing stays."""
        self._process.kill()
        if self._process.stdout is not None and not self._process.stdout.closed:
            self._process.communicate(timeout=20)


@contextlib.contextmanager
def fleet(controller: RunningController, folder: Path, *, ses: int, prefix: str) -> Iterator[FleetRun]:
    found = FleetRun(controller, folder, ses=ses, prefix=prefix)
    try:
        found.until_up()
        yield found
    finally:
        found.close()


def run_flood(
    controller: RunningController, folder: Path, flood: Flood, count: int, *, ses: int, seconds: float
) -> tuple[FleetReport, dict[str, int]]:
    """Returns what the fleet saw under a flood, and who was turned away meanwhile."""
    before = refused(controller.bound["metrics_port"])
    target = Target(controller.bundle, controller.enroll_port, controller.ssh_port, controller.operator)
    with fleet(controller, folder, ses=ses, prefix=f"{flood.name}-{count}-") as flooded:
        from_outside(flood.work(target, count, time.monotonic() + seconds))
        until(lambda: flooded.up() == ses, what="all of the fleet are UP")
        report = flooded.report()
    assert report.lost_heartbeats == 0
    assert report.reconnects == 0
    counted = {reason: now - before.get(reason, 0) for reason, now in refused(controller.bound["metrics_port"]).items()}
    return report, {reason: more for reason, more in counted.items() if more}


@pytest.mark.slow
@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.name)
def test_a_fleet_stays_up_through_a_flood(controller: RunningController, tmp_path: Path, flood: Flood) -> None:
    report, turned_away = run_flood(controller, tmp_path, flood, flood.large, ses=50, seconds=15.0)
    assert report.heartbeat_p99_ms < 1000 * tunnel.DEADLINE_S
    for reason in flood.reasons:
        assert turned_away.get(reason), f"{reason} isn't counted"


def test_a_small_fleet_stays_up_through_all_floods_at_once(controller: RunningController, tmp_path: Path) -> None:
    """The short form: no figure is judged, since other tests share the cores; nobody may go down."""

    async def all_at_once(at: Target, _count: int, end: float) -> None:
        await asyncio.gather(*(flood.work(at, flood.small, end) for flood in FLOODS))

    _, turned_away = run_flood(controller, tmp_path, Flood(all_at_once, 0, 0), 0, ses=20, seconds=5.0)
    assert turned_away.get("gateway-channel")
    assert turned_away.get("enroll-431")
