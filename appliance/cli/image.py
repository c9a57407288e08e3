"""`appliance image`: the ledger of built images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from appliance.cli import output
from appliance.cli.context import CliContext, json_option, pass_context, print_json, reason_option
from appliance.cli.operator import Operator
from appliance.cli.output import Cell, Column
from appliance.errors import ApplianceError, UsageError
from appliance.protocol import strict_json
from appliance.protocol.fleet import SeSummary, State
from appliance.protocol.image import MAX_REPORT_BYTES, ImageReport
from appliance.protocol.operator import ImageRevoked, ImageView

if TYPE_CHECKING:
    from rich.console import Console

_STATUS_STYLES = {"live": "green", "revoked": "dim", "key revoked": "dim", "unknown": "magenta"}

_COLUMNS = (
    Column("IMAGE"),
    Column("NAME", least=12),
    Column("STATUS"),
    Column("SES", right=True),
    Column("IMAGE KEY", leaves=1),
    Column("KEY USES", right=True, leaves=3),
    Column("KEY EXPIRES", leaves=2),
    Column("ADDED", leaves=4),
)


class Kicked(msgspec.Struct, kw_only=True):
    """What `revoke --kick --json` prints of one SE."""

    se_id: str
    name: str
    number: int
    error: str = ""
    """Why it still stands, "" where it doesn't."""


class Revoked(msgspec.Struct, kw_only=True):
    """What `revoke --json` prints."""

    revoked: ImageRevoked
    kicked: list[Kicked]


def _styled(image: ImageView) -> output.Styled:
    return output.Styled(image.status, _STATUS_STYLES.get(image.status, "yellow"))


def _row(image: ImageView, now: float) -> list[Cell]:
    known = image.added_at > 0
    return [
        image.image_id,
        image.name or output.NONE,
        _styled(image),
        f"{image.ses:,}",
        image.image_key_id,
        f"{image.key_uses:,}/{image.key_max_uses:,}" if known else output.NONE,
        output.ago(image.key_expires_at, now) if known else output.NONE,
        output.moment(image.added_at, now=now) if known else output.NONE,
    ]


@click.group("image")
def command() -> None:
    """Images: which were built, who came by each, and revoking one.

    An SE names its image by its own word; only the image key that it came by is proved.
    """


def _read(path: Path) -> ImageReport:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_REPORT_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"{path} can't be read: {error.strerror}", hint="give the NAME.image.json of a build"
        ) from None
    try:
        return strict_json.decode(raw, ImageReport, max_bytes=MAX_REPORT_BYTES)
    except ApplianceError as error:
        raise UsageError(
            f"{path} is no report of an image: {error.message}",
            hint="image-builder writes one beside each image: NAME.image.json",
        ) from None


@command.command()
@click.argument("files", metavar="NAME.image.json...", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
@pass_context
def add(context: CliContext, files: tuple[Path, ...]) -> None:
    """Takes built images into the ledger, by the reports that `image-builder build` wrote beside them.

    A report is plain: whoever can change it can change the digests in it. Compare them with those of the images
    (`sha256sum`, `image-builder verify`) where its way here isn't trusted. Adding one twice changes nothing.
    """
    reports = [_read(path) for path in files]
    operator = context.operator
    added = []
    for report in reports:
        added.append(operator.add_image(report))
        if not context.json:
            _say_added(output.screen(), added[-1])
    if context.json:
        print_json(added)


def _say_added(console: Console, image: ImageView) -> None:
    output.say(
        console, output.Styled(image.name, "bold"),
        output.clean(f" is in the ledger as {image.image_id}: image key {image.image_key_id}, "),
        output.count(len(image.files), "file"),
    )  # fmt: skip
    for name, sha256 in image.files:
        output.say(console, output.clean(f"{sha256}  {name}"))


@command.command("list")
@click.option("--unknown", is_flag=True, help="What SEs name and the ledger doesn't have, instead.")
@json_option
@pass_context
def list_(context: CliContext, unknown: bool) -> None:
    """Lists images with their keys and how many SEs name each."""
    found = context.operator.images()
    if context.json:
        print_json(found)
        return
    console, now = output.screen(), time.time()
    shown = found.unknown if unknown else found.images
    if shown:
        output.table(console, _COLUMNS, [_row(image, now) for image in shown])
    elif unknown:
        output.say(console, "SEs name no image that isn't in the ledger")
    else:
        output.say(console, "there is no image in the ledger; `appliance image add NAME.image.json` takes one in")
    if found.unknown and not unknown:
        strange = output.count(len(found.unknown), "image")
        output.say(console, f"SEs name {strange} that the ledger doesn't have: appliance image list --unknown")


@command.command()
@click.argument("image", metavar="IMAGE")
@json_option
@pass_context
def show(context: CliContext, image: str) -> None:
    """Shows one image, by id, name or the SHA-256 of one of its files, and the SEs that name it."""
    from appliance.cli import se

    detail = context.operator.image(image)
    if context.json:
        print_json(detail)
        return
    console, now, view = output.screen(), time.time(), detail.image
    output.say(console, output.Styled(view.name or view.image_id, "bold"))
    output.fields(console, _fields(view, now))
    if detail.ses:
        console.print()
        se.print_table(console, detail.ses, now=now)


def _fields(view: ImageView, now: float) -> list[tuple[str, Cell]]:
    rows: list[tuple[str, Cell]] = [("image", view.image_id), *(("also", one) for one in view.also)]
    rows += [("status", _styled(view)), ("image key", view.image_key_id or output.NONE)]
    if not view.added_at:
        return [*rows, ("named by", f"{output.count(view.ses, 'SE')}, by their own word; nobody added it")]
    revoked = f"{output.moment(view.revoked_at, now=now)} {view.reason}".strip() if view.revoked_at else ""
    return [
        *rows,
        ("key", f"{view.key_uses:,} of {view.key_max_uses:,} uses, expires {output.ago(view.key_expires_at, now)}"),
        ("named by", output.count(view.ses, "SE")),
        ("baked", output.moment(view.baked_at, now=now)),
        ("added", output.moment(view.added_at, now=now)),
        *([("revoked", revoked)] if revoked else []),
        ("agent", view.agent_version or output.NONE),
        ("system", view.system or output.NONE),
        ("recipe", view.recipe_digest or output.NONE),
        *(("file", f"{sha256}  {name}") for name, sha256 in view.files),
    ]


@command.command()
@click.argument("image", metavar="IMAGE")
@click.option("--key", is_flag=True, help="Revoke its image key too, though other live images carry it.")
@click.option("--keep-key", is_flag=True, help="Leave its image key alone: bars only who names this image.")
@click.option("--kick", is_flag=True, help="Revoke the SEs that name it, as `appliance se revoke` does.")
@reason_option
@json_option
@pass_context
def revoke(context: CliContext, image: str, *, key: bool, keep_key: bool, kick: bool, reason: str) -> None:
    """Lets nobody new in by IMAGE, and lists the SEs that name it.

    An SE names its image by its own word, so the image key is revoked too; where other live images carry that, --key or
    --keep-key must say what becomes of it. SEs that are in stay in. With --kick each SE that names the image is revoked
    itself: its links close within two seconds and it gets no new ones, until `appliance se reinstate`; one that waits
    for approval is rejected. SEs that came by the key and name another image are listed, not kicked.
    """
    if key and keep_key:
        raise UsageError("--key and --keep-key exclude each other", hint="nothing was changed")
    operator = context.operator
    revoked = operator.revoke_image(image, key="revoke" if key else "keep" if keep_key else "ask", reason=reason)
    if not context.json:
        _say_revoked(output.screen(), revoked)
    standing = [entry for entry in revoked.ses if entry.state is not State.REVOKED] if kick else []
    kicked = []
    for entry in standing:
        kicked.append(_kick(operator, entry, reason=reason or f"image {revoked.image.image_id} revoked"))
        if not context.json:
            told = kicked[-1].error or "is revoked, its links are closed"
            output.say(output.screen(), output.clean(f"SE {entry.number} ({entry.name}) {told}"))
    if context.json:
        print_json(Revoked(revoked=revoked, kicked=kicked))
    if failed := [entry.name for entry in kicked if entry.error]:
        raise ApplianceError(
            f"{output.count(len(failed), 'SE')} of the image could not be kicked: {', '.join(failed)}",
            hint="the image is revoked; do the same again, or `appliance se revoke` for each",
        )


def _kick(operator: Operator, se: SeSummary, *, reason: str) -> Kicked:
    """Revokes one SE, or rejects it where it waits; one that can't be is told, and the others go on."""
    kicked = Kicked(se_id=se.se_id, name=se.name, number=se.number)
    try:
        if se.state is State.PENDING:
            operator.reject_se(se.se_id, reason=reason)
        else:
            operator.revoke_se(se.se_id, reason=reason)
    except ApplianceError as error:
        kicked.error = f"still stands: {error.message}"
    return kicked


def _say_revoked(console: Console, done: ImageRevoked) -> None:
    from appliance.cli import se

    image = done.image
    fate = "is revoked with it" if done.key_revoked else "is left as it was"
    output.say(console, output.clean(f"{image.name} ({image.image_id}) is revoked; {image.image_key_id} {fate}"))
    if done.others:
        names = ", ".join(f"{other.name} ({other.image_id}, {other.status})" for other in done.others)
        output.say(console, output.clean(f"the same image key is in {names}"))
    now = time.time()
    for told, ses in (
        (f"named by {output.count(len(done.ses), 'SE')}:", done.ses),
        (f"its key, with another image named, or none: {output.count(len(done.by_key), 'SE')}:", done.by_key),
    ):
        if ses:
            output.say(console, told)
            se.print_table(console, ses, now=now)
    if not done.ses:
        output.say(console, "no SE names it")
