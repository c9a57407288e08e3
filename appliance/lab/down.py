"""Ends what a lab started, and only that: processes are known by pid, start time and boot."""

from __future__ import annotations

import shutil

import msgspec

from appliance.lab import processes
from appliance.lab.layout import Lab, Layout
from appliance.lab.up import Say, document, load
from appliance.storage.lock import RootLock

STOP_S = 15.0


def bring_down(layout: Layout, *, say: Say, remove: bool = False) -> None:
    """Ends all processes of the lab: SEs, then the controller, then the SSH servers. A lab that is down stays so.

    Args:
        layout: where.
        say: takes one line of progress.
        remove: also delete the lab's directory with all keys and state in it.

    Raises:
        UsageError: there is no lab.
        LabError: a process doesn't end.
    """
    load(layout)  # before the lock makes a file in a stranger's directory
    with RootLock(layout.lock):
        lab = load(layout)
        groups = (
            ("SEs", [se.process for se in lab.ses]),
            ("the controller", [lab.controller.process]),
            ("SSH servers", [se.sshd for se in lab.ses]),
        )
        for what, group in groups:
            leaders = [process for process in group if process is not None]
            if leaders:
                say(f"ending {what}")
                killed = processes.end(leaders, timeout_s=STOP_S, marker=str(layout.root))
                if killed:
                    say(f"{killed} of their processes did not end within {STOP_S:.0f} s and were killed")
        document(layout).save(_at_rest(lab))
        if remove:
            shutil.rmtree(layout.root)
            say(f"removed {layout.root}")


def _at_rest(lab: Lab) -> Lab:
    return msgspec.structs.replace(
        lab,
        controller=msgspec.structs.replace(lab.controller, process=None),
        ses=[msgspec.structs.replace(se, process=None, sshd=None) for se in lab.ses],
    )
