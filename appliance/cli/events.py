"""`appliance events`: what happened, and what happens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
import msgspec

from appliance.cli import output
from appliance.cli.context import CliContext, json_option, pass_context, print_json
from appliance.cli.output import Styled
from appliance.errors import UnreachableError
from appliance.protocol.operator import Event

if TYPE_CHECKING:
    from rich.console import Console

_NEWEST = 50
_WAIT_S = 25.0
_AGAIN_S = 1.0
_KIND_WIDTH = 16
"""Keeps the columns of one batch under those of the one before it."""

_STYLES = {"refused": "yellow", "clone": "bold magenta", "lost": "red", "revoked": "red", "deleted": "red"}


@click.command("events")
@click.option("--follow", is_flag=True, help="Go on with what happens from now; a restarted controller is waited for.")
@click.option("--after", type=click.IntRange(min=0), help=f"Events with a higher id.  [default: the newest {_NEWEST}]")
@json_option
@pass_context
def command(context: CliContext, follow: bool, after: int | None) -> None:
    """Shows events, oldest first. With --follow, --json prints one line an event."""
    operator = context.operator
    events = operator.events(after=after or 0)
    if after is None:
        events = events[-_NEWEST:]
    if context.json and not follow:
        print_json(events)
        return
    console = output.screen()
    _print(console, events, as_json=context.json)
    if not follow:
        if not events:
            output.say(console, "nothing has happened yet")
        return
    last_id = events[-1].id if events else after or 0
    is_away = False
    while True:
        try:
            events = operator.events(after=last_id, wait_s=_WAIT_S)
            is_away = False
        except UnreachableError as error:
            if not error.retryable:
                raise
            if not is_away:
                click.echo(f"{error.message}; waiting for it", err=True)
            is_away = True
            time.sleep(_AGAIN_S)
            continue
        _print(console, events, as_json=context.json)
        last_id = events[-1].id if events else last_id


def _print(console: Console, events: list[Event], *, as_json: bool) -> None:
    if as_json:
        for event in events:
            click.echo(msgspec.json.encode(event))
        return
    from rich.table import Table

    now = time.time()
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, min_width=_KIND_WIDTH)
    grid.add_column(overflow="fold")
    for event in events:
        style = _STYLES.get(event.kind.rpartition(".")[2], "")
        # on a terminal the text, which names the SE, is enough; off it somebody may look for the se_id
        subject = "" if console.is_terminal or event.subject in event.text else f"  {event.subject}"
        grid.add_row(
            output.text(Styled(output.moment(event.time, now=now), "dim")),
            output.text(Styled(event.kind, style)),
            output.text(event.text, subject),
        )
    if events:
        console.print(grid)
