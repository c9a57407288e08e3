"""Brings a lab up: makes what is missing, starts what isn't running, waits until every SE is UP.

The order, each step skipped where its result is there already, so that a second `up` finishes what a first began:

    1. free ports, which then stay (the trust document names them)       lab.json
    2. the cluster, by `appliance controller init`
    3. the controller's daemon, until its operator API answers
    4. per SE: seed by `image-builder seed`, SSH server until it shows its banner, the SE's daemon
    5. all SEs UP, by the operator API; then their SSH host keys go to known_hosts

`lab.json` is written after each process that was started: whatever happens, `down` finds all of them and no others.
What was started is left running when a later step fails, for the eyes of whoever looks for the reason.
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from appliance import settings
from appliance.errors import ApplianceError, UnreachableError, UsageError
from appliance.lab import ports, processes, programs, sshd
from appliance.lab.layout import (
    LOOPBACK,
    MAX_SES,
    ControllerPart,
    Lab,
    LabError,
    Layout,
    Process,
    SePart,
    known_host,
    se_name,
    to_toml,
)
from appliance.paths import Paths
from appliance.pki import ssh_keys
from appliance.protocol.fleet import SeSummary, State
from appliance.protocol.operator import ControllerView, SeDetail
from appliance.protocol.why import Chain, StepResult, verdict
from appliance.runtime import child
from appliance.runtime.health import read_health
from appliance.storage.atomic import make_dir, write_atomic
from appliance.storage.document import Document
from appliance.storage.lock import RootLock

Say = Callable[[str], None]
"""Takes one line of progress."""

POLL_S = 0.1
START_S = 30.0
LOG_TAIL_LINES = 15


class Operator(Protocol):
    """What the lab asks a controller; the command line's client is one."""

    def controller(self) -> ControllerView:
        """The controller itself."""
        ...

    def ses(self) -> list[SeSummary]:
        """All SEs."""
        ...

    def se(self, subject: str) -> SeDetail:
        """One SE."""
        ...

    def why(self, subject: str) -> Chain:
        """How far one SE got."""
        ...


Connect = Callable[[Paths], Operator]
"""Makes an `Operator` of where a controller lies."""


def document(layout: Layout) -> Document[Lab]:
    """Returns the lab's own document."""
    return Document(layout.file, Lab)


def load(layout: Layout) -> Lab:
    """Returns the lab at `layout`. Raises `UsageError` where there is none."""
    lab = document(layout).load() if layout.file.exists() else None
    if lab is None:
        raise UsageError(f"there is no lab at {layout.root}", hint="make one with `appliance lab up`, or give --root")
    return lab


def bring_up(
    layout: Layout,
    *,
    ses: int,
    overrides: Mapping[str, str],
    connect: Connect,
    say: Say,
    deadline_s: float | None = None,
) -> Lab:
    """Brings the lab at `layout` up with at least `ses` SEs.

    Args:
        layout: where; a new lab wants an empty place.
        ses: how many SEs; those that are there already stay.
        overrides: `section.key` to value, written into the settings of the parts that the section concerns.
        connect: makes the client of the operator API.
        say: takes one line of progress.
        deadline_s: how long the SEs may take to come up; by default a minute and two seconds each.

    Raises:
        LabError: a part ended, or the SEs aren't UP in time; the message says why each isn't.
        ApplianceError: a step failed.
    """
    if not 1 <= ses <= MAX_SES:
        raise UsageError(f"{ses} SEs, 1 to {MAX_SES} expected", hint="`appliance lab fleet` simulates more")
    if not layout.file.exists() and layout.root.exists():
        foreign = sorted(path.name for path in layout.root.iterdir() if path.name != layout.lock.name)
        if foreign:
            raise UsageError(
                f"{layout.root} is no lab and not empty: {', '.join(foreign[:5])}",
                hint="give an empty place with --root",
            )
    work = _Work(layout, connect, say, overrides)
    make_dir(layout.root)
    with RootLock(layout.lock):
        work.plan(ses)
        work.start_controller()
        for index in range(len(work.lab.ses)):
            work.start_se(index)
        work.wait_until_up(60.0 + 2.0 * len(work.lab.ses) if deadline_s is None else deadline_s)
        work.write_known_hosts()
        return work.lab


class _Work:
    """One run of `bring_up`; `lab` is what is on disk at any moment."""

    def __init__(self, layout: Layout, connect: Connect, say: Say, overrides: Mapping[str, str]) -> None:
        self._layout = layout
        self._operator = connect(layout.controller)
        self._say = say
        self._overrides = overrides
        # all mistakes in them are told before anything is made; the lab's root itself has no settings file
        self._wanted = settings.load(Paths(layout.root), environ={}, overrides=overrides)
        self.lab: Lab

    def _save(self, lab: Lab) -> None:
        document(self._layout).save(lab)
        self.lab = lab

    def plan(self, ses: int) -> None:
        layout = self._layout
        sshd.find()  # missing programs are told before anything is made
        if layout.file.exists():
            lab = load(layout)
        else:
            enroll, ssh, reverse, metrics = ports.free_ports(4)
            lab = Lab(
                user=_user_name(),
                controller=ControllerPart(enroll_port=enroll, ssh_port=ssh, reverse_port=reverse, metrics_port=metrics),
            )
        parts = list(lab.ses)
        taken = {port for port in msgspec.to_builtins(lab.controller).values() if isinstance(port, int)}
        taken |= {part.sshd_port for part in parts}
        for port in ports.free_ports(max(0, ses - len(parts)), taken=taken):
            parts.append(SePart(name=se_name(len(parts) + 1), sshd_port=port))
        self._save(msgspec.structs.replace(lab, ses=parts))

    # --- controller ----------------------------------------------------------------------------------------------

    def start_controller(self) -> None:
        part, paths = self.lab.controller, self._layout.controller
        if processes.is_running(part.process):
            self._say("the controller runs already")
            self._await_controller(None)
            return
        self._settings(
            paths,
            {
                "enroll_listen": f"{LOOPBACK}:{part.enroll_port}",
                "ssh_listen": f"{LOOPBACK}:{part.ssh_port}",
                "reverse_port": part.reverse_port,
                "metrics_listen": f"{LOOPBACK}:{part.metrics_port}",
                "reverse_users": [self.lab.user],
            },
            role="controller",
        )
        if not part.bundle:
            self._say("making a cluster")
            part = msgspec.structs.replace(part, bundle=programs.initialise(paths, part))
            self._save(msgspec.structs.replace(self.lab, controller=part))
        programs.set_mode(paths, "controller")
        self._refuse_taken(part.enroll_port, part.ssh_port, part.reverse_port, part.metrics_port)
        self._say("starting the controller")
        daemon = programs.daemon(paths, self._layout.log("controller"))
        part = msgspec.structs.replace(part, process=_started(daemon))
        self._save(msgspec.structs.replace(self.lab, controller=part))
        self._await_controller(daemon)
        daemon.detach()

    def _refuse_taken(self, *wanted: int) -> None:
        taken = [str(port) for port in wanted if not ports.is_free(port)]
        if taken:
            raise LabError(
                f"port {', '.join(taken)} of this lab is in use by another program",
                hint=f"`ss -ltnp` shows by which; or make a new lab elsewhere than {self._layout.root}",
            )

    def _await_controller(self, daemon: child.Daemon | None) -> None:
        def answers() -> bool:
            try:
                self._operator.controller()
            except UnreachableError:
                return False
            return True

        self._poll("the controller to answer", answers, daemon, START_S)

    # --- SEs -----------------------------------------------------------------------------------------------------

    def start_se(self, index: int) -> None:
        part = self.lab.ses[index]
        paths = self._layout.se(part.name)
        if not processes.is_running(part.sshd):
            make_dir(paths.root)
            self._refuse_taken(part.sshd_port)
            sshd.prepare(self._layout, part, user=self.lab.user)
            server = sshd.start(self._layout, part)
            part = self._save_se(index, msgspec.structs.replace(part, sshd=_started(server)))
            self._poll(f"{part.name}'s sshd", lambda: sshd.is_answering(part.sshd_port), server, START_S)
            server.detach()
        if processes.is_running(part.process):
            return
        if not self._layout.seed(part.name).exists():
            programs.bake(Path(self.lab.controller.bundle), self._layout.seed(part.name), part.name)
        self._settings(
            paths,
            {"seed": str(self._layout.seed(part.name)), "sshd_host": LOOPBACK, "sshd_port": part.sshd_port},
            role="se",
        )
        programs.set_mode(paths, "se")
        daemon = programs.daemon(paths, self._layout.log(part.name))
        self._save_se(index, msgspec.structs.replace(part, process=_started(daemon)))
        daemon.detach()
        self._say(f"started {part.name} (pid {daemon.pid}), its sshd on port {part.sshd_port}")

    def _save_se(self, index: int, part: SePart) -> SePart:
        parts = list(self.lab.ses)
        parts[index] = part
        self._save(msgspec.structs.replace(self.lab, ses=parts))
        return part

    def _settings(self, paths: Paths, own: dict[str, object], *, role: str) -> None:
        """Writes an instance's settings: what the lab needs, then what the user wants for this role."""
        sections: dict[str, dict[str, object]] = {role: own}
        foreign = {"controller", "se"} - {role}
        for dotted in self._overrides:
            section, _, key = dotted.partition(".")
            if section not in foreign:
                sections.setdefault(section, {})[key] = getattr(getattr(self._wanted, section), key)
        if not self._overrides and paths.settings_file.exists():
            return  # keeps what was wanted, or edited, since the lab was made
        make_dir(paths.settings_file.parent, mode=0o755)
        write_atomic(paths.settings_file, to_toml(sections).encode(), mode=0o644)

    def wait_until_up(self, deadline_s: float) -> None:
        began = time.monotonic()
        waiting = {part.name for part in self.lab.ses}
        self._say(f"waiting for {len(waiting)} SE{'s' if len(waiting) > 1 else ''} to come up")

        def all_up() -> bool:
            try:
                fleet = self._operator.ses()
            except UnreachableError:
                if not processes.is_running(self.lab.controller.process):
                    raise LabError("the controller ended" + self._tail("controller")) from None
                return False
            for se in fleet:
                if se.name in waiting and se.state is State.UP:
                    waiting.discard(se.name)
                    self._say(f"{se.name} is UP at {se.address} after {time.monotonic() - began:.1f} s")
            for part in self.lab.ses:
                if part.name in waiting and not processes.is_running(part.process):
                    raise LabError(f"{part.name} ended" + self._tail(part.name))
            return not waiting

        try:
            self._poll("the SEs", all_up, None, deadline_s)
        except UnreachableError:
            raise LabError(
                f"{len(waiting)} of {len(self.lab.ses)} SEs aren't UP after {deadline_s:.0f} s:"
                + "".join(f"\n  {name}: {self._reason(name)}" for name in sorted(waiting)),
                hint=f"the lab keeps running; logs are {self._layout.log('*')}, `appliance lab down` ends it",
            ) from None

    def _reason(self, name: str) -> str:
        """Why one SE isn't UP: the controller's word where it knows the SE, else the SE's own."""
        try:
            return "controller: " + self._operator.why(name).verdict
        except ApplianceError:
            health = read_health(self._layout.se(name).health_file)
            if health is None:
                return "neither controller nor SE tells anything" + self._tail(name)
            known = [step for step in health.steps if step.result is not StepResult.UNSEEN]
            return f"SE: {verdict(known)}" + (f"; {health.reason}" if health.reason else "")

    def _tail(self, name: str) -> str:
        path = self._layout.log(name)
        try:
            lines = path.read_text("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError:
            return ""
        return "".join(f"\n    {line}" for line in (f"end of {path}:", *lines))

    def _poll(self, what: str, is_done: Callable[[], bool], daemon: child.Daemon | None, deadline_s: float) -> None:
        """Waits for another process. Raises `LabError` where it ended, `UnreachableError` after the deadline."""
        until = time.monotonic() + deadline_s
        told_at = time.monotonic()
        while not is_done():
            code = daemon.poll() if daemon is not None else None
            if daemon is not None and code is not None:
                tail = daemon.log_path.read_text("utf-8", "replace").splitlines()[-LOG_TAIL_LINES:]
                raise LabError(
                    f"waiting for {what}: the process ended with exit code {code}:\n    " + "\n    ".join(tail),
                    hint=f"its whole log is {daemon.log_path}",
                )
            now = time.monotonic()
            if now > until:
                raise UnreachableError(f"waited {deadline_s:.0f} s for {what}", hint=f"see {self._layout.log('*')}")
            if now - told_at > 5.0:
                told_at = now
                self._say(f"still waiting for {what} ({until - now:.0f} s left)")
            time.sleep(POLL_S)

    def write_known_hosts(self) -> None:
        port = self.lab.controller.reverse_port
        names = {part.name for part in self.lab.ses}
        lines = [
            ssh_keys.known_hosts_line([known_host(se.address, port)], key)
            for se in self._operator.ses()
            if se.name in names
            for key in self._operator.se(str(se.number)).host_keys
        ]
        write_atomic(self._layout.known_hosts, "".join(f"{line}\n" for line in lines).encode())


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise LabError(
            f"user id {os.geteuid()} has no name on this machine, and sshd logs in names only",
            hint="add it to /etc/passwd, or run the lab as another user",
        ) from None


def _started(daemon: child.Daemon) -> Process:
    try:
        return processes.identify(daemon.pid)
    except LabError:
        daemon.terminate(0.0)
        raise
