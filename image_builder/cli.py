"""The command line of `image-builder`. Errors become exit codes here and nowhere else."""

from __future__ import annotations

import signal
import sys

import click

from appliance import __version__
from appliance.errors import ApplianceError


class _Commands(click.Group):
    """Imports what a command needs when it is called: `--version` and `seed` start without the rest."""

    def list_commands(self, context: click.Context) -> list[str]:
        """All names, in the order of an image's life."""
        return ["packages", "base", "build", "verify", "seed", *super().list_commands(context)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Finds a command by name."""
        if name in {"packages", "base", "build", "verify"}:
            from image_builder import cli_images

            found: click.Command = getattr(cli_images, name)
            return found
        if name == "seed":
            from image_builder.cli_seed import seed

            return seed
        return super().get_command(context, name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="image-builder")
def cli() -> None:
    """Bakes what service engines and controllers start from."""


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Runs the command line and returns its exit code."""
    signal.signal(signal.SIGTERM, _stop)  # a pipeline that is cancelled shall leave nothing behind either
    try:
        result = cli.main(prog_name="image-builder", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        return 130
    except ApplianceError as error:
        sys.stderr.write(f"image-builder: {error.message} [{error.code}]\n")
        if error.hint:
            sys.stderr.write(f"  {error.hint}\n")
        return error.exit_code
    return result if isinstance(result, int) else 0  # click returns the exit code of --help and --version
