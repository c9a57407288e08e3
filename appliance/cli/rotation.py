"""`appliance controller rotate-…`: changes the root CA, the host key or the log-in key while SEs run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from appliance.cli import output
from appliance.cli.context import CliContext, json_option, pass_context, print_json
from appliance.cli.operator import Operator

if TYPE_CHECKING:
    from appliance.protocol.operator import RotationView

_NEXT = {
    "none": "no change is under way",
    "announced": "the successor is announced; finish when nobody waits any more",
    "switching": "the successor is taking over",
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
        rows.append(("former root", "still signs trust documents, for SEs that were off; `forget` destroys its key"))
    output.fields(console, rows)


def rotation_group(kind: str, what: str) -> click.Group:
    """Returns the group `rotate-<kind>` with its verbs.

    Args:
        kind: as the operator API names it.
        what: for people.
    """
    reason_option = click.option("--reason", default="", help="Goes into the audit.")

    @click.group(f"rotate-{kind}", help=f"Changes {what} while SEs run: begin, wait, finish.")
    def group() -> None: ...

    def act(context: CliContext, verb: str, *, force: bool = False, reason: str) -> None:
        operator = Operator(context.paths.controller_socket)
        _show(context, operator.rotate(kind, verb, force=force, reason=reason))

    @group.command()
    @reason_option
    @json_option
    @pass_context
    def begin(context: CliContext, reason: str) -> None:
        """Makes the successor and announces it to all SEs."""
        act(context, "begin", reason=reason)

    @group.command()
    @json_option
    @pass_context
    def status(context: CliContext) -> None:
        """Tells how far it is, and who has not seen the successor yet."""
        views = {view.kind: view for view in Operator(context.paths.controller_socket).rotations()}
        _show(context, views[kind])

    @group.command()
    @click.option("--force", is_flag=True, help="Also where SEs have not seen the successor yet.")
    @reason_option
    @json_option
    @pass_context
    def finish(context: CliContext, force: bool, reason: str) -> None:
        """Lets the successor take over; the old one counts no more."""
        act(context, "finish", force=force, reason=reason)

    @group.command()
    @reason_option
    @json_option
    @pass_context
    def abort(context: CliContext, reason: str) -> None:
        """Takes the announcement back."""
        act(context, "abort", reason=reason)

    if kind == "ca":

        @group.command()
        @reason_option
        @json_option
        @pass_context
        def forget(context: CliContext, reason: str) -> None:
            """Destroys the former root's key: who was off since before the change needs a new seed then."""
            act(context, "forget", reason=reason)

    return group
