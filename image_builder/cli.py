"""The command line of `image-builder`. Errors become exit codes here and nowhere else."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import sys
import time
from pathlib import Path

import click

from appliance import __version__
from appliance.errors import ApplianceError
from appliance.protocol.seed import MAX_BUNDLE_BYTES


class _Commands(click.Group):
    """Imports what a command needs when it is called: `--version` and `seed` start without the rest."""

    def list_commands(self, context: click.Context) -> list[str]:
        """All names, in the order of an image's life."""
        return ["base", "build", "verify", *super().list_commands(context)]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Finds a command by name."""
        if name in {"base", "build", "verify"}:
            from image_builder import cli_images

            return {"base": cli_images.base, "build": cli_images.build, "verify": cli_images.verify}[name]
        return super().get_command(context, name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="image-builder")
def cli() -> None:
    """Bakes what service engines and controllers start from."""


@cli.command()
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="Trust bundle of the controller.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make (0700), in NoCloud form.")
@click.option("--iso", type=click.Path(path_type=Path), help="ISO 9660 image to make (0600), label CIDATA.")
@click.option(
    "--controller", "controllers", multiple=True, metavar="HOST:PORT", help="Instead of the bundle's addresses."
)
@click.option("--name", default="", help="Name the SE asks for.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label of the SE.")
@click.option("--hostname", default="", help="Host name of the VM.  [default: from --name]")
@click.option(
    "--baked-at",
    envvar="SOURCE_DATE_EPOCH",
    show_envvar=True,
    metavar="SECONDS",
    help="Seconds since 1970: dates every file, and is the floor under the VM's clock.  [default: now]",
)
@click.option("--json", "as_json", is_flag=True, help="Tell the result as JSON.")
def seed(
    *,
    bundle: Path,
    out: Path | None,
    iso: Path | None,
    controllers: tuple[str, ...],
    name: str,
    labels: tuple[str, ...],
    hostname: str,
    baked_at: str | None,
    as_json: bool,
) -> None:
    """Bakes a seed: root CA, trust document, image key, addresses and hints, as a folder, an ISO, or both.

    The same inputs and --baked-at give the same bytes. No private key but the bundle's image key goes in.
    """
    from image_builder import iso as iso_image
    from image_builder import output
    from image_builder.seed import Wishes, bake

    now = int(time.time())
    problems = [problem for target in (out, iso) if target is not None for problem in output.check_target(target)]
    if out is None and iso is None:
        problems.append("no output: --out FOLDER, --iso FILE or both expected")
    if out is not None and iso is not None and out.absolute() == iso.absolute():
        problems.append(f"--out and --iso are both {out}")
    raw: bytes | None = None
    try:
        with bundle.open("rb") as stream:
            raw = stream.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        problems.append(f"the bundle {bundle} can't be read: {error.strerror}")
    if baked_at is not None and not re.fullmatch(r"[0-9]{1,12}", baked_at):
        problems.append(f"baked_at {baked_at!r}: whole seconds since 1970 expected")
        baked_at = None
    baked = bake(
        raw,
        Wishes(controllers=controllers, name=name, labels=labels, hostname=hostname),
        baked_at=now if baked_at is None else int(baked_at),
        now=now,
        problems=problems,
    )
    image = iso_image.render(baked.files, at=baked.seed.baked_at) if iso is not None else b""
    output.place(baked.files, directory=out, iso=iso, iso_content=image)
    if as_json:
        told = {
            "image_id": baked.seed.image_id,
            "cluster_id": baked.seed.cluster_id,
            "image_key_id": baked.seed.image_key_id,
            "baked_at": baked.seed.baked_at,
            "controllers": baked.seed.controllers,
            "hostname": baked.hostname,
            "directory": str(out.absolute()) if out else "",
            "iso": str(iso.absolute()) if iso else "",
            "iso_sha256": hashlib.sha256(image).hexdigest() if iso else "",
            "files": [file.name for file in baked.files],
        }
        click.echo(json.dumps(told, indent=2))
        return
    for target in (out, iso):
        if target is not None:
            click.echo(
                f"{target}: seed {baked.seed.image_id} of cluster {baked.seed.cluster_id},"
                f" image key {baked.seed.image_key_id}, controllers {', '.join(baked.seed.controllers)}"
            )


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
