"""`appliance run`: the daemon of this machine's role, in the foreground, logging to stderr."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from appliance.cli.context import CliContext, pass_context
from appliance.errors import ApplianceError, ModeError


@click.command("run")
@click.option(
    "--log-format",
    type=click.Choice(["auto", "json", "text"]),
    default="auto",
    show_default=True,
    help="auto: text on a terminal, else JSON lines.",
)
@pass_context
def command(context: CliContext, log_format: str) -> NoReturn:
    """Run the daemon of this machine's role.

    SIGTERM and SIGINT drain and stop it. Under systemd it notifies (Type=notify), answers the watchdog and takes
    its sockets from there.
    """
    from appliance.runtime import core_dump, log
    from appliance.runtime.mode import Mode, running_role

    settings = context.settings
    role = running_role(context.paths)
    if role is Mode.NONE:
        raise ModeError(
            f"this machine has no role: {context.paths.mode_file} says none",
            hint="choose one: `appliance mode set controller` or `appliance mode set se`",
            code="MODE-002",
        )
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    close = log.setup(level=settings.log.level, stream=sys.stderr, json=as_json)
    core_dump.forbid()
    # By role, and not before: an SE must not carry the controller's web framework in its memory, nor the reverse.
    try:
        if role is Mode.CONTROLLER:
            from appliance.controller import daemon as controller

            code = controller.run(context.paths, settings)
        else:
            from appliance.se import daemon as se

            code = se.run(context.paths, settings)
    except ApplianceError as error:
        log.bind("daemon").error("%s", error, extra={"code": error.code, "hint": error.hint})
        raise
    except Exception:
        log.bind("daemon").exception("a defect of the program ends the daemon")
        raise
    finally:
        close()
    raise click.exceptions.Exit(code)
