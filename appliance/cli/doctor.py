"""`appliance doctor`: looks at this machine for what keeps a daemon from working, changes nothing.

Each check is a function from what it looks at to findings; `examine` runs those of the machine's role. A finding is
`ok`, `warn` (works, but look at it) or `fail` (won't work); the command ends with 1 where one failed.
"""

from __future__ import annotations

import enum
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click

from appliance.cli import this_machine
from appliance.cli.context import CliContext, json_option, pass_context, print_json
from appliance.errors import ApplianceError
from appliance.paths import Paths
from appliance.protocol.address import parse_endpoint
from appliance.protocol.fleet import State
from appliance.runtime import child, health, host
from appliance.runtime.clock import Clock, SystemClock
from appliance.runtime.mode import Mode, ModeDocument, Phase, load
from appliance.runtime.units import UNITS, why_not_systemd
from appliance.settings import Settings
from appliance.storage.lock import holder

OLDEST_GLIBC = (2, 35)
"""The frozen executables are built against it."""
_MAX_SOCKET_PATH = 107
_FEW_RESERVES = 5
_ANSWER_S = 5.0
"""How long a controller may take to answer the doctor."""


class Result(enum.StrEnum):
    """How a check went."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(NamedTuple):
    """One thing that was looked at."""

    check: str
    result: Result
    text: str
    hint: str = ""


@click.command("doctor")
@json_option
@pass_context
def command(context: CliContext) -> None:
    """Check this machine for what would keep the daemon from working."""
    findings = examine(context)
    failed = sum(finding.result is Result.FAIL for finding in findings)
    if context.json:
        print_json({"ok": failed == 0, "findings": [finding._asdict() for finding in findings]})
    else:
        _print(findings)
    if failed:
        raise click.exceptions.Exit(1)


def _print(findings: list[Finding]) -> None:
    from appliance.cli import output

    styles = {Result.OK: "", Result.WARN: "yellow", Result.FAIL: "bold red"}
    rows: list[tuple[str, output.Cell]] = []
    for finding in findings:
        text = finding.text + (f" – {finding.hint}" if finding.hint else "")
        name = f"{finding.result.value:4}  {finding.check}"
        for line in text.splitlines():  # an error may name several problems, one a line
            rows.append((name, output.Styled(line.strip(), styles[finding.result])))
            name = ""
    # Folded, not cut: an error's text is what one came for.
    output.fields(output.screen(), rows)


def examine(context: CliContext) -> list[Finding]:
    """Returns the findings on the machine and its role, in order."""
    paths = context.paths
    findings: list[Finding] = []
    settings, document = Settings(), ModeDocument()
    try:
        settings = context.settings
        source = paths.settings_file if paths.settings_file.exists() else "defaults"
        findings.append(Finding("settings", Result.OK, f"{source} and the environment hold"))
    except ApplianceError as error:
        findings.append(Finding("settings", Result.FAIL, error.message, error.hint))
    try:
        document = load(paths)
        findings.append(check_mode(document))
    except ApplianceError as error:
        findings.append(Finding("mode", Result.FAIL, error.message, error.hint))
    role = document.mode
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: check_cluster(paths, role),
        lambda: check_daemon(paths, role),
        lambda: check_permissions(paths),
        lambda: check_disk(paths, settings.controller.disk_reserve_bytes),
        lambda: check_clock(SystemClock(), role),
        lambda: check_ports(paths, settings, role),
        lambda: check_ssh_server(role),
        lambda: check_glibc(os.confstr("CS_GNU_LIBC_VERSION") or ""),
        lambda: check_sockets(paths),
        lambda: check_systemd(paths, role),
        lambda: check_answers(paths, role),
    ]
    for check in checks:
        findings += check()
    return findings


def check_mode(document: ModeDocument) -> Finding:
    """Whether the role is settled."""
    if document.phase is not Phase.DONE:
        hint = f"finish it: `appliance mode set {document.target}`"
        return Finding("mode", Result.FAIL, f"a change to {document.target} was cut after {document.phase}", hint)
    if document.mode is Mode.NONE:
        return Finding("mode", Result.WARN, "this machine has no role", "`appliance mode set controller` or `… se`")
    return Finding("mode", Result.OK, document.mode.value)


def holder_or_none(paths: Paths) -> int | None:
    """Returns the daemon's process id, None where there is none or only root may see it."""
    try:
        return holder(paths.lock)
    except ApplianceError:
        return None


def check_cluster(paths: Paths, role: Mode) -> Iterator[Finding]:
    """Whether a controller has its cluster."""
    if role is Mode.CONTROLLER and not this_machine.may_have_cluster(paths):
        hint = "`appliance controller init --address …` makes one, `appliance controller restore` takes a backup"
        yield Finding("cluster", Result.FAIL, "there is no cluster on this machine yet", hint)


def check_daemon(paths: Paths, role: Mode) -> Iterator[Finding]:
    """Whether the daemon runs, and what it says of itself."""
    if role is Mode.NONE:
        return
    try:
        pid = holder(paths.lock)
    except ApplianceError as error:
        yield Finding("daemon", Result.WARN, error.message, "look as root")
        return
    if pid is None:
        yield Finding("daemon", Result.WARN, "not running", this_machine.how_to_start(paths))
        return
    found = health.read_health(paths.health_file)
    if found is not None and found.pid == pid and (why := health.stuck(pid, paths.health_file)):
        yield Finding("daemon", Result.FAIL, f"process {pid} {why}")
        return
    says = f": {found.state} {found.reason}".rstrip() if found is not None and found.pid == pid and found.state else ""
    if role is Mode.SE and found is not None and found.pid == pid and found.state != State.UP:
        yield Finding("daemon", Result.WARN, f"process {pid}{says}", "`appliance why` tells where its way in stopped")
        return
    yield Finding("daemon", Result.OK, f"process {pid}{says}")


def check_answers(paths: Paths, role: Mode) -> Iterator[Finding]:
    """Whether a controller answers, and whether a restored one waits for somebody to look after what it missed."""
    from appliance.cli.operator import NO_ANSWER, Operator

    seen = health.read_health(paths.health_file)
    if role is not Mode.CONTROLLER or (seen is not None and health.stuck(seen.pid, paths.health_file)):
        return  # told above
    try:
        view = Operator(paths, deadline_s=_ANSWER_S).recovery()
    except ApplianceError as error:
        if error.code == NO_ANSWER:
            yield Finding("daemon", Result.FAIL, error.message, f"see {this_machine.log_of(paths)}")
        return  # else it doesn't run, or isn't ours to ask: told above
    if view.is_active:
        text = f"in RECOVERY since a restore; {len(view.waiting)} SEs wait with receipts"
        yield Finding("recovery", Result.WARN, text, "`appliance controller recovery status`")


_PRIVATE = {"identity.json", "tickets.json"}
"""Files with secrets in them whose names don't end like a key's."""


def _is_private(file: Path) -> bool:
    is_key = file.suffix == ".key" or "image-key" in file.name
    is_ssh_key = file.name.startswith(("id_", "ssh_host_")) and file.suffix != ".pub"
    return is_key or is_ssh_key or file.name in _PRIVATE


def check_permissions(paths: Paths) -> Iterator[Finding]:
    """Whether others can read secrets or change state."""
    count = 0
    problems = []
    for directory in (paths.settings_file.parent, paths.controller_state, paths.se_state):
        try:
            found = [directory, *directory.rglob("*")] if directory.exists() else []
            for file in found:
                status = file.lstat()
                mode = stat.S_IMODE(status.st_mode)
                if stat.S_ISLNK(status.st_mode):
                    continue
                count += 1
                if mode & 0o022:
                    problems.append((file, mode, "others can change it", "go-w"))
                elif _is_private(file) and mode & 0o077:
                    problems.append((file, mode, "others can read a secret", "go-rwx"))
        except OSError as error:
            text = f"{directory} can't be looked at: {error.strerror}"
            yield Finding("permissions", Result.WARN, text, "look as root")
    for file, mode, text, remedy in problems:
        yield Finding("permissions", Result.FAIL, f"{file} has mode {mode:04o}: {text}", f"chmod {remedy} {file}")
    if not problems:
        yield Finding("permissions", Result.OK, f"{count} files and directories are as they should be")


def check_disk(paths: Paths, reserve_bytes: int) -> Iterator[Finding]:
    """Whether there is room for state."""
    place = next(path for path in (paths.state, *paths.state.parents) if path.exists())
    free = shutil.disk_usage(place).free
    text = f"{free / 2**20:.0f} MiB free at {place}"
    if free < reserve_bytes:
        text += f", below the reserve of {reserve_bytes / 2**20:.0f} MiB: a controller refuses enrollments"
        yield Finding("disk", Result.FAIL, text, f"free space on that file system (`df -h {place}`)")
    elif free < _FEW_RESERVES * reserve_bytes:
        yield Finding("disk", Result.WARN, text, "soon too little for a controller")
    else:
        yield Finding("disk", Result.OK, text)


def check_clock(clock: Clock, role: Mode) -> Iterator[Finding]:
    """Whether the kernel calls its clock synchronised."""
    if clock.synchronised():
        yield Finding("clock", Result.OK, "synchronised")
    else:
        hint = "start a time daemon (systemd-timesyncd or chrony); `timedatectl` shows its state"
        text = "not synchronised"
        if role is Mode.SE:
            text += ": certificates are checked against the controller's time"
        elif role is Mode.CONTROLLER:
            text += ": certificates, expiries and the audit get their times from it, and SEs may take theirs"
        yield Finding("clock", Result.WARN, text, hint)


def _ports(settings: Settings, role: Mode) -> list[tuple[str, int]]:
    if role is Mode.SE:
        return []
    terms = settings.controller
    return [
        ("ssh", parse_endpoint(terms.ssh_listen, default_port=22)[1]),
        ("enroll", parse_endpoint(terms.enroll_listen, default_port=8443)[1]),
        ("reverse", terms.reverse_port),
        ("metrics", parse_endpoint(terms.metrics_listen, default_port=9101)[1]),
    ]


def check_ports(paths: Paths, settings: Settings, role: Mode) -> Iterator[Finding]:
    """Who holds the ports that the role needs; on an SE, whether its sshd is there."""
    if role is Mode.SE:
        port = settings.se.sshd_port
        found = host.who_listens(port)
        if found is None:
            hint = "install and start the OpenSSH server, or set se.sshd_port"
            text = f"nobody listens on port {port}: the controller's way back ends there"
            yield Finding("port", Result.FAIL, text, hint)
        else:
            yield Finding("port", Result.OK, f"sshd's port {port} is held by {found[1]} (process {found[0] or '?'})")
        return
    own = {1, holder_or_none(paths)}  # process 1 holds the sockets of our units
    for name, port in _ports(settings, role):
        found = host.who_listens(port) if port else None
        if found is None:
            yield Finding("port", Result.OK, f"{name} port {port} is free" if port else f"{name} port is any free one")
        elif found[0] in own:
            yield Finding("port", Result.OK, f"{name} port {port} is ours")
        else:
            who = f"{found[1]} (process {found[0]})" if found[0] else found[1]
            # Whose it is, only root can see: it may well be our own daemon.
            is_foreign = role is Mode.CONTROLLER and found[0] != 0
            hint = "move that service to another port, or change ours in [controller]" if found[0] else "look as root"
            result = Result.FAIL if is_foreign else Result.WARN
            yield Finding("port", result, f"{name} port {port} is held by {who}", hint)


def check_ssh_server(role: Mode) -> Iterator[Finding]:
    """Whether the OpenSSH server is installed."""
    program = child.find_program("sshd")
    if program is not None:
        yield Finding("sshd", Result.OK, program)
    else:
        result = Result.FAIL if role is Mode.SE else Result.WARN
        yield Finding(
            "sshd", result, "the OpenSSH server isn't installed; SEs need it", "apt-get install openssh-server"
        )


def check_glibc(text: str) -> Iterator[Finding]:
    """Whether the C library is one that the frozen executables run on. `text` as in confstr(3): `glibc 2.36`."""
    name, _, version = text.partition(" ")
    parts = version.split(".")
    if name != "glibc" or len(parts) < 2 or not all(part.isdecimal() for part in parts[:2]):
        yield Finding("glibc", Result.WARN, f"unknown C library {text!r}", "the executables are built for glibc")
    elif (int(parts[0]), int(parts[1])) < OLDEST_GLIBC:
        wanted = ".".join(map(str, OLDEST_GLIBC))
        result = Result.FAIL if getattr(sys, "frozen", False) else Result.WARN
        yield Finding(
            "glibc", result, f"{version}, expected {wanted} or newer", "use a newer system, such as Debian 12"
        )
    else:
        yield Finding("glibc", Result.OK, version)


def check_sockets(paths: Paths) -> Iterator[Finding]:
    """Whether unix sockets below this root have names that fit (unix(7))."""
    longest = max(paths.controller_socket, paths.forward_socket, paths.se_socket, key=lambda path: len(str(path)))
    length = len(os.fsencode(longest))
    if length > _MAX_SOCKET_PATH:
        text = f"{longest} has {length} bytes, at most {_MAX_SOCKET_PATH} fit into a socket's address"
        yield Finding("sockets", Result.WARN, text, "use a shorter --root; programs such as curl can't reach it")


def check_systemd(paths: Paths, role: Mode) -> Iterator[Finding]:
    """Whether the role's units start it at boot."""
    why = why_not_systemd(paths)
    if why:
        yield Finding("systemd", Result.WARN, f"not used: {why}", "nothing starts the daemon at boot")
        return
    for unit in UNITS[role]:
        enabled = child.run(["systemctl", "is-enabled", unit], timeout_s=10.0, check=False).stdout.strip() or "unknown"
        active = child.run(["systemctl", "is-active", unit], timeout_s=10.0, check=False).stdout.strip() or "unknown"
        is_well = enabled == "enabled" and active == "active"
        hint = "" if is_well else f"`appliance mode set {role}` repairs it; `systemctl status {unit}` says more"
        yield Finding("systemd", Result.OK if is_well else Result.FAIL, f"{unit} is {enabled}, {active}", hint)
