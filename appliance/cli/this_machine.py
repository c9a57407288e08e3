"""What the daemon on this machine last wrote about itself, and whether it still lives: no socket, no right needed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from appliance.cli import output
from appliance.cli.output import Cell, Styled
from appliance.errors import UnreachableError
from appliance.paths import Paths
from appliance.protocol.fleet import State
from appliance.runtime.health import HealthDocument, read_health

if TYPE_CHECKING:
    from rich.console import Console


class Seen(NamedTuple):
    """A daemon's word on itself, and whether its process still runs."""

    health: HealthDocument
    is_alive: bool


def look(paths: Paths) -> Seen:
    """Reads the health file.

    Raises:
        UnreachableError: no daemon has written one since boot.
    """
    health = read_health(paths.health_file)
    if health is None:
        raise UnreachableError(
            f"no daemon has told about itself here: there is no {paths.health_file}",
            hint="`appliance mode show` says what this machine is, `appliance run` runs it, "
            "and `journalctl -u appliance -n 50` shows why it stopped",
            code="REACH-006",
        )
    return Seen(health, _lives(health.pid))


def is_se(paths: Paths) -> bool:
    """Whether the daemon here is, or was, an SE's, and no controller's socket is."""
    health = read_health(paths.health_file)
    return health is not None and health.side == "se" and not paths.controller_socket.exists()


def print_line(console: Console, seen: Seen, *, now: float) -> None:
    """Prints the state line, and in red where its daemon is gone."""
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
    if not seen.is_alive:
        output.say(console, Styled(gone(seen, now=now), "bold red"))


def gone(seen: Seen, *, now: float) -> str:
    """The sentence for a daemon that is no more."""
    health = seen.health
    when = output.ago(health.written_at, now)
    return f"the daemon that wrote this (pid {health.pid}) no longer runs; it last wrote {when}"


def is_well(seen: Seen) -> bool:
    """Whether the daemon lives and, on an SE, is UP."""
    return seen.is_alive and (seen.health.side != "se" or seen.health.state == State.UP)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
