"""The local mode switch: which role this machine plays, and how it changes from one to another.

A change takes five steps, `intent -> stop -> write -> enable -> done`. Its durable half is a document with a phase,
written before each side effect; each side effect may be repeated. So a change that was cut anywhere is finished by
asking for it again, and asking for the mode that holds already repairs what it needs (`advance`):

| phase     | want the mode it has | want another | stopped             | enabled |
| --------- | -------------------- | ------------ | ------------------- | ------- |
| `done`    | `written`            | `intent`     | –                   | –       |
| `intent`  | `intent`             | `intent`     | `written`, new mode | –       |
| `written` | `written`            | `intent`     | –                   | `done`  |

In `intent` the old role still is the mode: after a power cut there the machine comes back as what it was. State of a
role that was left stays where it is, untouched. What stopping and enabling mean is the `Machine`'s: with systemd and
root `runtime.units.SystemdMachine`, else `BareMachine`, which says what it didn't do.
"""

from __future__ import annotations

import enum
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import msgspec

from appliance.errors import LockedError, ModeError, StateMachineError
from appliance.paths import Paths
from appliance.runtime.clock import Clock
from appliance.storage.atomic import make_dir
from appliance.storage.document import Document
from appliance.storage.lock import RootLock, holder

STOP_TIMEOUT_S = 60.0


class Mode(enum.StrEnum):
    """Roles of a machine."""

    CONTROLLER = "controller"
    SE = "se"
    NONE = "none"


class Phase(enum.StrEnum):
    """How far a change got."""

    INTENT = "intent"
    """Wanted; the old role may run."""
    WRITTEN = "written"
    """The old role is stopped and the mode is the new one, which may not be enabled yet."""
    DONE = "done"


class Event(enum.StrEnum):
    """What happens to the mode."""

    WANT = "want"
    STOPPED = "stopped"
    ENABLED = "enabled"


class ModeDocument(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `paths.mode_file` holds."""

    mode: Mode = Mode.NONE
    target: Mode = Mode.NONE
    phase: Phase = Phase.DONE
    at: float = 0.0
    """Of the last move, seconds since 1970."""


def advance(document: ModeDocument, event: Event, *, at: float, target: Mode | None = None) -> ModeDocument:
    """Returns the document after `event`; see the table above. Pure.

    Args:
        document: as it stands.
        event: what happened.
        at: wall time.
        target: the wanted mode, with `WANT` only.

    Raises:
        StateMachineError: a move that isn't in the table.
    """
    if event is Event.WANT and target is not None:
        is_there = document.mode is target and document.phase is not Phase.INTENT
        return ModeDocument(mode=document.mode, target=target, phase=Phase.WRITTEN if is_there else Phase.INTENT, at=at)
    if event is Event.STOPPED and document.phase is Phase.INTENT:
        return ModeDocument(mode=document.target, target=document.target, phase=Phase.WRITTEN, at=at)
    if event is Event.ENABLED and document.phase is Phase.WRITTEN:
        return ModeDocument(mode=document.mode, target=document.target, phase=Phase.DONE, at=at)
    raise StateMachineError(f"mode: {event.value!r} can't happen in phase {document.phase.value!r}")


class Machine(Protocol):
    """What stopping and enabling a role means here. Each returns sentences on what it did *not* do."""

    def stop(self) -> list[str]:
        """Drains and stops whatever role runs, and keeps it from starting again. May be repeated."""
        ...

    def enable(self, role: Mode) -> list[str]:
        """Makes `role` start, now and at each boot. May be repeated."""
        ...


class Move(NamedTuple):
    """One step of a change that is behind us."""

    step: str
    document: ModeDocument
    not_done: list[str]


def document_of(paths: Paths) -> Document[ModeDocument]:
    """Returns the durable document. Anybody may read it: the daemons run as other users than who changes it."""
    return Document(paths.mode_file, ModeDocument, mode=0o644)


def load(paths: Paths) -> ModeDocument:
    """Returns the mode as it stands; a machine that was never told has none.

    Raises:
        StorageError: see `Document.load`.
    """
    return document_of(paths).load() or ModeDocument()


def running_role(paths: Paths) -> Mode:
    """Returns the role that a daemon started now must play.

    Raises:
        ModeError: the role is being changed at this moment.
        StorageError: see `Document.load`.
    """
    document = load(paths)
    # Whatever restarts daemons must not bring back the role that is just being stopped. Where nobody works on the
    # change any more the old role is as good as before: a VM that lost power then must not be stranded.
    if document.phase is Phase.INTENT and (pid := holder(paths.mode_lock)) is not None:
        raise ModeError(
            f"the mode is just being changed from {document.mode} to {document.target} by process {pid}",
            hint="wait for it to end",
            code="MODE-005",
        )
    return document.mode


def change(
    paths: Paths,
    target: Mode,
    machine: Machine,
    *,
    clock: Clock,
    force: bool,
    count_enrolled: Callable[[], int],
) -> Iterator[Move]:
    """Changes the mode; yields each step once it is done. Dropping the iterator is like a kill at that step.

    Args:
        paths: of the instance.
        target: the wanted mode.
        machine: stops and enables.
        clock: dates the moves.
        force: leave the controller role although SEs are enrolled.
        count_enrolled: how many SEs are enrolled at the controller here; called only where it is left without force.

    Raises:
        ModeError: refused, before anything was changed; or the running daemon didn't stop.
        StorageError: the mode couldn't be read or written.
    """
    make_dir(paths.state, mode=0o755)
    with _alone(paths):
        file = document_of(paths)
        found = file.load()
        # A machine with a store and without a mode lost its mode file: its SEs count all the same.
        leaves = found.mode is Mode.CONTROLLER if found is not None else paths.store_file.exists()
        if leaves and target is not Mode.CONTROLLER and not force:
            _refuse_while_enrolled(count_enrolled(), target)

        document = advance(found or ModeDocument(), Event.WANT, at=clock.now(), target=target)
        file.save(document)
        yield Move("intent", document, [])
        if document.phase is Phase.INTENT:
            not_done = machine.stop()
            yield Move("stop", document, not_done)
            document = advance(document, Event.STOPPED, at=clock.now())
            file.save(document)
            yield Move("write", document, [])
        not_done = machine.enable(document.mode)
        yield Move("enable", document, not_done)
        document = advance(document, Event.ENABLED, at=clock.now())
        file.save(document)
        yield Move("done", document, [])


@contextmanager
def _alone(paths: Paths) -> Iterator[None]:
    """Keeps two changes apart."""
    lock = RootLock(paths.mode_lock)
    try:
        lock.acquire()
    except LockedError:
        raise ModeError(
            f"the mode is being changed by process {holder(paths.mode_lock) or '?'} already",
            hint="wait for it to end, then ask again",
            code="MODE-005",
        ) from None
    try:
        paths.mode_lock.chmod(0o644)  # a daemon that starts meanwhile asks whether it is held
        yield
    finally:
        lock.release()


def _refuse_while_enrolled(count: int, target: Mode) -> None:
    if count:
        ses = "1 SE is" if count == 1 else f"{count} SEs are"
        raise ModeError(
            f"{ses} enrolled at this controller and would lose it by a change to {target}",
            hint="delete them first (`appliance se list`), or repeat with --force; its state stays on disk either way",
            code="MODE-003",
        )


class BareMachine:
    """A machine without systemd, or where we aren't root: stops the daemon itself, and starts nothing.

    Args:
        paths: of the instance.
        why: why systemd isn't used, a clause.
        progress: is told a sentence each second while the daemon drains.
        timeout_s: how long it may take to stop.
    """

    def __init__(
        self, paths: Paths, *, why: str, progress: Callable[[str], None], timeout_s: float = STOP_TIMEOUT_S
    ) -> None:
        self._paths = paths
        self._why = why
        self._progress = progress
        self._timeout_s = timeout_s

    def stop(self) -> list[str]:
        """Stops who holds the root's lock."""
        stop_holder(self._paths, timeout_s=self._timeout_s, progress=self._progress)
        return [f"no systemd unit was disabled: {self._why}"]

    def enable(self, role: Mode) -> list[str]:
        """Starts nothing, and says so."""
        if role is Mode.NONE:
            return []
        not_done = [f"no systemd unit was installed or enabled: {self._why}"]
        if holder(self._paths.lock) is None:
            root = "" if str(self._paths.root) == "/" else f" --root {self._paths.root}"
            not_done.append(f"the daemon was not started: run `appliance{root} run`")
        return not_done


def stop_holder(paths: Paths, *, timeout_s: float, progress: Callable[[str], None]) -> None:
    """Sends SIGTERM to the daemon that holds the root's lock and waits until it has drained and ended.

    Raises:
        ModeError: it may not be signalled, or still runs after `timeout_s`.
    """
    pid = holder(paths.lock)
    if pid is None:
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The pid may have become somebody else's since it was read; a descriptor can't.
        if holder(paths.lock) != pid:
            return
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        except PermissionError:
            raise ModeError(
                f"the daemon (process {pid}) runs as another user and can't be stopped by this one",
                hint="repeat as root; the change goes on from here",
                code="MODE-006",
            ) from None
        _wait_for_end(descriptor, pid, timeout_s=timeout_s, progress=progress)
    finally:
        os.close(descriptor)
    if (other := holder(paths.lock)) is not None:
        raise ModeError(
            f"process {pid} stopped, and process {other} took its place at once",
            hint="stop whatever restarts the daemon, then repeat; the change goes on from here",
            code="MODE-006",
        )


def _wait_for_end(descriptor: int, pid: int, *, timeout_s: float, progress: Callable[[str], None]) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    started = time.monotonic()
    while not poll.poll(min(1.0, timeout_s) * 1000):
        waited_s = time.monotonic() - started
        if waited_s >= timeout_s:
            raise ModeError(
                f"the daemon (process {pid}) didn't stop within {timeout_s:g} s",
                hint=f"look what it does, end it with `kill -KILL {pid}`, and repeat; the change goes on from here",
                code="MODE-006",
            )
        progress(f"process {pid} drains and stops, {waited_s:.0f} s so far")
