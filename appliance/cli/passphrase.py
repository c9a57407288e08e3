"""`appliance controller passphrase|issuing-ca`, and how a passphrase is read: never from arguments or environment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from appliance.cli import output
from appliance.cli.context import CliContext, json_option, pass_context, print_json, reason_option
from appliance.cli.operator import Operator
from appliance.cli.output import Styled
from appliance.errors import StorageError, UsageError

if TYPE_CHECKING:
    from appliance.pki.secret import Secret
    from appliance.protocol.operator import ControllerView

_F = TypeVar("_F", bound=Callable[..., Any])

MAX_PASSPHRASE_BYTES = 4096
PROMPT = "prompt"


def passphrase_option(option: str, what: str, *, default: str = "ask") -> Callable[[_F], _F]:
    """Decorator: an option that names the file of a passphrase.

    Args:
        option: for example `--passphrase-file`.
        what: for people, for example `the passphrase`.
        default: for people: what happens without it.
    """
    return click.option(
        option,
        type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
        help=f"File whose first line is {what}; - is stdin, {PROMPT} asks on the terminal.  [default: {default}]",
    )


def read_passphrase(
    file: Path | None, *, twice: bool, prompt: str = "Passphrase", option: str = "--passphrase-file"
) -> Secret:
    """Reads a passphrase: a file's first line, the next line of stdin (`-`), or from the terminal.

    Raises:
        UsageError: nobody can be asked, or it is empty.
        StorageError: the file can't be read.
    """
    from appliance.pki.secret import Secret

    if file is None or str(file) == PROMPT:
        if not sys.stdin.isatty():
            raise UsageError(
                "no passphrase: there is no terminal to ask on",
                hint=f"pass {option} FILE, or {option} - to read it from stdin",
            )
        return Secret(click.prompt(prompt, hide_input=True, confirmation_prompt=twice, err=True).encode())
    try:
        if str(file) == "-":
            line = sys.stdin.buffer.readline(MAX_PASSPHRASE_BYTES)
        else:
            with file.open("rb") as stream:
                line = stream.readline(MAX_PASSPHRASE_BYTES)
    except OSError as error:
        raise StorageError(f"{file} can't be read: {error.strerror}") from None
    line = line.rstrip(b"\r\n")
    if not line:
        raise UsageError(f"no passphrase: the first line of {file} is empty", hint="write it into that line")
    try:
        line.decode()
    except UnicodeDecodeError:
        raise UsageError(f"the passphrase in {file} is no UTF-8 text", hint="write it in UTF-8") from None
    return Secret(line)


def root_passphrase(operator: Operator, file: Path | None) -> str:
    """The root key's passphrase for a request to the controller, "" where its root key has none."""
    if not operator.controller().root_is_locked:
        return ""
    return text_of(read_passphrase(file, twice=False, prompt="Passphrase of the root key"))


def text_of(secret: Secret) -> str:
    """A passphrase as the body of a request carries it."""
    return secret.reveal().decode()


def _show(context: CliContext, view: ControllerView, told: str) -> None:
    if context.json:
        print_json(view)
        return
    console = output.screen()
    output.say(console, Styled(told, "bold"))
    rows = [("root key", "under a passphrase" if view.root_is_locked else "without a passphrase")]
    if view.issuing_fingerprint:
        rows += [("issuing CA", view.issuing_fingerprint), ("ends", output.moment(view.issuing_expires_at))]
    output.fields(console, rows)


@click.group("passphrase")
def passphrase() -> None:
    """The passphrase of the root key, on a running controller; a start never needs it."""


@passphrase.command("set")
@passphrase_option("--new-passphrase-file", "the passphrase")
@reason_option
@json_option
@pass_context
def set_(context: CliContext, new_passphrase_file: Path | None, reason: str) -> None:
    """Puts the root key under a passphrase; an issuing CA, good for a year, signs from day to day."""
    new = read_passphrase(new_passphrase_file, twice=True, prompt="New passphrase", option="--new-passphrase-file")
    view = context.operator.set_passphrase(text_of(new), reason=reason)
    _show(context, view, "the root key is under a passphrase")
    if not context.json:
        output.say(output.screen(), "backups from before hold the root key without it: take a new one, destroy those")


@passphrase.command("change")
@passphrase_option("--passphrase-file", "the present passphrase")
@passphrase_option("--new-passphrase-file", "the new one")
@reason_option
@json_option
@pass_context
def change(context: CliContext, passphrase_file: Path | None, new_passphrase_file: Path | None, reason: str) -> None:
    """Puts the root key under another passphrase."""
    old = read_passphrase(passphrase_file, twice=False, prompt="Present passphrase of the root key")
    new = read_passphrase(new_passphrase_file, twice=True, prompt="New passphrase", option="--new-passphrase-file")
    operator = context.operator
    view = operator.change_passphrase(text_of(old), text_of(new), reason=reason)
    _show(context, view, "the root key is under the new passphrase")
    if not context.json:
        output.say(output.screen(), "backups from before still open its root key with the former one")


@passphrase.command("remove")
@passphrase_option("--passphrase-file", "the present passphrase")
@click.option("--force", is_flag=True, help="Whoever reads this disk has the root key then.")
@reason_option
@json_option
@pass_context
def remove(context: CliContext, passphrase_file: Path | None, force: bool, reason: str) -> None:
    """Leaves the root key without a passphrase; it signs by itself again."""
    if not force:
        raise UsageError(
            "without a passphrase, whoever reads this disk has the root key", hint="pass --force if that is meant"
        )
    old = read_passphrase(passphrase_file, twice=False, prompt="Present passphrase of the root key")
    view = context.operator.remove_passphrase(text_of(old), reason=reason)
    _show(context, view, "the root key has no passphrase any more")


@click.group("issuing-ca")
def issuing_ca() -> None:
    """The issuing CA, which signs in the root's name where the root key has a passphrase."""


@issuing_ca.command("renew")
@passphrase_option("--passphrase-file", "the root key's passphrase")
@click.option("--revoke", is_flag=True, help="Have SEs refuse what the present one signed: its key is in wrong hands.")
@reason_option
@json_option
@pass_context
def renew(context: CliContext, passphrase_file: Path | None, revoke: bool, reason: str) -> None:
    """Replaces it by a new one, good for a year, under live links; do it before it ends."""
    secret = read_passphrase(passphrase_file, twice=False, prompt="Passphrase of the root key")
    operator = context.operator
    view = operator.renew_issuing(text_of(secret), revoke=revoke, reason=reason)
    _show(context, view, "the issuing CA is a new one")
