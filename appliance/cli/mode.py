"""`appliance mode`: show and change the role of this machine. What a change does, `runtime.mode` says."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from appliance.cli.context import CliContext, json_option, pass_context
from appliance.errors import ModeError, StorageError, UnreachableError
from appliance.paths import Paths

_STEPS = {
    "intent": "the change is on record",
    "stop": "no role runs any more",
    "write": "the mode is written",
    "enable": "the role is enabled and started",
    "done": "done",
}


@click.group("mode")
def command() -> None:
    """Show or change the role of this machine."""


@command.command("show")
@json_option
@pass_context
def show(context: CliContext) -> None:
    """Show the role of this machine, and whether its daemon runs."""
    from appliance.runtime import mode
    from appliance.storage.lock import holder

    document = mode.load(context.paths)
    try:
        pid = holder(context.paths.lock)
        daemon = _daemon(context.paths, pid)
    except StorageError:  # the daemon's user holds it, and the mode is anybody's to see
        pid, daemon = None, "whether its daemon runs only root can see"
    is_cut = document.phase is not mode.Phase.DONE
    if context.json:
        import json

        found = {
            "mode": document.mode,
            "target": document.target,
            "phase": document.phase,
            "changed_at": document.at,
            "daemon_pid": pid,
            "daemon": daemon,
        }
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"{document.mode}, {daemon}")
    if is_cut:
        click.echo(
            f"a change to {document.target} was cut after {document.phase}; "
            f"`appliance mode set {document.target}` finishes it"
        )


@command.command("set")
@click.argument("role", type=click.Choice(["controller", "se", "none"]))
@click.option("--force", is_flag=True, help="Leave the controller role although SEs are enrolled.")
@json_option
@pass_context
def set_(context: CliContext, role: str, force: bool) -> None:
    """Make this machine a controller, an SE, or neither.

    Drains and stops the running role, keeps its state, and enables the new one. May be repeated, also after it was cut.
    """
    from appliance.runtime import mode, units
    from appliance.runtime.clock import SystemClock

    paths = context.paths
    target = mode.Mode(role)
    machine = units.machine_of(paths, context.settings, units=shipped_units(), progress=_say)
    not_done: list[str] = []
    if target is mode.Mode.CONTROLLER:
        obstacles = _obstacles(context)
        # Where systemd is about to start the daemon it would only fail; elsewhere somebody starts it later.
        if obstacles and isinstance(machine, units.SystemdMachine):
            error = obstacles[0]
            raise ModeError(error.message, hint=f"{error.hint}; nothing was changed", code=error.code)
        not_done.extend(f"{error.message}; {error.hint}" for error in obstacles)
    moves = mode.change(
        paths,
        target,
        machine,
        clock=SystemClock(),
        force=force,
        count_enrolled=lambda: count_enrolled(paths),
    )
    document = mode.ModeDocument()
    for move in moves:
        document = move.document
        not_done.extend(sentence for sentence in move.not_done if sentence not in not_done)
        if not context.json and not move.not_done:
            _say(_STEPS[move.step])
    if context.json:
        import json

        click.echo(json.dumps({"mode": document.mode, "phase": document.phase, "not_done": not_done}, indent=2))
        return
    click.echo(f"this machine's mode is {document.mode}")
    for sentence in not_done:
        click.echo(f"not done: {sentence}")


def _daemon(paths: Paths, pid: int | None) -> str:
    """Says whether the daemon runs, a clause."""
    from appliance.runtime.health import read_health, stuck

    if pid is None:
        return "no daemon runs"
    health = read_health(paths.health_file)
    why = stuck(pid, paths.health_file) if health is not None and health.pid == pid else ""
    return f"its daemon (process {pid}) {why}" if why else f"its daemon runs (process {pid})"


def _say(sentence: str) -> None:
    click.echo(sentence, file=sys.stderr)


def shipped_units() -> dict[str, str]:
    """Returns the texts of the units that come with the program, by file name."""
    directory = Path(__file__).parent / "units"
    return {file.name: file.read_text("utf-8") for file in sorted(directory.iterdir()) if file.is_file()}


def _obstacles(context: CliContext) -> list[ModeError]:
    """Returns what would keep a controller from starting here."""
    from appliance.cli import this_machine

    found = []
    if not this_machine.may_have_cluster(context.paths):
        found.append(
            ModeError(
                "there is no cluster on this machine yet",
                hint="make one first: `appliance controller init --address …`",
                code="MODE-008",
            )
        )
    if held := _ssh_port_held(context):
        found.append(
            ModeError(
                held,
                hint="move it, for example sshd with `Port 2222` in /etc/ssh/sshd_config, or set controller.ssh_listen",
                code="MODE-004",
            )
        )
    return found


def _ssh_port_held(context: CliContext) -> str:
    """Returns who else holds the gateway's port, a sentence; "" where nobody does, or where it is our own daemon."""
    from appliance.protocol.address import parse_endpoint
    from appliance.runtime import host
    from appliance.storage.lock import holder

    _, port = parse_endpoint(context.settings.controller.ssh_listen, default_port=22)
    found = host.who_listens(port) if port else None
    # Process 1 holds our own sockets, once they are enabled.
    if found is None or found[0] in {1, holder(context.paths.lock)}:
        return ""
    pid, name = found
    who = f"{name} (process {pid})" if pid else name
    return f"port {port}, which the controller needs for its SEs, is held by {who}"


def count_enrolled(paths: Paths) -> int:
    """Returns how many SEs are enrolled at the controller here: by asking it, else by reading its store.

    Raises:
        UnreachableError: it runs and doesn't answer.
        StoreError: the store can't be read.
    """
    from appliance.cli.operator import Operator
    from appliance.storage.lock import RootLock, holder

    try:
        return Operator(paths).status().enrolled
    except UnreachableError:
        if holder(paths.lock) is not None:
            raise
    if not paths.store_file.exists():
        return 0
    with RootLock(paths.lock):  # no daemon may start while its store is open here
        import asyncio

        return asyncio.run(_count_in_store(paths))


async def _count_in_store(paths: Paths) -> int:
    from appliance.controller import records
    from appliance.controller.store.sqlite import SqliteStore
    from appliance.protocol.enroll import SeStatus
    from appliance.runtime.clock import SystemClock

    store = SqliteStore.open(paths.store_file, clock=SystemClock())
    try:
        count, last = 0, ""
        while entries := await store.range(records.SE_PREFIX, start_after=last):
            last = entries[-1].key
            found = [records.decode(entry.value, records.SeRecord, entry.key) for entry in entries]
            count += sum(record.status is SeStatus.ENROLLED for record in found)
        return count
    finally:
        await store.close()
