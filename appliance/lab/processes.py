"""Which processes a lab started, told apart from strangers that got the same pid later, and how they end.

Each was started as the leader of a session of its own. What it starts in turn stays in that session and ends with it:
the one-file executable runs its program as a child, sshd each connection.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from appliance.lab.layout import LabError, Process

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _boot_id() -> str:
    return _BOOT_ID.read_text("ascii").strip()


class _Stat(NamedTuple):
    """What /proc/PID/stat says (proc(5))."""

    state: str
    session: int
    started: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the name in brackets may hold anything, brackets and spaces too
    fields = text.rpartition(")")[2].split()
    return _Stat(fields[0], int(fields[3]), int(fields[19]))


def identify(pid: int) -> Process:
    """Returns the identity of a process that was just started. Raises `LabError` where it is gone already."""
    found = _stat(pid)
    if found is None:
        raise LabError(f"process {pid} ended at once", hint="its log says why")
    return Process(pid=pid, started=found.started, boot_id=_boot_id())


def is_running(process: Process | None) -> bool:
    """Whether exactly that process still runs (a zombie doesn't)."""
    if process is None or process.boot_id != _boot_id():
        return False
    found = _stat(process.pid)
    return found is not None and found.started == process.started and found.state not in {"Z", "X"}


def _session(process: Process, marker: str) -> list[Process]:
    """Returns what lives of the session that `process` leads or led, itself included.

    While the leader lives its pid is its session's alone. Where it is gone a stranger may have led a session of that
    number since, and may be gone too: then only those count whose command line names `marker`.
    """
    if process.boot_id != _boot_id():
        return []
    leader = _stat(process.pid)
    if leader is not None and leader.started != process.started:
        return []
    found = []
    for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        stat = _stat(pid)
        if stat is None or stat.session != process.pid or stat.state in {"Z", "X"}:
            continue
        if leader is not None or marker in _command_line(pid):
            found.append(Process(pid=pid, started=stat.started, boot_id=process.boot_id))
    return found


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def end(leaders: Sequence[Process], *, timeout_s: float, marker: str) -> int:
    """Ends processes and their sessions, together: SIGTERM, then SIGKILL for whatever is left after `timeout_s`.

    Each is held by a descriptor before it is looked at, so that no signal can reach a process that got its pid since.

    Args:
        leaders: as identified when they were started.
        timeout_s: for all of them.
        marker: stands in the command lines of all that the lab starts; see `_session`.

    Returns:
        How many had to be killed.
    """
    with contextlib.ExitStack() as stack:
        held: dict[int, Process] = {}
        for process in (member for leader in leaders for member in _session(leader, marker)):
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
        return len(killed)


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
