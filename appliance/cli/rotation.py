"""`appliance controller rotate-…`: changes the root CA, the host key or the log-in key while SEs run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance.cli import output
from appliance.cli.context import CliContext, json_option, pass_context, print_json, reason_option
from appliance.cli.output import Styled
from appliance.cli.passphrase import passphrase_option, root_passphrase

if TYPE_CHECKING:
    from appliance.protocol.operator import RotationView

_NEXT = {
    "none": "no change is under way",
    "announced": "the successor is announced; finish when nobody waits any more",
}
_SHOWN = 10


def _show(context: CliContext, view: RotationView) -> None:
    if context.json:
        print_json(view)
        return
    console = output.screen()
    rows = [("phase", f"{view.phase}: {_NEXT[view.phase]}")]
    if view.began_at:
        rows.append(("began", output.moment(view.began_at)))
        rows.append(("announced", f"by trust document version {view.version}"))
        some = ", ".join(view.waiting[:_SHOWN]) + (" …" if len(view.waiting) > _SHOWN else "")
        rows.append(("waiting", f"{output.count(len(view.waiting), 'SE')}: {some}" if view.waiting else "nobody"))
    if view.former_kept:
        text = "still signs trust documents, for old agents that were off; `forget` destroys its key"
        rows.append(("former root", text))
    output.fields(console, rows)
    if view.backup_due:
        when = "now: it will do before and after the change" if view.phase == "announced" else "now"
        text = f"take a backup {when}. One from before the change began brings no SE back after it"
        output.say(console, Styled(text, "yellow"))


def rotation_group(kind: str, what: str) -> click.Group:
    """Returns the group `rotate-<kind>` with its verbs.

    Args:
        kind: as the operator API names it.
        what: for people.
    """
    unlock_option = passphrase_option("--passphrase-file", "the root key's passphrase", default="ask, where it has one")

    @click.group(f"rotate-{kind}", help=f"Changes {what} while SEs run: begin, wait, finish.")
    def group() -> None: ...

    def act(context: CliContext, verb: str, file: Path | None, *, force: bool = False, reason: str) -> None:
        operator = context.operator
        passphrase = root_passphrase(operator, file)
        _show(context, operator.rotate(kind, verb, force=force, reason=reason, passphrase=passphrase))

    @group.command()
    @unlock_option
    @reason_option
    @json_option
    @pass_context
    def begin(context: CliContext, passphrase_file: Path | None, reason: str) -> None:
        """Makes the successor and announces it to all SEs."""
        act(context, "begin", passphrase_file, reason=reason)

    @group.command()
    @json_option
    @pass_context
    def status(context: CliContext) -> None:
        """Tells how far it is, and who has not seen the successor yet."""
        views = {view.kind: view for view in context.operator.rotations()}
        _show(context, views[kind])

    @group.command()
    @click.option("--force", is_flag=True, help="Also where SEs have not seen the successor yet.")
    @unlock_option
    @reason_option
    @json_option
    @pass_context
    def finish(context: CliContext, force: bool, passphrase_file: Path | None, reason: str) -> None:
        """Lets the successor take over; the old one counts no more."""
        act(context, "finish", passphrase_file, force=force, reason=reason)

    @group.command()
    @unlock_option
    @reason_option
    @json_option
    @pass_context
    def abort(context: CliContext, passphrase_file: Path | None, reason: str) -> None:
        """Takes the announcement back."""
        act(context, "abort", passphrase_file, reason=reason)

    if kind == "ca":

        @group.command()
        @reason_option
        @json_option
        @pass_context
        def forget(context: CliContext, reason: str) -> None:
            """Destroys the former root's key. SEs that were off since before the change get in all the same."""
            _show(context, context.operator.rotate("ca", "forget", reason=reason))

    return group
