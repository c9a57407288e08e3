"""`appliance completion SHELL`: what to put into the shell's start-up file; and names that a controller knows."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

DEADLINE_S = 1.0
"""Who presses TAB waits for no controller that is busy."""


def se_names(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of SEs that begin with `incomplete`, for `shell_complete`; none where no controller answers at once."""
    try:
        from appliance.cli.operator import Operator
        from appliance.paths import Paths

        # Commands don't run while a shell asks: there is no `CliContext`.
        ses = Operator(Paths(context.find_root().params["root"]), deadline_s=DEADLINE_S).ses()
    except Exception:  # noqa: BLE001 - a boundary: nothing may be said into the line that somebody types
        return []
    return sorted({se.name for se in ses if se.name.startswith(incomplete)})


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for a shell.

    \b
    bash:  eval "$(appliance completion bash)"       in ~/.bashrc
    zsh:   eval "$(appliance completion zsh)"        in ~/.zshrc
    fish:  appliance completion fish | source        in ~/.config/fish/config.fish
    """
    from appliance.cli import root

    kind = get_completion_class(shell)
    assert kind is not None, "the choice above names click's own shells"  # noqa: S101
    completer = kind(root.group, {}, root.NAME, root.COMPLETE_VARIABLE)
    # Not the override in the class for bash, which runs a bash to see its version.
    click.echo(ShellComplete.source(completer))
