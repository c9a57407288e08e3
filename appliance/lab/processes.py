"""Which processes a lab started, told apart from strangers that got the same pid later, and how they end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from appliance.lab.layout import LabError, Process

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _boot_id() -> str:
    return _BOOT_ID.read_text("ascii").strip()


def _stat(pid: int) -> tuple[str, int] | None:
    """Returns state letter and start time of a process (proc(5), /proc/PID/stat), or None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the name in brackets may hold anything, brackets and spaces too
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def identify(pid: int) -> Process:
    """Returns the identity of a process that was just started. Raises `LabError` where it is gone already."""
    found = _stat(pid)
    if found is None:
        raise LabError(f"process {pid} ended at once", hint="its log says why")
    return Process(pid=pid, started=found[1], boot_id=_boot_id())


def is_running(process: Process | None) -> bool:
    """Whether exactly that process still runs (a zombie doesn't)."""
    if process is None or process.boot_id != _boot_id():
        return False
    found = _stat(process.pid)
    return found is not None and found[1] == process.started and found[0] not in {"Z", "X"}


def end(processes: Sequence[Process], *, timeout_s: float) -> list[Process]:
    """Ends processes together: SIGTERM, then SIGKILL for whatever is left after `timeout_s`.

    Each is held by a descriptor before it is looked at, so that no signal can reach a process that got its pid since.

    Returns:
        Those that had to be killed.
    """
    with contextlib.ExitStack() as stack:
        held: dict[int, Process] = {}
        for process in processes:
            try:
                descriptor = os.pidfd_open(process.pid)
            except ProcessLookupError:
                continue
            stack.callback(os.close, descriptor)
            if is_running(process):
                held[descriptor] = process
                _send(descriptor, signal.SIGTERM)
                # a stopped process would sleep through SIGTERM
                _send(descriptor, signal.SIGCONT)
        killed = _wait(held, timeout_s)
        for descriptor in killed:
            _send(descriptor, signal.SIGKILL)
        stuck = _wait(killed, 5.0)
        if stuck:
            raise LabError(
                f"processes {', '.join(str(process.pid) for process in stuck.values())} don't end, even by SIGKILL",
                hint="they wait in the kernel, for a disk perhaps; see `ps -o pid,stat,wchan`",
            )
        return list(killed.values())


def _send(descriptor: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, number)


def _wait(held: dict[int, Process], timeout_s: float) -> dict[int, Process]:
    """Waits until all have ended. Returns what is left."""
    left = dict(held)
    poller = select.poll()
    for descriptor in left:
        poller.register(descriptor, select.POLLIN)
    until = time.monotonic() + timeout_s
    while left and (remaining_s := until - time.monotonic()) > 0:
        for descriptor, _ in poller.poll(remaining_s * 1000):
            poller.unregister(descriptor)
            process = left.pop(descriptor)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)  # ours, where the same command started it
    return left
