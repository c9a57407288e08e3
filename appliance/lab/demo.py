"""What the demo shows of a lab that is up: figures of every SE, and a command run on one over the reverse path."""

from __future__ import annotations

import time

from appliance.lab.layout import Lab, Layout, ssh_command
from appliance.lab.up import POLL_S, Operator, Say
from appliance.protocol.fleet import SeSummary
from appliance.runtime import child

REMOTE_COMMAND = 'echo "this is $APPLIANCE_SE, reached over $SSH_CONNECTION"; uname -snr; uptime -p'
FIGURES_S = 30.0


def _is_complete(se: SeSummary) -> bool:
    return None not in {se.rtt_s, se.cpu_pct, se.memory_used_bytes, se.uptime_s}


def fleet_with_figures(lab: Lab, operator: Operator, *, say: Say) -> list[SeSummary]:
    """Returns the lab's SEs once each has sent its first figures, or as they are after `FIGURES_S`.

    CPU takes two samples, so the first figure comes one telemetry interval after UP.
    """
    names = {part.name for part in lab.ses}
    until = time.monotonic() + FIGURES_S
    told = False
    while True:
        fleet = [se for se in operator.ses() if se.name in names]
        if all(_is_complete(se) for se in fleet) or time.monotonic() > until:
            return fleet
        if not told:
            say(f"waiting for the first figures of all SEs, at most {FIGURES_S:.0f} s: CPU takes two samples")
            told = True
        time.sleep(POLL_S)


def run_over_reverse_path(layout: Layout, lab: Lab, address: str) -> tuple[list[str], str]:
    """Logs in to the SE at `address` with the system's `ssh` and runs a command there.

    Returns:
        The command, and what it printed.

    Raises:
        ChildError: it failed; the error has the command to paste.
    """
    command = [*ssh_command(layout, lab, address), REMOTE_COMMAND]
    return command, child.run(command, timeout_s=30).stdout
