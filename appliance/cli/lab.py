"""`appliance lab`: a controller and SEs as local processes, without root."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance.cli import output
from appliance.cli.context import CliContext, json_option, pass_context, print_json

if TYPE_CHECKING:
    from appliance.lab.layout import Layout
    from appliance.lab.up import Operator
    from appliance.paths import Paths

_LAZY = {"fleet": "appliance.cli.lab_fleet"}
"""Subcommands with heavy imports: name to the module whose `command` it is."""


class _LabGroup(click.Group):
    """Imports a subcommand of `_LAZY` when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        lazy = [name for name, module in _LAZY.items() if importlib.util.find_spec(module) is not None]
        return sorted([*super().list_commands(ctx), *lazy])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LAZY and importlib.util.find_spec(_LAZY[cmd_name]) is not None:
            found: click.Command = importlib.import_module(_LAZY[cmd_name]).command
            return found
        return super().get_command(ctx, cmd_name)


def _default_root() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "appliance-lab"


def layout_of(context: CliContext, root: Path | None) -> Layout:
    """Returns where the lab lies that is meant."""
    from appliance.lab.layout import Layout

    if root is not None:
        return Layout(root)
    return Layout(_default_root() if context.paths.root == Path("/") else context.paths.root)


def _connect(paths: Paths) -> Operator:
    return CliContext(paths).operator


def _stop_like_ctrl_c(*_: object) -> None:
    raise KeyboardInterrupt


class _Progress:
    """Prints lines with the seconds since the command began, on stderr."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        click.echo(f"[{time.monotonic() - self._began:5.1f} s] {output.clean(text)}", err=True)


root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="APPLIANCE_LAB_ROOT",
    show_envvar=True,
    help="Where the lab lies.  [default: appliance's --root, else ~/.local/state/appliance-lab]",
)
ses_option = click.option("--ses", type=click.IntRange(1, 200), default=3, show_default=True, help="How many SEs.")


@click.group("lab", cls=_LabGroup)
def command() -> None:
    """A controller and SEs as local processes under one root, without being root."""


@command.command()
@ses_option
@root_option
@click.option("--deadline", type=click.FloatRange(1), metavar="SECONDS", help="How long the SEs may take to come up.")
@pass_context
def up(context: CliContext, ses: int, root: Path | None, deadline: float | None) -> None:
    """Starts a controller and SEs, and waits until all are UP.

    `appliance --set section.key=value lab up` writes settings into the instances that the section concerns. A second
    `up` starts what isn't running and adds SEs up to the number given.
    """
    from appliance.lab.down import bring_down
    from appliance.lab.up import bring_up

    layout, say = layout_of(context, root), _Progress()
    signal.signal(signal.SIGTERM, _stop_like_ctrl_c)
    try:
        lab = bring_up(layout, ses=ses, overrides=context.overrides, connect=_connect, say=say, deadline_s=deadline)
    except KeyboardInterrupt:
        if layout.file.exists():
            bring_down(layout, say=say)
        raise
    click.echo(f"{output.count(len(lab.ses), 'SE')} UP. To go on:")
    own = shlex.join(["appliance", "--root", str(layout.controller.root)])
    for line in (f"{own} se list", f"{own} why {lab.ses[0].name}", f"appliance lab down --root {layout.root}"):
        click.echo(f"  {line}")


@command.command()
@root_option
@click.option("--remove", is_flag=True, help="Delete the lab's directory too, with all keys in it.")
@pass_context
def down(context: CliContext, root: Path | None, remove: bool) -> None:
    """Ends all that `lab up` started, and nothing else."""
    from appliance.lab.down import bring_down

    bring_down(layout_of(context, root), say=_Progress(), remove=remove)


@command.command()
@root_option
@json_option
@pass_context
def status(context: CliContext, root: Path | None) -> None:
    """Tells ports, paths, keys and process ids of the lab."""
    from appliance.lab.status import status as read

    found = read(layout_of(context, root), connect=_connect)
    if context.json:
        print_json(found)
        return
    console, controller = output.screen(), found.controller
    runs: output.Cell = "down" if not controller.running else f"pid {controller.pid}"
    if found.trouble and controller.running:
        runs = output.Styled(f"{runs}: {found.trouble}", "bold red")
    output.fields(
        console,
        [
            ("lab", found.root),
            ("controller", runs),
            ("enroll", controller.enroll_url),
            ("ssh gateway", f"{controller.ssh_host}:{controller.ssh_port}"),
            ("reverse port", str(controller.reverse_port)),
            ("metrics", controller.metrics_url),
            ("operator socket", controller.operator_socket),
        ],
    )
    console.print()
    columns = [output.Column(title) for title in ("NAME", "STATE", "ADDRESS", "PID", "SSHD PID", "SSHD PORT", "ROOT")]
    output.table(
        console,
        columns,
        [
            [
                se.name,
                se.fleet_state or ("running" if se.running else "down"),
                se.address or output.NONE,
                str(se.pid or output.NONE),
                str(se.sshd_pid or output.NONE),
                str(se.sshd_port),
                se.root,
            ]
            for se in found.ses
        ],
    )


@command.command()
@ses_option
@root_option
@click.option("--keep", is_flag=True, help="Leave everything running.")
@pass_context
def demo(context: CliContext, ses: int, root: Path | None, keep: bool) -> None:
    """Runs the main job once and shows it: cluster, seeds, SEs up, a command over the reverse path, the why of one."""
    from appliance.lab.down import bring_down
    from appliance.lab.layout import Layout

    # a short path: sockets lie below it, and a unix socket's name has room for 107 bytes
    layout = Layout(root) if root is not None else Layout(Path(tempfile.mkdtemp(prefix="appliance-demo-")))
    say = _Progress()
    signal.signal(signal.SIGTERM, _stop_like_ctrl_c)
    try:
        _show(layout, context, ses=ses, say=say)
    except BaseException:
        if not keep and layout.file.exists():
            bring_down(layout, say=say)
            say(f"the logs are kept: {layout.log('*')}")
        raise
    if keep:
        click.echo(f"\nleft running; `appliance lab down --root {layout.root} --remove` ends and deletes it")
        return
    bring_down(layout, say=say, remove=root is None)


def _show(layout: Layout, context: CliContext, *, ses: int, say: _Progress) -> None:
    from appliance.cli import se as se_noun
    from appliance.cli import why
    from appliance.lab import demo as showing
    from appliance.lab.up import bring_up

    lab = bring_up(layout, ses=ses, overrides=context.overrides, connect=_connect, say=say)
    operator = _connect(layout.controller)
    fleet = showing.fleet_with_figures(lab, operator, say=say)
    console = output.screen()
    output.heading(console, "The fleet")
    se_noun.print_table(console, fleet, now=time.time())
    output.heading(console, f"A command on {fleet[0].name}, over the reverse path")
    ssh, printed = showing.run_over_reverse_path(layout, lab, fleet[0].address)
    click.echo(f"$ {shlex.join(ssh)}\n{printed.rstrip()}")
    output.heading(console, f"appliance why {fleet[0].name}")
    with click.Context(why.command, info_name="why", obj=CliContext(paths=layout.controller)) as asked:
        asked.invoke(why.command, subject=fleet[0].name)
