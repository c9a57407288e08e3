"""`appliance first-boot`: what a machine of our own system does as root before its daemon starts."""

from __future__ import annotations

import os
import sys

import click

from appliance.cli.context import CliContext, pass_context
from appliance.errors import UsageError


@click.command("first-boot")
@pass_context
def command(context: CliContext) -> None:
    """Take the image's seed, scrub it from its partition, and make this machine its own.

    Run by systemd at each boot, before cloud-init. It may be cut anywhere and repeated: it goes on where it stopped,
    and does nothing twice.
    """
    from appliance.machine import boot
    from appliance.runtime import log

    if str(context.paths.root) != "/" or os.geteuid() != 0:
        raise UsageError(
            "first boot changes the disk of the machine it runs on: it takes root, and the root /",
            hint="it is run by appliance-first-boot.service on systems of `image-builder base`",
        )
    close = log.setup(level=context.settings.log.level, stream=sys.stderr, json=not sys.stderr.isatty())
    try:
        boot.run(context.paths, context.settings)
    finally:
        close()
