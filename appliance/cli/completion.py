"""`appliance completion SHELL`: what to put into the shell's start-up file."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class


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
