"""`image-builder seed`: a seed alone. Every field of a recipe that a seed can carry is an option, by the same name."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import click

from appliance.protocol.seed import MAX_BUNDLE_BYTES
from image_builder import iso as iso_image
from image_builder import output
from image_builder.cli_fields import given_values, recipe_options
from image_builder.recipe import FIELDS, read_wishes
from image_builder.seed import bake, check_named

_CARRIED = (
    "cluster",
    "image_key.id",
    "controllers",
    "labels",
    "token",
    "hostname",
    "timezone",
    "operator_key",
    "hooks",
)


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="Trust bundle of the controller.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make (0700), in NoCloud form.")
@click.option("--iso", type=click.Path(path_type=Path), help="ISO 9660 image to make (0600), label CIDATA.")
@click.option("--name", "--seed-name", "seed_name", help="Name the SE asks for.")
@recipe_options(field for field in FIELDS if field.name in _CARRIED or field.name.startswith("network."))
@click.option(
    "--baked-at",
    envvar="SOURCE_DATE_EPOCH",
    show_envvar=True,
    metavar="SECONDS",
    help="Seconds since 1970: dates every file, and is the floor under the VM's clock.  [default: now]",
)
@click.option("--json", "as_json", is_flag=True, help="Tell the result as JSON.")
def seed(
    *, bundle: Path, out: Path | None, iso: Path | None, baked_at: str | None, as_json: bool, **given: Any
) -> None:
    """Bakes a seed: root CA, trust document, image key, addresses and hints, as a folder, an ISO, or both.

    The same inputs and --baked-at give the same bytes. No private key but the bundle's image key goes in.
    """
    now = int(time.time())
    problems = [problem for target in (out, iso) if target is not None for problem in output.check_target(target)]
    if out is None and iso is None:
        problems.append("no output: --out FOLDER, --iso FILE or both expected")
    if out is not None and iso is not None and out.absolute() == iso.absolute():
        problems.append(f"--out and --iso are both {out}")
    values = given_values(given)
    raw: bytes | None = None
    try:
        with bundle.open("rb") as stream:
            raw = stream.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        problems.append(f"the bundle {bundle} can't be read: {error.strerror}")
    else:
        problems += check_named(raw, cluster=values.get("cluster", ""), key_id=values.get("image_key.id", ""))
    if baked_at is not None and not re.fullmatch(r"[0-9]{1,12}", baked_at):
        problems.append(f"baked_at {baked_at!r}: whole seconds since 1970 expected")
        baked_at = None
    wishes, cloud_wishes = read_wishes(values, problems)
    baked = bake(
        raw,
        wishes,
        baked_at=now if baked_at is None else int(baked_at),
        now=now,
        problems=problems,
        cloud_wishes=cloud_wishes,
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
            "has_token": bool(baked.seed.token),
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
