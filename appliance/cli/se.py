"""`appliance se`: service engines, one by one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import output, quantities, se_admission
from appliance.cli.completion import se_names
from appliance.cli.context import CliContext, json_option, pass_context, print_json, reason_option
from appliance.cli.output import Cell, Column
from appliance.cli.se_admission import name as _name
from appliance.errors import UsageError
from appliance.protocol.enroll import SeStatus
from appliance.protocol.fleet import Reason, SeSummary, State
from appliance.protocol.operator import SeDetail

if TYPE_CHECKING:
    from rich.console import Console

_WORST_FIRST = (
    State.DOWN,
    State.QUARANTINED,
    State.DEGRADED,
    State.UPGRADING,
    State.PENDING,
    State.CREATING,
    State.ENROLLED,
    State.UP,
    State.REVOKED,
)

_COLUMNS = (
    Column("SE", leaves=6, right=True),
    Column("NAME", least=20),
    Column("STATE"),
    Column("FOR", leaves=5, right=True),
    Column("ADDRESS"),
    Column("RTT", leaves=1, right=True),
    Column("CPU", leaves=2, right=True),
    Column("MEMORY", leaves=3, right=True),
    Column("UPTIME", leaves=4, right=True),
    Column("WHY", leaves=7, least=24),
    Column("SOURCE", leaves=8),
    Column("AGENT", leaves=9),
    Column("IMAGE KEY", leaves=10),
    Column("LABELS", leaves=11, least=12),
)

_MOST_NOTES = 10


def _low(value: float | None) -> float:
    return -1.0 if value is None else value


SORTS: dict[str, Callable[[SeSummary], Any]] = {
    "number": lambda se: se.number,
    "name": lambda se: (se.name, se.number),
    "state": lambda se: (_WORST_FIRST.index(se.state), se.reason is Reason.OK, se.number),
    "rtt": lambda se: (-_low(se.rtt_s), se.number),
    "cpu": lambda se: (-_low(se.cpu_pct), se.number),
    "memory": lambda se: (-_low((se.memory_used_bytes or 0) / (se.memory_total_bytes or 1)), se.number),
    "uptime": lambda se: (_low(se.uptime_s), se.number),
}


def is_well(se: SeSummary) -> bool:
    """Whether there is nothing to look at. Revoked ones are as somebody wanted them."""
    return se.state is State.REVOKED or (se.state is State.UP and se.reason is Reason.OK)


def _labels(labels: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(labels.items())) or output.NONE


def _row(se: SeSummary, now: float) -> list[Cell]:
    return [
        str(se.number),
        se.name,
        output.state(se.state),
        output.duration(max(0.0, now - se.since)) if se.since else output.NONE,
        se.address,
        output.rtt(se.rtt_s),
        output.percent(se.cpu_pct),
        output.memory(se.memory_used_bytes, se.memory_total_bytes),
        output.duration(se.uptime_s),
        output.NONE if se.reason is Reason.OK else f"{se.reason.value}: {se.text}",
        se.source or output.NONE,
        se.agent_version or output.NONE,
        se.image_key_id or output.NONE,
        _labels(se.labels),
    ]


def print_table(console: Console, ses: Sequence[SeSummary], *, now: float) -> None:
    """Prints SEs as a table; where it has no room for the reason, those of SEs in trouble follow below it."""
    shown = output.table(console, _COLUMNS, [_row(se, now) for se in ses])
    troubled = [se for se in ses if not is_well(se)]
    if "WHY" in shown or not troubled:
        return
    console.print()
    for se in troubled[:_MOST_NOTES]:
        style = output.STATE_STYLES[se.state]
        output.say(console, output.Styled(se.name, style), f"  {se.reason.value}: {se.text}")
    if len(troubled) > _MOST_NOTES:
        output.say(console, f"and {len(troubled) - _MOST_NOTES:,} more")


def _told(context: CliContext, detail: SeDetail, text: str) -> None:
    """Says what was done to an SE, or shows it as it stands now."""
    if context.json:
        print_json(detail)
    else:
        output.say(output.screen(), text)


@click.group("se")
def command() -> None:
    """Service engines: list, look at, approve, revoke, reinstate, delete."""


for _command in se_admission.COMMANDS:
    command.add_command(_command)


@command.command("list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([state.value for state in State], case_sensitive=False),
    help="Only SEs in this state; may be given several times.",
)
@click.option("--sort", type=click.Choice(list(SORTS)), default="number", show_default=True, help="Order of the list.")
@json_option
@pass_context
def list_(context: CliContext, states: tuple[str, ...], sort: str) -> None:
    """Lists SEs with their state and figures."""
    ses = context.operator.ses()
    wanted = sorted((se for se in ses if not states or se.state.value in states), key=SORTS[sort])
    if context.json:
        print_json(wanted)
        return
    console = output.screen()
    if not wanted:
        output.say(
            console, "no SE in that state" if ses else "no SE has enrolled yet; `appliance events --follow` waits"
        )
        return
    print_table(console, wanted, now=time.time())


def _image_key(detail: SeDetail, now: float) -> Cell:
    if not detail.summary.image_key_id:
        return output.NONE
    gone_at = detail.image_key_gone_at
    told = f"its copies destroyed {output.moment(gone_at, now=now)}" if gone_at else "not told that it was destroyed"
    return f"{detail.summary.image_key_id}, {told}"


def _detail_fields(detail: SeDetail, now: float) -> list[tuple[str, Cell]]:
    se, facts = detail.summary, detail.facts
    return [
        ("state", output.state(se.state)),
        ("why", f"{se.reason.value}: {se.text}"),
        ("since", f"{output.moment(se.since, now=now)} ({output.ago(se.since, now)})"),
        ("number, address", f"{se.number}, {se.address}"),
        ("se_id", se.se_id),
        ("connects from", se.source or output.NONE),
        ("last heartbeat", output.ago(detail.last_heartbeat_at, now)),
        ("RTT", output.rtt(se.rtt_s)),
        ("CPU", output.percent(se.cpu_pct)),
        ("memory", output.memory(se.memory_used_bytes, se.memory_total_bytes)),
        ("host up for", output.duration(se.uptime_s)),
        ("agent", se.agent_version or output.NONE),
        ("labels", _labels(se.labels)),
        ("enrolled", f"{output.moment(se.enrolled_at, now=now)} ({output.ago(se.enrolled_at, now)}), {detail.status}"),
        ("confirmed", f"{output.moment(detail.confirmed_at, now=now)} ({output.ago(detail.confirmed_at, now)})"),
        ("image key", _image_key(detail, now)),
        ("key", detail.thumbprint),
        *(("sshd host key", key) for key in detail.host_keys),
        ("DMI UUID", facts.dmi_uuid or output.NONE),
        ("instance-id", facts.instance_id or output.NONE),
        ("MAC addresses", " ".join(facts.macs) or output.NONE),
        ("image", f"{facts.image_digest or output.NONE} ({detail.image or 'not in the ledger'})"),
        *(("drift", output.Styled(text, "yellow")) for text in detail.drift),
        *(("alarm", output.Styled(text, "bold red")) for text in detail.alarms),
    ]


def _print_detail(context: CliContext, detail: SeDetail) -> None:
    if context.json:
        print_json(detail)
        return
    console = output.screen()
    output.say(console, output.Styled(detail.summary.name, "bold"))
    output.fields(console, _detail_fields(detail, time.time()))


@command.command()
@click.argument("se", shell_complete=se_names)
@json_option
@pass_context
def show(context: CliContext, se: str) -> None:
    """Shows all that is known of SE (number, name, se_id or address)."""
    _print_detail(context, context.operator.se(se))


@command.command("known-hosts")
@click.argument("host")
@pass_context
def known_hosts(context: CliContext, host: str) -> None:
    """Prints the known_hosts lines of the SE at HOST, for ssh over the reverse path.

    HOST is its address, or `[address]:port`. OpenSSH asks for them itself with, in ssh_config,
    `KnownHostsCommand /usr/bin/appliance se known-hosts %H` (an absolute path). Only an enrolled SE has any.
    """
    from appliance.pki import ssh_keys
    from appliance.protocol.address import se_number

    number = se_number(host.removeprefix("[").partition("]")[0])
    if number is None:
        raise UsageError(f"{host!r} is no SE's address", hint="127.1.0.1 is SE 1; `appliance se list` shows all")
    detail = context.operator.se(str(number))
    if detail.status != SeStatus.ENROLLED.value:
        raise UsageError(f"{_name(detail)} is {detail.status}: its host keys count for nothing")
    for key in detail.host_keys:
        click.echo(ssh_keys.known_hosts_line([host], key))


@command.command()
@click.argument("se", shell_complete=se_names)
@reason_option
@json_option
@pass_context
def revoke(context: CliContext, se: str, reason: str) -> None:
    """Closes the links of SE at once and admits no new one; `reinstate` undoes it."""
    detail = context.operator.revoke_se(se, reason=reason)
    _told(context, detail, f"{_name(detail)} is revoked; its links are closed. `se reinstate` undoes it")


@command.command()
@click.argument("se", shell_complete=se_names)
@reason_option
@json_option
@pass_context
def release(context: CliContext, se: str, reason: str) -> None:
    """Ends the quarantine of SE's copy: all links with its key close, whoever comes back first is SE.

    Switch the wrong one of the two off first.
    """
    detail = context.operator.release(se, reason=reason)
    _told(context, detail, f"{_name(detail)} is released; the first to come back with its key is this SE")


@command.command("rotate-key")
@click.argument("se", shell_complete=se_names)
@reason_option
@json_option
@pass_context
def rotate_key(context: CliContext, se: str, reason: str) -> None:
    """Has SE make itself a new key; the old one stops working when the new one is known."""
    detail = context.operator.rotate_se_key(se, reason=reason)
    _told(context, detail, f"{_name(detail)} makes itself a new key with its next heartbeat")


@command.command()
@click.argument("se", shell_complete=se_names)
@reason_option
@click.option("--yes", is_flag=True, help="Don't ask.")
@json_option
@pass_context
def delete(context: CliContext, se: str, reason: str, yes: bool) -> None:
    """Forgets SE for good: its number is not used again, and its key never gets in again."""
    operator = context.operator
    before = operator.se(se)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{_name(before)} is not deleted without a question", hint="add --yes")
        click.confirm(
            f"Delete {_name(before)}, {before.summary.state.value}, for good?",
            abort=True,
            err=True,
            default=False,
        )
    # by se_id: the name may have passed to another SE while the question stood
    detail = operator.delete_se(before.summary.se_id, reason=reason)
    if context.json:
        print_json(detail)
    else:
        output.say(
            output.screen(),
            f"{_name(detail)} is deleted; its VM may enroll as a new SE: `appliance enroll --anew` there",
        )


@command.command()
@click.argument("se", shell_complete=se_names)
@click.option("--since", type=quantities.DURATION, default="1h", show_default=True, help="How far to look back.")
@json_option
@pass_context
def telemetry(context: CliContext, se: str, since: float) -> None:
    """Shows the recent figures of SE; counters as their rate."""
    from appliance.cli import figures

    now = time.time()
    samples = context.operator.telemetry(se, since=now - since)
    if context.json:
        print_json(samples)
        return
    console = output.screen()
    if not samples:
        output.say(
            console, f"no figures of the last {output.duration(since)}; `appliance why {se}` says whether it is up"
        )
        return
    spread = output.duration(samples[-1].time - samples[0].time)
    output.say(
        console, f"{output.count(len(samples), 'sample')} over {spread}, newest {output.ago(samples[-1].time, now)}"
    )
    console.print()
    figures.print_table(console, samples)
