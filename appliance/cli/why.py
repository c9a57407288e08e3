"""`appliance why`: the causal chain of one SE, step by step, and the first link that failed.

On a controller it asks the daemon, about an SE, a source address or an attempt id; each half of the chain is told by
the side that saw it, so on an SE's own console it reads what that SE's daemon wrote, which needs neither a network nor
a right.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from appliance.cli import output, se, this_machine
from appliance.cli.completion import se_names
from appliance.cli.context import CliContext, json_option, pass_context, print_json
from appliance.cli.output import Cell, Styled
from appliance.errors import NotFoundError, UsageError
from appliance.protocol.fleet import SeSummary
from appliance.protocol.operator import SeDetail
from appliance.protocol.why import Chain, Link, Step, StepResult, verdict

if TYPE_CHECKING:
    from rich.console import Console

_STOPS = {StepResult.FAILED, StepResult.WAITING}
_OTHERS = {"controller": {Step.BOOT, Step.STORED}, "se": {Step.REVERSE}}
"""Steps that leave no trace on this side."""
_MOST_NAMED = 8


@click.command("why")
@click.argument("subject", required=False, shell_complete=se_names)
@json_option
@pass_context
def command(context: CliContext, subject: str | None) -> None:
    """Tells where an SE's way into the fleet stopped, and why.

    SUBJECT is an SE (name, number, se_id or address), a source address or an attempt id. Without one, and on an SE,
    this machine tells its own half. Exits with 1 where a step failed or is still to come.
    """
    if subject is None or this_machine.is_se(context.paths):
        is_well = _tell_own(context, subject)
    else:
        is_well = _tell_subject(context, subject)
    if not is_well:
        click.get_current_context().exit(1)


def _tell_subject(context: CliContext, subject: str) -> bool:
    operator = context.operator
    chain = operator.why(subject)
    try:
        detail = operator.se(subject)
    except (NotFoundError, UsageError):
        detail = None  # a source or an attempt: nobody enrolled by it
    from_there = [entry for entry in operator.ses() if entry.source == subject] if detail is None else [detail.summary]
    if context.json:
        print_json(chain)
    else:
        console, now = output.screen(), time.time()
        _print_subject(console, chain, detail, now=now)
        print_chain(console, chain.steps, now=now, side=chain.side)
        _print_verdict(console, chain.steps, chain.verdict, now=now)
        if detail is None and from_there:
            _print_from_there(console, from_there)
    stopped = stop(chain.steps)
    if detail is None and from_there and stopped is not None and stopped.result is StepResult.WAITING:
        stopped = None  # what the attempt still waited for, an SE from there has done
    return stopped is None and all(se.is_well(entry) for entry in from_there)


def _tell_own(context: CliContext, subject: str | None) -> bool:
    seen, now = this_machine.look(context.paths), time.time()
    health = seen.health
    trouble = this_machine.trouble(seen, now=now)
    told = trouble or verdict(health.steps)
    if context.json:
        print_json(Chain(subject=subject or health.side, side=health.side, steps=health.steps, verdict=told))
    else:
        console = output.screen()
        if subject is not None:
            output.say(console, Styled(f"this machine is an SE and knows of itself only, not of {subject!r}", "yellow"))
        this_machine.print_line(console, seen, now=now)
        if health.side == "controller":
            output.say(console, "next: name an SE, a source address or an attempt id; `appliance status` lists the SEs")
        else:
            print_chain(console, health.steps, now=now, side=health.side)
            if not trouble or stop(health.steps):  # else nothing stopped as far as that daemon came to see it
                _print_verdict(console, health.steps, told, now=now)
    is_stopped = health.side == "se" and stop(health.steps) is not None
    return this_machine.is_well(seen) and not is_stopped


def _print_subject(console: Console, chain: Chain, detail: SeDetail | None, *, now: float) -> None:
    if detail is None:
        output.say(console, Styled(chain.subject, "bold"), "  known by its attempts only")
        return
    summary = detail.summary
    output.say(
        console,
        Styled(summary.name, "bold"),
        f"  SE {summary.number}  {summary.address}  ",
        output.state(summary.state),
        f" for {output.duration(max(0.0, now - summary.since))}",
    )
    if not se.is_well(summary):
        output.say(console, Styled(f"{summary.reason.value}: {summary.text}", output.STATE_STYLES[summary.state]))
    for text in detail.alarms:
        output.say(console, Styled(f"! {text}", "bold red"))
    for text in detail.drift:
        output.say(console, Styled(f"! {text}", "yellow"))


def _print_from_there(console: Console, ses: list[SeSummary]) -> None:
    console.print()
    cells: list[Cell] = ["SEs linked from there: "]
    for entry in sorted(ses, key=se.SORTS["state"])[:_MOST_NAMED]:
        cells += [f" {entry.name} ", output.state(entry.state)]
    more = len(ses) - _MOST_NAMED
    output.say(console, *cells, f"  and {more:,} more" if more > 0 else "")


def stop(steps: list[Link]) -> Link | None:
    """Returns the first link that failed, else the first that waits, else None."""
    return next(
        (link for wanted in (StepResult.FAILED, StepResult.WAITING) for link in steps if link.result is wanted), None
    )


def print_chain(console: Console, steps: list[Link], *, now: float, side: str) -> None:
    """Prints all nine steps in their order: mark, step, time (UTC), time since the step before it, what happened."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2, 0, 0))
    for is_right in (False, False, True, True):
        grid.add_column(justify="right" if is_right else "left", no_wrap=True)
    grid.add_column(overflow="fold")
    by_step = {link.step: link for link in steps}
    before, is_blocked = 0.0, False
    for step in Step:
        link = by_step.get(step, Link(step=step, result=StepResult.WAITING))
        is_stop = link.result in _STOPS
        style = "dim" if is_blocked and is_stop else ""
        mark, mark_style = output.mark(console, link.result)
        happened = _what(link, side=side, is_blocked=is_blocked)
        cells: list[Cell] = [
            Styled(mark, style or mark_style),
            Styled(step.value, style or ("bold" if is_stop else "")),
            Styled(output.moment(link.at, now=now) if link.at else "", "dim"),
            Styled(_later(link.at - before) if before and link.at >= before else "", "dim"),
            Styled(happened, style or ("dim" if link.result is StepResult.UNSEEN else "")),
        ]
        grid.add_row(*(output.text(cell) for cell in cells))
        before = link.at or before
        is_blocked = is_blocked or is_stop
    console.print()
    console.print(grid)


def _later(seconds: float) -> str:
    return f"+{seconds:.1f}s" if seconds < 9.95 else f"+{output.duration(seconds)}"


def _what(link: Link, *, side: str, is_blocked: bool) -> str:
    if link.text or link.code:
        return link.text or link.code
    if link.result is StepResult.UNSEEN:
        if link.step not in _OTHERS.get(side, ()):
            return "not noted here"
        other = "controller" if side == "se" else "SE"
        return f"only the {other} sees it: `appliance why` there"
    if link.result is StepResult.WAITING:
        return "not reached" if is_blocked else "not yet"
    return ""


def _print_verdict(console: Console, steps: list[Link], told: str, *, now: float) -> None:
    """Prints where it stopped and what to do next; the step's own text stands above, and isn't said again."""
    link = stop(steps)
    console.print()
    if link is None:
        output.say(console, output.mark(console, StepResult.OK), "  ", Styled(told, "bold"))
        return
    lead = "stopped at" if link.result is StepResult.FAILED else "waiting for"
    code = f"  {link.code}" if link.code else ""
    when = f" {output.ago(link.at, now)}" if link.at else ""
    output.say(
        console, output.mark(console, link.result), "  ", Styled(f"{lead} {link.step.value}{when}{code}", "bold")
    )
    if link.hint:
        arrow = "->" if output.is_plain_ascii(console) else "→"
        output.say(console, Styled(f"{arrow}  {link.hint}", "cyan"))
