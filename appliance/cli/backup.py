"""`appliance controller backup|restore`: the controller's whole state in one sealed file, and back."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from appliance.cli import output
from appliance.cli.context import CliContext, json_option, pass_context, print_json
from appliance.cli.output import Styled
from appliance.cli.passphrase import passphrase_option, read_passphrase
from appliance.errors import UsageError

if TYPE_CHECKING:
    from appliance.controller.backup import Summary
    from appliance.pki.secret import Secret


class Date(click.ParamType[int]):
    """Seconds since 1970, from `now` or ISO 8601 (UTC where no zone is given)."""

    name = "date"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns seconds since 1970."""
        if value == "now":
            return int(time.time())
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no date; write now, or for example 2026-01-31T12:00Z", param, ctx)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


DATE = Date()


_PASSPHRASE = passphrase_option("--passphrase-file", "the passphrase")


def _show(context: CliContext, summary: Summary) -> None:
    if context.json:
        print_json(summary)
        return
    output.fields(
        output.screen(),
        [
            ("cluster", f"{summary.cluster_id}, node {summary.node}, epoch {summary.epoch}"),
            ("taken", f"{output.moment(summary.made_at)} ({output.ago(summary.made_at, time.time())})"),
            ("root SHA-256", summary.root_fingerprint),
            ("root key", "under a passphrase of its own" if summary.root_is_locked else "without one of its own"),
            ("root change", "announced; a restore finishes it" if summary.root_change else "none under way"),
            ("trust", f"version {summary.trust_version}"),
            ("holds", f"{output.count(summary.ses, 'SE')}, {output.count(summary.files, 'file')}, "
             f"{summary.audit_entries:,} audit entries; the next SE number is {summary.next_number}"),
            ("audit head", summary.audit_head),
            ("size", f"{summary.size_bytes:,} bytes, SHA-256 {summary.sha256}"),
        ],
    )  # fmt: skip


@click.group("backup", invoke_without_command=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The file to write; it must not exist.")
@_PASSPHRASE
@json_option
@click.pass_context
def backup(click_context: click.Context, out: Path | None, passphrase_file: Path | None) -> None:
    """Backs up this controller, running or not, into one file sealed under a passphrase.

    It holds the root key: whoever has file and passphrase can be this cluster. Take one after each change of keys.
    """
    if click_context.invoked_subcommand is not None:
        return
    from appliance.controller import backup as backups

    context = click_context.find_object(CliContext)
    if context is None or out is None:
        raise UsageError("no file to write to", hint="pass --out FILE, or `backup verify FILE` to check one")
    secret = read_passphrase(passphrase_file, twice=True)
    summary = backups.make(context.paths, out, secret, now=int(time.time()))
    if not context.json:
        output.say(output.screen(), Styled(f"{out} is written and verified", "bold"))
    _show(context, summary)


@backup.command("verify")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_PASSPHRASE
@json_option
@pass_context
def verify(context: CliContext, file: Path, passphrase_file: Path | None) -> None:
    """Checks that FILE opens, is whole, and that a controller can be made of it."""
    from appliance.controller import backup as backups

    summary = backups.verify(file, read_passphrase(passphrase_file, twice=False))
    if not context.json:
        output.say(output.screen(), Styled(f"{file} holds", "green"))
    _show(context, summary)


@click.command("restore")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_PASSPHRASE
@passphrase_option("--root-passphrase-file", "the root key's passphrase", default="ask, where it has one")
@click.option("--date", type=DATE, help="You vouch for this time; needed where the clock isn't synchronised.")
@click.option(
    "--address", "addresses", multiple=True, metavar="HOST", help="Where SEs reach it now.  [default: as before]"
)
@click.option("--enroll-port", type=click.IntRange(1, 65535), help="HTTPS port as SEs see it.  [default: as before]")
@click.option("--ssh-port", type=click.IntRange(1, 65535), help="SSH port as SEs see it.  [default: as before]")
@click.option(
    "--skip-numbers",
    type=click.IntRange(min=1),
    default=65_536,
    show_default=True,
    help="SE numbers to pass over: more than were given out since the backup.",
)
@json_option
@pass_context
def restore(
    context: CliContext,
    file: Path,
    passphrase_file: Path | None,
    root_passphrase_file: Path | None,
    date: int | None,
    addresses: tuple[str, ...],
    enroll_port: int | None,
    ssh_port: int | None,
    skip_numbers: int,
) -> None:
    """Makes the controller of FILE on this root, which holds none, in a new epoch and in RECOVERY."""
    from appliance.controller import restore as restores
    from appliance.runtime.clock import SYNCHRONISED, SystemClock

    def root_passphrase() -> Secret:
        return read_passphrase(
            root_passphrase_file, twice=False, prompt="Passphrase of the root key", option="--root-passphrase-file"
        )

    settings = context.settings
    done = restores.restore(
        context.paths,
        file,
        read_passphrase(passphrase_file, twice=False),
        clock=SystemClock(settings.clock.offset_s, SYNCHRONISED[settings.clock.synchronised]),
        date=date,
        place=restores.NewPlace(addresses, enroll_port or 0, ssh_port or 0),
        skip_numbers=skip_numbers,
        root_passphrase=root_passphrase,
    )
    if context.json:
        print_json(done._asdict())
        return
    console = output.screen()
    output.say(console, Styled(f"cluster {done.backup.cluster_id} is restored", "bold"), ", in RECOVERY")
    output.fields(
        console,
        [
            ("of the backup", f"{output.moment(done.backup.made_at)}, {output.count(done.backup.ses, 'SE')}"),
            ("epoch", str(done.epoch)),
            ("trust", f"version {done.trust_version}"),
            ("new SE numbers", f"from {done.numbers_from}"),
            ("tokens", f"{done.tokens_withdrawn} withdrawn: they may have been used since"),
            ("settings", "those of this root are kept" if done.settings_kept else "as in the backup"),
        ],
    )
    output.say(console, Styled("the controller that it was must never run again beside this one", "yellow"))
    output.say(console, "next: appliance mode set controller")
    output.say(console, "then: appliance controller recovery status")
