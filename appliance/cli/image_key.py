"""`appliance image-key`: the keys that images enroll with."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click
import msgspec

from appliance.cli import output, quantities
from appliance.cli.context import CliContext, json_option, pass_context, print_json, reason_option
from appliance.cli.operator import Operator
from appliance.cli.output import Cell, Column
from appliance.errors import ApplianceError, StorageError, UsageError
from appliance.protocol.enroll import Policy
from appliance.protocol.operator import ImageKeyCreated, ImageKeyTermsWish, ImageKeyView

_STATUS_STYLES = {"active": "green", "expired": "yellow", "used-up": "yellow", "revoked": "dim"}

_COLUMNS = (
    Column("IMAGE KEY"),
    Column("STATUS"),
    Column("USES", right=True),
    Column("EXPIRES"),
    Column("POLICY", leaves=1),
    Column("CREATED", leaves=3),
    Column("NETWORKS", leaves=2, least=16),
    Column("RATE", leaves=5),
    Column("REFUSED", right=True, leaves=6),
    Column("NOTE", leaves=4, least=12),
)


_NEXT = {
    Policy.OPEN: "whoever has it gets in, until then",
    Policy.TOKEN: "each VM needs a token beside it: appliance token create --image-key ID",
    Policy.APPROVE: "each VM waits for you: appliance se pending, appliance se approve",
    Policy.HOOK: "the program of controller.enroll_hook decides; where it doesn't, each VM waits for you",
}


class Created(msgspec.Struct, kw_only=True):
    """What `create --json` prints; the key itself is in `file` only."""

    key: ImageKeyView
    file: str


def _row(key: ImageKeyView, now: float) -> list[Cell]:
    return [
        key.image_key_id,
        output.Styled(key.status, _STATUS_STYLES.get(key.status, "")),
        f"{key.uses:,}/{key.max_uses:,}",
        output.ago(key.expires_at, now),
        key.policy.value,
        output.moment(key.created_at, now=now),
        " ".join(key.networks) or "any",
        f"{key.rate_per_s:g}/s",
        f"{key.limited:,}",
        key.note or output.NONE,
    ]


@click.group("image-key")
def command() -> None:
    """Image keys: make one for each image, revoke one alone."""


@command.command()
@click.option(
    "--expires", type=quantities.DURATION, default="30d", show_default=True, help="How long it opens the door."
)
@click.option("--max-uses", type=click.IntRange(1, 1_000_000), default=500, show_default=True, help="How many SEs.")
@click.option("--network", "networks", type=quantities.NETWORK, multiple=True, help="Only from here; may be repeated.")
@click.option(
    "--policy",
    type=click.Choice([policy.value for policy in Policy]),
    default="open",
    show_default=True,
    help="open: lets in. token: with a token of `appliance token create`. approve: after `appliance se approve`. "
    "hook: as the program of the setting controller.enroll_hook says.",
)
@click.option("--rate-per-s", type=click.FloatRange(0.001, 1e6), help="Requests a second.  [default: the settings]")
@click.option("--burst", type=click.IntRange(1, 1_000_000), help="Requests at once.  [default: the settings]")
@click.option("--note", default="", help="What it is for.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="File for the bundle, 0600; - is stdout.  [default: IMAGE-KEY-ID.bundle.json]",
)
@json_option
@pass_context
def create(
    context: CliContext,
    *,
    expires: int,
    max_uses: int,
    networks: tuple[str, ...],
    policy: str,
    rate_per_s: float | None,
    burst: int | None,
    note: str,
    out: Path | None,
) -> None:
    """Makes an image key and writes its bundle, from which `image-builder` bakes.

    The bundle is the one place where the key's private half exists; the controller keeps none.
    """
    _check_target(out)
    wish = ImageKeyTermsWish(
        policy=Policy(policy), expires_in_s=expires, max_uses=max_uses, networks=list(networks), note=note,
        rate_per_s=rate_per_s or 0.0, burst=burst or 0,
    )  # fmt: skip
    operator = context.operator
    created = operator.create_image_key(wish)
    if str(out) == "-":
        click.echo(msgspec.json.encode(created.bundle))
        return
    file = out or Path(f"{created.key.image_key_id}.bundle.json")
    _write(operator, created, file)
    if context.json:
        print_json(Created(key=created.key, file=str(file.absolute())))
        return
    console, now = output.screen(), time.time()
    output.say(console, output.Styled(created.key.image_key_id, "bold"), " is in ", output.Styled(str(file), "bold"))
    output.say(
        console,
        f"good for {output.count(created.key.max_uses, 'SE')}, expires {output.ago(created.key.expires_at, now)} "
        f"({output.moment(created.key.expires_at)}), from {' '.join(created.key.networks) or 'any network'}",
    )
    output.say(console, _NEXT[created.key.policy])
    output.say(console, f"next: image-builder seed --bundle {file}")


def _check_target(out: Path | None) -> None:
    """Refuses before the key is made what would lose it afterwards."""
    if str(out) == "-":
        if sys.stdout.isatty():
            raise UsageError(
                "a private key is not printed on a terminal", hint="redirect it, or name a file with --out"
            )
        return
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", hint="name another file, or remove it if its key is no longer needed")
    directory = out.parent if out is not None else Path()
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UsageError(f"nothing can be written to {directory.absolute()}", hint="name a file elsewhere with --out")


def _write(operator: Operator, created: ImageKeyCreated, file: Path) -> None:
    from appliance.storage.atomic import write_atomic

    try:
        write_atomic(file, msgspec.json.encode(created.bundle) + b"\n", mode=0o600)
    except StorageError as error:
        key = created.key.image_key_id
        try:
            operator.revoke_image_key(key, reason="its bundle could not be written")
            fate = f"{key} was revoked again"
        except ApplianceError as second:
            fate = f"{key} exists and could not be revoked ({second.message})"
        raise StorageError(f"{error.message}; {fate}", hint=error.hint, code=error.code) from None


@command.command("list")
@json_option
@pass_context
def list_(context: CliContext) -> None:
    """Lists image keys with what is left of them."""
    keys = context.operator.image_keys()
    if context.json:
        print_json(keys)
        return
    console, now = output.screen(), time.time()
    if not keys:
        output.say(console, "there is no image key; `appliance image-key create` makes one")
        return
    output.table(console, _COLUMNS, [_row(key, now) for key in keys])


@command.command()
@click.argument("image_key_id", metavar="ID")
@reason_option
@json_option
@pass_context
def revoke(context: CliContext, image_key_id: str, reason: str) -> None:
    """Lets nobody new in by the image key ID; names its images, and the SEs that came by it, which are left alone."""
    from appliance.cli import se

    revoked = context.operator.revoke_image_key(image_key_id, reason=reason)
    if context.json:
        print_json(revoked)
        return
    console = output.screen()
    came = f"{output.count(len(revoked.ses), 'SE')} came by it" if revoked.ses else "no SE came by it"
    output.say(console, f"{revoked.key.image_key_id} is revoked; {came}")
    for image in revoked.images:
        output.say(console, output.clean(f"it is in the image {image.name} ({image.image_id})"))
    if revoked.ses:
        console.print()
        se.print_table(console, revoked.ses, now=time.time())
