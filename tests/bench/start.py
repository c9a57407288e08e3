"""How long `appliance version` takes from the frozen executables, beside an interpreter that does nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from appliance.runtime import child
from bench.processes import BenchError
from bench.report import Report, Row
from bench.stand import Options, Stand

STARTS = 15
WARM_UPS = 2
"""The first starts read the files from disk; what is promised holds for a warm page cache."""


def run(stand: Stand, options: Options) -> Report:
    """Measures both forms."""
    for path in (stand.directory_form, stand.one_file):
        if not path.is_file():
            raise BenchError(f"there is no {path}: run scripts/build")
    python = [sys.executable, "-c", "pass"]
    bare = _median_s(python)
    stand.say(f"{STARTS} starts of each form")
    peer = "python3 -c pass"
    return Report(
        bench="start",
        rows=[
            Row(
                name="start.directory_form_s", value=_median_s([str(stand.directory_form), "version"]), unit="s",
                goal=0.20, better="low", peer=peer, peer_value=bare,
            ),
            Row(
                name="start.one_file_s", value=_median_s([str(stand.one_file), "version"]), unit="s", better="low",
                peer=peer, peer_value=bare,
            ),
        ],
        notes=[f"median of {STARTS} starts of `appliance version` with a warm page cache"],
    )  # fmt: skip


def _median_s(command: Sequence[str]) -> float:
    times = []
    for _ in range(WARM_UPS + STARTS):
        began = time.perf_counter()
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=30,
            env=child.clean_environment(),
        )  # fmt: skip
        times.append(time.perf_counter() - began)
    return round(statistics.median(times[WARM_UPS:]), 4)
