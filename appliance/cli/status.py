"""`appliance status`: the fleet in one look."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
import msgspec

from appliance.cli import output, se, this_machine
from appliance.cli.context import CliContext, json_option, pass_context, print_json
from appliance.cli.output import Cell, Styled
from appliance.protocol.enroll import Refusals
from appliance.protocol.fleet import State
from appliance.protocol.operator import StatusView

if TYPE_CHECKING:
    from rich.console import Console

_MOST_ROWS = 30

_REFUSALS = {refusal.value.code: refusal.value.title for refusal in Refusals}


@click.command("status")
@click.option("--check", is_flag=True, help="Exit with 1 where there is a problem, for monitoring.")
@click.option("--all", "show_all", is_flag=True, help=f"All SEs, not only the first {_MOST_ROWS}.")
@json_option
@pass_context
def command(context: CliContext, check: bool, show_all: bool) -> None:
    """Shows the fleet in one look: states, problems, and the SEs, worst first. On an SE, its own state line."""
    if this_machine.is_se(context.paths):
        _tell_own(context, check=check)
        return
    operator = context.operator
    status = operator.status()
    if context.json:
        print_json(status)
    else:
        ses = sorted(operator.ses(), key=se.SORTS["state"])
        console, now = output.screen(), time.time()
        _print_head(console, status, now=now)
        _print_problems(console, status)
        if ses:
            shown = ses if show_all else ses[:_MOST_ROWS]
            console.print()
            se.print_table(console, shown, now=now)
            if len(shown) < len(ses):
                console.print()
                output.say(console, f"and {len(ses) - len(shown):,} more; `appliance status --all` shows them")
        else:
            console.print()
            output.say(console, "no SE has enrolled yet; bake an image from `appliance image-key create`")
    if check and status.problems:
        click.get_current_context().exit(1)


def _tell_own(context: CliContext, *, check: bool) -> None:
    seen, now = this_machine.look(context.paths), time.time()
    if context.json:
        print_json({**msgspec.to_builtins(seen.health), "trouble": this_machine.trouble(seen, now=now)})
    else:
        this_machine.print_line(output.screen(), seen, now=now)
    if check and not this_machine.is_well(seen):
        click.get_current_context().exit(1)


def _print_head(console: Console, status: StatusView, *, now: float) -> None:
    controller = status.controller
    output.say(
        console,
        Styled(f"cluster {controller.cluster_id}", "bold"),
        f"  node {controller.node}  version {controller.version}  up {output.duration(now - controller.started_at)}",
    )
    counts: list[Cell] = []
    for state in State:
        if number := status.states.get(state.value, 0):
            counts += ["  ", Styled(f"{number:,} {state.value}", output.STATE_STYLES[state])]
    total = sum(status.states.values())
    output.say(
        console,
        Styled(output.count(total, "SE"), "bold"),
        *counts,
        f"  ({output.count(status.links, 'link')}, heartbeat every {status.heartbeat_interval_s:g} s)",
    )


def _print_problems(console: Console, status: StatusView) -> None:
    if status.problems:
        output.heading(console, output.count(len(status.problems), "problem"))
        for problem in status.problems:
            output.say(console, Styled("! ", "bold red"), problem)
    if status.refusals:
        output.heading(console, "refused since start")
        for code, number in sorted(status.refusals.items(), key=lambda entry: -entry[1]):
            output.say(console, f"{number:>7,}  {code}  {_REFUSALS.get(code, '')}".rstrip())
