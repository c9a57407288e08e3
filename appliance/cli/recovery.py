"""`appliance controller recovery`: what a restore left to do."""

from __future__ import annotations

import click

from appliance.cli import output
from appliance.cli.context import CliContext, json_option, pass_context, print_json, reason_option
from appliance.cli.output import Cell, Styled
from appliance.protocol.operator import RecoveryView

_SHOWN = 20


def print_warnings(warnings: list[str]) -> None:
    """Prints what can't be known, one line each."""
    for text in warnings:
        output.say(output.screen(), Styled("! ", "bold yellow"), text)


def _show(context: CliContext, view: RecoveryView) -> None:
    if context.json:
        print_json(view)
        return
    console = output.screen()
    if not view.epoch:
        output.say(console, "this controller was never restored from a backup")
        return
    ended = f"ended {output.moment(view.ended_at)}"
    some = ", ".join(view.waiting[:_SHOWN]) + (" …" if len(view.waiting) > _SHOWN else "")
    fields: list[tuple[str, Cell]] = [
        ("RECOVERY", Styled("receipts are taken", "yellow") if view.is_active else ended),
        ("restored", f"{output.moment(view.began_at)}, epoch {view.epoch}"),
        ("of the backup", f"{output.moment(view.backup_made_at)}, epoch {view.backup_epoch}"),
        ("new SE numbers", f"from {view.numbers_from}"),
        ("receipts hold", f"{output.count(len(view.waiting), 'SE')}: {some}" if view.waiting else "nobody waits"),
    ]
    output.fields(console, fields)
    print_warnings(view.warnings)


@click.group("recovery")
def recovery() -> None:
    """After a restore: SEs that the backup doesn't know show their receipts and wait for approval."""


@recovery.command()
@json_option
@pass_context
def status(context: CliContext) -> None:
    """Tells who waits with a receipt, and what can't be known."""
    _show(context, context.operator.recovery())


@recovery.command()
@reason_option
@json_option
@pass_context
def end(context: CliContext, reason: str) -> None:
    """Takes receipts no more; do it when all SEs are back and what was revoked is revoked again."""
    _show(context, context.operator.set_recovery("end", reason=reason))


@recovery.command()
@reason_option
@json_option
@pass_context
def begin(context: CliContext, reason: str) -> None:
    """Takes receipts again, for SEs that were off until now."""
    _show(context, context.operator.set_recovery("begin", reason=reason))
