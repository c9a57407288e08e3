"""What Prometheus itself says of our metrics: `promtool check metrics` reads them and has nothing to complain about."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest

from appliance.controller.metrics import ControllerMetrics, SeMetrics, render
from appliance.protocol.fleet import State
from appliance.protocol.telemetry import CATALOGUE, Point, Sample, decode, encode
from appliance.runtime.host import Host, own_process

_PROMTOOL = shutil.which("promtool") or ""

pytestmark = pytest.mark.skipif(
    not _PROMTOOL, reason="no promtool: apt-get install -y --no-install-recommends prometheus"
)


def _check(content: bytes) -> tuple[int, str]:
    done = subprocess.run([_PROMTOOL, "check", "metrics"], input=content, capture_output=True, timeout=60, check=False)
    return done.returncode, (done.stdout + done.stderr).decode()


def _every_metric() -> Sample:
    """This host's figures, and one of each metric that it lacks (a VM has no thermometer, a container no swap)."""
    points = Host().points()
    have = {point.name for point in points}
    points += [
        Point(metric.name, tuple((a.values or a.examples)[0] for a in metric.attributes), 1.5)
        for metric in CATALOGUE
        if metric.name not in have
    ]
    return decode(encode(Sample(time=time.time(), points=points)))


def _exposition(ses: list[SeMetrics]) -> bytes:
    controller = ControllerMetrics(
        version="1.0",
        cluster_id="c",
        node=1,
        process=own_process(),
        links=1,
        enrolled=1,
        refusals={"ENROLL-001": 1},
        samples_refused={"TELEMETRY-001": 1},
        certificate_expires_at=time.time(),
    )
    return b"".join(render(controller, ses))


def test_promtool_has_no_complaints() -> None:
    sample = _every_metric()
    ses = [
        SeMetrics(se_id="1", name="se-1", state=State.UP, up=True, rtt_s=0.001, heartbeats=3, sample=sample),
        SeMetrics(se_id="2", name='odd "name"\\\n{}', state=State.DEGRADED, up=True, rtt_s=0.09, sample=sample),
        SeMetrics(se_id="3", name="se-3", state=State.DOWN, up=False),
    ]
    content = _exposition(ses)
    assert all(f"# TYPE {metric.prometheus} ".encode() in content for metric in CATALOGUE)
    assert _check(content) == (0, "")


def test_promtool_accepts_a_controller_without_ses() -> None:
    assert _check(_exposition([])) == (0, "")


def test_promtool_would_complain() -> None:
    """The check above proves something: promtool does look at names, types and syntax."""
    assert _check(b"# TYPE x_count counter\nx_count 1\n")[0] != 0
    assert _check(b'x{a="b} 1\n')[0] != 0
