"""`appliance lab fleet` in several processes: one report of all, and an end that leaves none of them behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from rig import RunningController, running, until

from appliance.lab.fleet import FleetReport
from appliance.protocol.operator import ImageKeyTermsWish

SES = 41


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_ends_it_gets_the_whole_report(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path / "controller") as controller:
        process = fleet(controller, tmp_path / "bundle.json")
        try:
            until(lambda: controller.operator.status().states == {"UP": SES}, what="all are UP", deadline_s=60.0)
            children = psutil.Process(process.pid).children()
            assert len(children) == 2
            process.send_signal(number)
            told, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            assert process.stdout is not None
            process.stdout.close()
        assert process.returncode == 0
        report = msgspec.json.decode(told, type=FleetReport)
        assert (report.ses, report.enrolled, report.linked, report.lost_heartbeats) == (SES, SES, SES, 0)
        assert not any(child.is_running() for child in children)


def fleet(controller: RunningController, bundle: Path) -> subprocess.Popen[bytes]:
    """Starts one."""
    created = controller.operator.create_image_key(ImageKeyTermsWish(max_uses=SES))
    bundle.write_bytes(msgspec.json.encode(created.bundle))
    return subprocess.Popen(
        [
            sys.executable, "-m", "appliance", "lab", "fleet", "--ses", str(SES), "--processes", "2",
            "--bundle", str(bundle), "--seconds", "0", "--json",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
