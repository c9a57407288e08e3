"""`appliance audit`: who did what, and whether the record of it is whole."""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import click

from appliance.cli import output
from appliance.cli.context import CliContext, json_option, pass_context, print_json
from appliance.cli.operator import Operator
from appliance.cli.output import Column, Styled
from appliance.errors import StorageError, UsageError
from appliance.protocol import audit, strict_json
from appliance.protocol.enroll import is_se_id
from appliance.protocol.operator import AuditEntry, AuditVerdict

_PAGE = 1000
_MAX_FILE_BYTES = 256 * 1024 * 1024

_COLUMNS = (
    Column("#", right=True),
    Column("TIME", leaves=1),
    Column("ACTOR", leaves=2, least=12),
    Column("ACTION"),
    Column("SUBJECT"),
    Column("DETAIL", least=20),
)


@click.group("audit")
def command() -> None:
    """The audit: an append-only record, each entry chained to the one before it."""


def _pages(operator: Operator, after: int) -> Iterator[AuditEntry]:
    while page := operator.audit(after=after, limit=_PAGE):
        yield from page
        after = page[-1].sequence


@command.command()
@click.option("--limit", type=click.IntRange(min=0), default=50, show_default=True, help="How many; 0 is all.")
@click.option("--after", type=click.IntRange(min=0), help="The first ones behind this number, not the newest.")
@json_option
@pass_context
def show(context: CliContext, limit: int, after: int | None) -> None:
    """Shows the newest entries, oldest first. `--limit 0 --json` is what `audit verify --file` reads."""
    operator = Operator(context.paths.controller_socket)
    found = _pages(operator, after or 0)
    entries = list(deque(found, maxlen=limit or None) if after is None else itertools.islice(found, limit or None))
    if context.json:
        print_json(entries)
        return
    console, now = output.screen(), time.time()
    if not entries:
        output.say(console, "no entry")
        return

    def subject(entry: AuditEntry) -> str:
        is_long = console.is_terminal and is_se_id(entry.subject)
        return f"{entry.subject[:8]}…" if is_long else entry.subject

    rows = [
        [
            str(entry.sequence),
            output.moment(entry.time, now=now),
            entry.actor,
            entry.action,
            subject(entry),
            entry.detail,
        ]
        for entry in entries
    ]
    output.table(console, _COLUMNS, rows)


@command.command()
@click.option(
    "--file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Verify an export (`audit show --limit 0 --json`) offline; - is stdin.",
)
@click.option(
    "--cluster", "cluster_id", default="", help="With --file: the cluster id, to check the chain's beginning."
)
@click.option("--head", default="", help="With --file: the newest hash as a witness remembers it, to check the end.")
@json_option
@pass_context
def verify(context: CliContext, file: Path | None, cluster_id: str, head: str) -> None:
    """Checks that no entry was changed, removed, inserted or reordered. Exits with 1 where one was."""
    if file is None:
        if cluster_id or head:
            raise UsageError("--cluster and --head belong to --file", hint="the controller knows both by itself")
        verdict = Operator(context.paths.controller_socket).verify_audit()
    else:
        verdict = _verify_file(file, cluster_id, head)
    if context.json:
        print_json(verdict)
    else:
        console = output.screen()
        word = Styled("intact", "green") if verdict.intact else Styled("BROKEN", "bold red")
        output.say(console, word, f"  {verdict.text}")
        output.say(console, f"{verdict.entries:,} {'entry holds' if verdict.entries == 1 else 'entries hold'}; head")
        output.say(console, verdict.head)
        if file is not None and verdict.intact:
            unchecked = [name for name, given in (("--cluster", cluster_id), ("--head", head)) if not given]
            if unchecked:
                output.say(console, f"not checked without {' and '.join(unchecked)}: entries cut off at that end")
    if not verdict.intact:
        click.get_current_context().exit(1)


def _verify_file(file: Path, cluster_id: str, head: str) -> AuditVerdict:
    try:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as stream:
            raw = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{file} can't be read: {error.strerror}") from None
    entries = strict_json.decode(raw, list[AuditEntry], max_bytes=_MAX_FILE_BYTES)
    start = audit.genesis(cluster_id, entries[0].node, entries[0].epoch) if cluster_id and entries else ""
    return audit.verify(entries, start=start, head=head)
