"""`appliance version`: imports click only, so that it shows how fast the program starts."""

from __future__ import annotations

import platform
import sys

import click

from appliance import __version__
from appliance.cli.context import CliContext, json_option, pass_context


@click.command("version")
@json_option
@pass_context
def command(context: CliContext) -> None:
    """Print the version."""
    if not context.json:
        click.echo(f"appliance {__version__}")
        return
    import json

    found = {
        "version": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "frozen": bool(getattr(sys, "frozen", False)),
    }
    click.echo(json.dumps(found, indent=2))
