"""What the daemon on this machine last wrote about itself, and whether it still lives: no socket, no right needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from appliance.cli import output
from appliance.cli.output import Cell, Styled
from appliance.errors import UnreachableError
from appliance.paths import Paths
from appliance.protocol.fleet import State
from appliance.runtime.health import HealthDocument, read_health, stuck

if TYPE_CHECKING:
    from rich.console import Console


class Seen(NamedTuple):
    """A daemon's word on itself, and whether it can still be believed."""

    health: HealthDocument
    is_alive: bool
    """Its process still runs."""
    stuck: str
    """What keeps that process from doing anything, see `runtime.health.stuck`."""


def look(paths: Paths) -> Seen:
    """Reads the health file.

    Raises:
        UnreachableError: no daemon has written one since boot.
    """
    health = read_health(paths.health_file)
    if health is None:
        raise UnreachableError(
            f"no daemon has told about itself here: there is no {paths.health_file}",
            hint=f"`appliance mode show` says what this machine is; {how_to_start(paths)}",
            code="REACH-006",
        )
    is_alive = _lives(health.pid)
    return Seen(health, is_alive, stuck(health.pid, paths.health_file) if is_alive else "")


def is_se(paths: Paths) -> bool:
    """Whether the daemon here is, or was, an SE's, and no controller's socket is."""
    health = read_health(paths.health_file)
    return health is not None and health.side == "se" and not paths.controller_socket.exists()


def may_have_cluster(paths: Paths) -> bool:
    """Whether this controller was initialised, as far as this user may see."""
    try:
        return paths.cluster_file.exists()
    except PermissionError:
        return True


def how_to_start(paths: Paths) -> str:
    """What starts the daemon here, a clause."""
    if str(paths.root) == "/":
        return f"`systemctl start appliance` (or `appliance run`) starts it; {log_of(paths)} shows why it stopped"
    return f"`appliance --root {paths.root} run` starts it, and says why where it can't"


def log_of(paths: Paths) -> str:
    """Where to read what the daemon said, for the middle of a sentence."""
    return "`journalctl -u appliance -n 50`" if str(paths.root) == "/" else "what its daemon logged"


def why_slow(paths: Paths) -> str:
    """The end of a sentence about a controller that takes its time: what can be seen of it from outside."""
    health = read_health(paths.health_file)
    why = stuck(health.pid, paths.health_file) if health is not None else ""
    return f": process {health.pid} {why}" if health is not None and why else ""


def print_line(console: Console, seen: Seen, *, now: float) -> None:
    """Prints the state line, and in red why it may not hold any more."""
    health = seen.health
    style = {"UP": "green", **{state.value: style for state, style in output.STATE_STYLES.items()}}.get(
        health.state, ""
    )
    cells: list[Cell] = [
        Styled(f"this {'SE' if health.side == 'se' else health.side}", "bold"),
        "  ",
        Styled(health.state or "starting", style),
        f" for {output.duration(max(0.0, now - health.since))}",
        f"  {health.reason}" if health.reason else "",
        f"  {' '.join(health.addresses)}" if health.addresses else "",
    ]
    output.say(console, *cells)
    if told := trouble(seen, now=now):
        output.say(console, Styled(told, "bold red"))


def trouble(seen: Seen, *, now: float) -> str:
    """Why what the daemon wrote may not hold any more, a sentence; "" where it lives and stirs."""
    health = seen.health
    if not seen.is_alive:
        when = output.ago(health.written_at, now)
        return f"the daemon that wrote this (pid {health.pid}) no longer runs; it last wrote {when}"
    return f"the daemon that wrote this (process {health.pid}) {seen.stuck}" if seen.stuck else ""


def is_well(seen: Seen) -> bool:
    """Whether the daemon lives, stirs and, on an SE, is UP."""
    return seen.is_alive and not seen.stuck and (seen.health.side != "se" or seen.health.state == State.UP)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
