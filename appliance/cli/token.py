"""`appliance token`: single-use words that let one VM in, or let a lost SE take its own place again."""

from __future__ import annotations

import time

import click

from appliance.cli import output, quantities
from appliance.cli.completion import se_names
from appliance.cli.context import CliContext, json_option, pass_context, print_json, reason_option
from appliance.cli.output import Cell, Column
from appliance.errors import UsageError
from appliance.protocol.operator import TokenView, TokenWish

_STATUS_STYLES = {"good": "green", "taken": "cyan", "expired": "yellow", "used": "dim", "revoked": "dim"}

_COLUMNS = (
    Column("TOKEN"),
    Column("STATUS"),
    Column("FOR"),
    Column("EXPIRES"),
    Column("INSTANCE-ID", leaves=2, least=12),
    Column("BROUGHT BY", leaves=1),
    Column("CREATED", leaves=3),
    Column("NOTE", leaves=4, least=12),
)


def _purpose(token: TokenView) -> str:
    return f"rejoin of {token.rejoin}" if token.rejoin else token.image_key_id


def _row(token: TokenView, now: float) -> list[Cell]:
    return [
        token.token_id,
        output.Styled(token.status, _STATUS_STYLES.get(token.status, "")),
        _purpose(token),
        output.ago(token.expires_at, now),
        token.instance_id or "any",
        token.taken_by or output.NONE,
        output.moment(token.created_at, now=now),
        token.note or output.NONE,
    ]


@click.group("token")
def command() -> None:
    """Tokens: make one for each VM, or for an SE that lost its state."""


@command.command()
@click.option("--image-key", default="", metavar="ID", help="The image key it goes with.  [default: the only one]")
@click.option(
    "--rejoin", default="", metavar="SE", shell_complete=se_names,
    help="The SE that lost its state; no image key is needed.",
)  # fmt: skip
@click.option("--expires", type=quantities.DURATION, default="1d", show_default=True, help="How long it is good.")
@click.option("--instance-id", default="", help="Good only for the VM of this instance-id, as that itself says.")
@click.option("--note", default="", help="What it is for.")
@json_option
@pass_context
def create(context: CliContext, *, image_key: str, rejoin: str, expires: int, instance_id: str, note: str) -> None:
    """Makes a token and prints it, this once: the controller keeps its SHA-256 only.

    A VM gets it by its seed, or on its console by `appliance enroll --token -`. It is good for one SE. With --rejoin a
    new key takes the place of the SE's old one; number, address and name stay.
    """
    if image_key and rejoin:
        raise UsageError("--image-key and --rejoin exclude each other", hint="a rejoin needs no image key")
    wish = TokenWish(image_key_id=image_key, rejoin=rejoin, instance_id=instance_id, expires_in_s=expires, note=note)
    created = context.operator.create_token(wish)
    if context.json:
        print_json(created)
        return
    # The token alone on stdout: it can be piped to where it is needed, and stands in no argument list.
    click.echo(created.token)
    now = time.time()
    view = created.view
    told = f"{view.token_id}, for {_purpose(view)}, expires {output.ago(view.expires_at, now)}; it is not shown again"
    click.echo(output.clean(told), err=True)
    click.echo("next, on the VM's console: appliance enroll --token -", err=True)


@command.command("list")
@json_option
@pass_context
def list_(context: CliContext) -> None:
    """Lists tokens: what each is for, and what became of it."""
    tokens = context.operator.tokens()
    if context.json:
        print_json(tokens)
        return
    console, now = output.screen(), time.time()
    if not tokens:
        output.say(console, "there is no token; `appliance token create` makes one")
        return
    output.table(console, _COLUMNS, [_row(token, now) for token in tokens])


@command.command()
@click.argument("token_id", metavar="ID")
@reason_option
@json_option
@pass_context
def revoke(context: CliContext, token_id: str, reason: str) -> None:
    """Lets nobody in by the token ID (tk-…) any more; an SE that came by it is left alone."""
    if not token_id.startswith("tk-"):
        raise UsageError("the id of a token expected, not the token", hint="`appliance token list` shows the ids")
    revoked = context.operator.revoke_token(token_id, reason=reason)
    if context.json:
        print_json(revoked)
    else:
        came = f"; {revoked.taken_by} came by it before" if revoked.taken_by else ""
        output.say(output.screen(), f"{revoked.token_id} is revoked{came}")
