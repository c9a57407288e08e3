"""`appliance se pending|approve|reject|reinstate`: who may come in, and who may come back."""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from appliance.cli import output
from appliance.cli.completion import se_names
from appliance.cli.context import CliContext, json_option, pass_context, print_json, reason_option
from appliance.cli.operator import Operator
from appliance.cli.output import Cell, Column
from appliance.cli.recovery import print_warnings
from appliance.errors import NotFoundError, UsageError
from appliance.protocol.fleet import State
from appliance.protocol.operator import PendingView, SeDetail

_COLUMNS = (
    Column("SE", right=True),
    Column("NAME", least=16),
    Column("FINGERPRINT ON THE CONSOLE"),
    Column("SOURCE", leaves=1),
    Column("ASKED", leaves=2, right=True),
    Column("LAPSES", leaves=4, right=True),
    Column("POLICY", leaves=3),
    Column("TOKEN", leaves=5),
    Column("IMAGE KEY", leaves=6),
    Column("INSTANCE-ID", leaves=7, least=12),
    Column("LABELS", leaves=8, least=12),
)


def name(detail: SeDetail) -> str:
    """How an SE is spoken of."""
    return output.clean(f"SE {detail.summary.number} ({detail.summary.name})")


def _row(se: PendingView, now: float) -> list[Cell]:
    return [
        str(se.number),
        se.name,
        se.fingerprint,
        se.source,
        output.ago(se.asked_at, now),
        output.ago(se.lapses_at, now),
        se.policy.value,
        f"receipt {se.receipt_fault}".strip() if se.receipt_epoch else se.token_id or output.NONE,
        se.image_key_id,
        se.facts.instance_id or output.NONE,
        " ".join(f"{key}={value}" for key, value in sorted(se.labels.items())) or output.NONE,
    ]


@click.command()
@json_option
@pass_context
def pending(context: CliContext) -> None:
    """Lists SEs that wait for approval, with the fingerprint that each VM prints on its console."""
    waiting = context.operator.pending()
    if context.json:
        print_json(waiting)
        return
    console, now = output.screen(), time.time()
    if not waiting:
        output.say(console, "no SE waits for approval")
        return
    output.table(console, _COLUMNS, [_row(se, now) for se in waiting])


_SES = click.argument("ses", metavar="SE...", nargs=-1, required=True, shell_complete=se_names)


def _each(context: CliContext, ses: tuple[str, ...], work: Callable[[str], SeDetail], told: str) -> None:
    done = []
    for subject in ses:
        done.append(work(subject))
        if not context.json:
            output.say(output.screen(), f"{name(done[-1])} {told}")
    if context.json:
        print_json(done)


def _by_fingerprint(operator: Operator, subject: str) -> tuple[str, str]:
    """Returns se_id and fingerprint where `subject` is the fingerprint of an SE that waits, else `subject` and ""."""
    if not subject.startswith("SHA256:"):
        return subject, ""
    for se in operator.pending():
        if se.fingerprint == subject:
            return se.se_id, subject
    raise NotFoundError(f"no SE with the fingerprint {subject} waits for approval", hint="see `appliance se pending`")


@click.command()
@click.argument("ses", metavar="SE...", nargs=-1, shell_complete=se_names)
@click.option("--receipts", is_flag=True, help="All that showed this restored controller a receipt that holds.")
@reason_option
@json_option
@pass_context
def approve(context: CliContext, ses: tuple[str, ...], receipts: bool, reason: str) -> None:
    """Lets in each SE that waits for approval, by number, name, se_id or the fingerprint on its VM's console.

    Compare the fingerprint first: number and name say nothing about whose key it is. A receipt does: the cluster's root
    signed it for that key.
    """
    if receipts == bool(ses):
        raise UsageError("name SEs, or pass --receipts", hint="`appliance se pending` lists who waits")
    operator = context.operator
    if receipts:
        _approve_receipts(context, operator, reason)
        return

    def work(subject: str) -> SeDetail:
        se, fingerprint = _by_fingerprint(operator, subject)
        return operator.approve_se(se, fingerprint=fingerprint, reason=reason)

    _each(context, ses, work, "is approved; it comes up by itself")


def _approve_receipts(context: CliContext, operator: Operator, reason: str) -> None:
    done = operator.approve_receipts(reason=reason)
    if context.json:
        print_json(done)
        return
    for se in done.approved:
        output.say(output.screen(), output.clean(f"SE {se.number} ({se.name}) is approved; it comes up by itself"))
    output.say(output.screen(), f"{output.count(len(done.approved), 'SE')} let in by their receipts")
    print_warnings(done.warnings)


@click.command()
@_SES
@reason_option
@json_option
@pass_context
def reject(context: CliContext, ses: tuple[str, ...], reason: str) -> None:
    """Keeps out each SE that waits for approval; its use of the image key and its token are free again."""
    operator = context.operator
    _each(
        context, ses, lambda subject: operator.reject_se(_by_fingerprint(operator, subject)[0], reason=reason),
        "is rejected",
    )  # fmt: skip


@click.command()
@_SES
@reason_option
@json_option
@pass_context
def reinstate(context: CliContext, ses: tuple[str, ...], reason: str) -> None:
    """Undoes the revocation, rejection or quarantine of each SE; one that waited for approval waits again."""
    operator = context.operator
    done = [operator.reinstate_se(subject, reason=reason) for subject in ses]
    if context.json:
        print_json(done)
        return
    for detail in done:
        waits = detail.summary.state is State.PENDING
        told = f"waits for approval again: appliance se approve {detail.summary.number}" if waits else "may come back"
        output.say(output.screen(), f"{name(detail)} {told}")


COMMANDS = (pending, approve, reject, reinstate)
