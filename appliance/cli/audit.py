"""`appliance audit`: who did what, and whether the record of it is whole."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from appliance.cli import output
from appliance.cli.context import CliContext, json_option, pass_context, print_json
from appliance.cli.operator import Operator
from appliance.cli.output import Column, Styled
from appliance.errors import StorageError, StoreError, UsageError
from appliance.protocol import audit, strict_json
from appliance.protocol.enroll import is_se_id
from appliance.protocol.operator import AuditEntry, AuditVerdict
from appliance.protocol.trust import AuditHead, Envelope

_PAGE = 1000
_MAX_FILE_BYTES = 256 * 1024 * 1024

_SQLITE = b"SQLite format 3\0"
_HASH = re.compile(r"[0-9a-f]{64}")


class _Heads(msgspec.Struct, frozen=True):
    heads: list[Envelope]


class _WitnessFile(msgspec.Struct, frozen=True):
    """`witness.json` of an SE."""

    value: _Heads


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
    operator = context.operator
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
@json_option
@pass_context
def head(context: CliContext) -> None:
    """Signs the newest entry now, hands it to the SEs as witnesses, and prints it for `verify --head`."""
    envelope = context.operator.sign_audit_head()
    if context.json:
        print_json(envelope)
    else:
        click.echo(strict_json.encode(envelope))


@command.command()
@click.option(
    "--file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Verify offline: an export (`audit show --limit 0 --json`; - is stdin), or a copied store.sqlite.",
)
@click.option(
    "--cluster", "cluster_id", default="", help="With --file: the cluster id, to check the chain's beginning."
)
@click.option(
    "--head",
    default="",
    help="With --file: what a witness remembers: the newest hash, or a file (`audit head`, or an SE's witness.json).",
)
@click.option(
    "--root",
    "root_certificate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With a --head file: the root CA's certificate, which signed it.  [default: this instance's]",
)
@json_option
@pass_context
def verify(context: CliContext, file: Path | None, cluster_id: str, head: str, root_certificate: Path | None) -> None:
    """Checks that no entry was changed, removed, inserted or reordered. Exits with 1 where one was.

    Only a head shows that entries were cut off at the end, or that the whole chain was written anew.
    """
    if file is None:
        if cluster_id or head or root_certificate:
            raise UsageError(
                "--cluster, --head and --root belong to --file", hint="the controller knows them by itself"
            )
        verdict = context.operator.verify_audit()
    else:
        verdict = _verify_file(context, file, cluster_id, head, root_certificate)
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


def _read(file: Path) -> bytes:
    try:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as stream:
            return stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{file} can't be read: {error.strerror}") from None


def _verify_file(
    context: CliContext, file: Path, cluster_id: str, head: str, root_certificate: Path | None
) -> AuditVerdict:
    raw = _read(file)
    if raw.startswith(_SQLITE):
        entries = _of_store(raw, file)
    else:
        entries = strict_json.decode(raw, list[AuditEntry], max_bytes=_MAX_FILE_BYTES)
    start = audit.genesis(cluster_id, entries[0].node, entries[0].epoch) if cluster_id and entries else ""
    if not head or _HASH.fullmatch(head):
        return audit.verify(entries, start=start, head=head)
    return audit.verify(entries, start=start, witnesses=_witnesses(context, Path(head), root_certificate))


def _of_store(raw: bytes, file: Path) -> list[AuditEntry]:
    """The audit of a copied store; the log beside it (`-wal`) isn't looked at."""
    from appliance.controller.store.copy import StoreCopy

    entries = []
    with StoreCopy(raw, name=file) as store:
        for entry in store.entries("audit/"):
            try:
                entries.append(msgspec.json.decode(entry.value, type=AuditEntry))
            except strict_json.UNDECODABLE as error:
                raise StoreError(
                    f"{entry.key} in {file} was changed: it is no audit entry any more: {error}",
                    hint="compare it with a backup, or with an export that was made earlier",
                ) from None
    return entries


def _witnesses(context: CliContext, file: Path, root_certificate: Path | None) -> list[AuditHead]:
    """Reads and verifies heads: of one envelope, or of an SE's `witness.json`."""
    from appliance.pki.trust import verify_audit_head

    certificate = root_certificate or context.paths.controller_state / "root-ca.pem"
    try:
        anchor = certificate.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        raise UsageError(
            f"the head's signature can't be checked: {certificate} can't be read",
            hint="pass --root with the root CA's certificate; a bundle has it as root_ca",
        ) from None
    return [verify_audit_head(envelope, [anchor]) for envelope in _envelopes(_read(file), file)]


def _envelopes(raw: bytes, file: Path) -> list[Envelope]:
    try:
        return msgspec.json.decode(raw, type=_WitnessFile).value.heads
    except strict_json.UNDECODABLE:
        pass
    try:
        return [msgspec.json.decode(raw, type=Envelope)]
    except strict_json.UNDECODABLE as error:
        raise UsageError(
            f"{file} holds no signed audit head: {error}",
            hint="give what `appliance audit head` printed, an SE's witness.json, or a hash of 64 hex digits",
        ) from None
