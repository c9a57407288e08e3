"""One daemon's own view of itself, in a file that `appliance status` and `appliance why` read without asking it.

It holds the state line and this side's half of the causal chain. "Each step needs the one before it": when a step
fails or has to wait, the later ones aren't true any more and wait too. The file lies on a tmpfs and is replaced by
rename, not synced; a failure to write it is logged once and never disturbs the daemon. The state line lies beside it
as text, for the machine's consoles (`appliance-console.path`), and is written anew only when it changes.

What a daemon wrote holds for as long as it lives. So its main thread (an SE) or loop (a controller) touches the file
every few seconds, `Health.beat`, and who reads it asks `stuck` before believing it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import weakref
from pathlib import Path

import msgspec

from appliance import __version__
from appliance.protocol import strict_json
from appliance.protocol.why import Chain, Link, Step, StepResult, verdict
from appliance.runtime import log as logs
from appliance.runtime.clock import Clock

BEAT_S = 5.0
"""How often a daemon shows that it stirs."""
SILENT_S = 30.0
"""A daemon that didn't for so long hangs: what it wrote before is no news any more."""
_SAME_CONTENT_EVERY_S = 1.0
_MAX_BYTES = 256 * 1024
_log = logs.bind("health")
_STEPS = list(Step)


class HealthDocument(msgspec.Struct, frozen=True, kw_only=True):
    """What the file holds. Times are seconds since 1970."""

    side: str
    """`controller` or `se`."""
    pid: int
    version: str
    started_at: float
    written_at: float
    mode: str
    state: str
    reason: str
    addresses: list[str]
    since: float
    """Since when state and reason hold."""
    steps: list[Link]


class Health:
    """Collects and writes. Thread-safe.

    Args:
        path: the file; its directory exists.
        side: `controller` or `se`.
        clock: dates the steps.
    """

    def __init__(self, path: Path, side: str, clock: Clock) -> None:
        self._path = path
        self._side = side
        self._clock = clock
        self._lock = threading.Lock()
        self._started_at = self._since = clock.now()
        # The SE can't see the controller's check of the reverse path; the controller sees each SE's chain elsewhere.
        first = StepResult.WAITING if side == "se" else StepResult.UNSEEN
        self._steps = {step: Link(step=step, result=first) for step in _STEPS}
        self._steps[Step.REVERSE] = Link(step=Step.REVERSE, result=StepResult.UNSEEN)
        self._line: tuple[str, str, str, tuple[str, ...]] = ("", "", "", ())
        self._on_console = ""
        self._written: object = None
        self._written_at = float("-inf")
        self._is_failing = False
        self._spares: list[tuple[Path, int]] = []
        """Kept open for the moment in which no descriptor is left, since what that stops is told here, too; one that
        were given up for it would be somebody else's at once. Used in turn: what readers see is never written to."""
        with contextlib.suppress(OSError):
            for number in range(2):
                spare = path.with_name(f".{path.name}.spare-{number}")
                spare.unlink(missing_ok=True)  # an earlier life's may be what readers see
                descriptor = os.open(spare, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                weakref.finalize(self, os.close, descriptor).atexit = False
                self._spares.append((spare, descriptor))

    def step(self, step: Step, result: StepResult, text: str = "", code: str = "", hint: str = "") -> None:
        """Records how a step went, now."""
        with self._lock:
            self._steps[step] = Link(step=step, result=result, at=self._clock.now(), text=text, code=code, hint=hint)
            if result in {StepResult.FAILED, StepResult.WAITING}:
                for later in _STEPS[_STEPS.index(step) + 1 :]:
                    if self._steps[later].result is not StepResult.UNSEEN:
                        self._steps[later] = Link(step=later, result=StepResult.WAITING)
            self._write()

    def take_over(self, link: Link) -> None:
        """Records a step as an earlier life of this daemon saw it, with its time."""
        with self._lock:
            self._steps[link.step] = link
            self._write()

    def line(self, mode: str, state: str, reason: str, addresses: list[str]) -> None:
        """Records the state line: role, state, why, and the addresses that matter."""
        line = (mode, state, reason, tuple(addresses))
        with self._lock:
            if line[:3] != self._line[:3]:
                self._since = self._clock.now()
            self._line = line
            self._write()
            self._show()

    def beat(self) -> None:
        """Shows that this daemon stirs: touches the file, or writes it anew where somebody took it away."""
        try:
            os.utime(self._path)
        except OSError:
            with self._lock:
                self._written = None
                self._write()

    def chain(self, subject: str) -> Chain:
        """Returns this side's chain with its verdict."""
        with self._lock:
            steps = list(self._steps.values())
        return Chain(subject=subject, side=self._side, steps=steps, verdict=verdict(steps))

    def _show(self) -> None:
        """Writes the line for the consoles: mode, state, reason, and every address that leads here."""
        from appliance.runtime import host  # whoever only reads this file needs no figures of the host

        mode, state, reason, known = self._line
        try:
            own = host.addresses()
        except OSError:
            return  # no descriptor left to ask with; whoever told this line goes on all the same
        where = ", ".join(dict.fromkeys([*own, *known])) or "no address yet"
        text = f"appliance: {mode} {state}: {reason} [{where}]"
        if text == self._on_console:
            return
        draft = self._path.with_name(f".console.{os.getpid()}")
        try:
            draft.write_text(text + "\n", encoding="utf-8")
            draft.replace(self._path.with_name("console"))
        except OSError:
            return  # health.json, beside it, told that already
        self._on_console = text

    def _write(self) -> None:
        content = (self._line, [(link.step, link.result, link.text, link.code) for link in self._steps.values()])
        now = self._clock.monotonic()
        if content == self._written and now - self._written_at < _SAME_CONTENT_EVERY_S:
            return
        mode, state, reason, addresses = self._line
        document = HealthDocument(
            side=self._side,
            pid=os.getpid(),
            version=__version__,
            started_at=self._started_at,
            written_at=self._clock.now(),
            mode=mode,
            state=state,
            reason=reason,
            addresses=list(addresses),
            since=self._since,
            steps=list(self._steps.values()),
        )
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._put(draft, msgspec.json.encode(document))
        except OSError as error:
            if not self._is_failing:
                _log.warning("health can't be written to %s: %s", self._path, error.strerror)
            self._is_failing = True
            return
        self._is_failing = False
        self._written, self._written_at = content, now

    def _put(self, draft: Path, content: bytes) -> None:
        try:
            draft.write_bytes(content)
        except OSError as error:
            if len(self._spares) < 2 or error.errno not in {errno.EMFILE, errno.ENFILE}:
                raise
            spare, descriptor = self._spares[0]
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content, 0)
            draft.unlink(missing_ok=True)
            os.link(spare, draft)
            draft.replace(self._path)
            self._spares.reverse()
        else:
            draft.replace(self._path)


def read_health(path: Path) -> HealthDocument | None:
    """Returns what a daemon last wrote, or None where there is nothing that can be read.

    Whether that daemon still lives is not said here: look at `pid`, and ask `stuck`.
    """
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_BYTES), type=HealthDocument)
    except (OSError, *strict_json.UNDECODABLE):
        return None


def stuck(pid: int, path: Path) -> str:
    """Returns what keeps the daemon in process `pid`, which wrote `path`, from doing anything; "" where it stirs.

    A clause that goes on after "process N". `pid` must be alive; a process that nobody may look at counts as stirring.
    """
    try:
        # Behind the name, which may hold anything (proc_pid_stat(5)).
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        silent_s = time.time() - path.stat().st_mtime
    except (OSError, IndexError):
        return ""
    if state in {"T", "t"}:
        return f"is stopped, by a signal or a debugger; `kill -CONT {pid}` lets it go on"
    if silent_s > SILENT_S:
        return f"has not stirred for {silent_s:.0f} s: it hangs, or this machine is out of processor time"
    return ""
