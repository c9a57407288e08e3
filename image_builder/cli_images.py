"""`image-builder base`, `build` and `verify`. Options of `build` are made from the recipe's list of fields."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from appliance.errors import ImageError, SeedError, UsageError
from image_builder import agent as agent_files
from image_builder import boot_disk, minimal, recipe, steps
from image_builder import build as baking
from image_builder import verify as verifying
from image_builder.cli_fields import given_values, recipe_options
from image_builder.output import check_target
from image_builder.steps import Steps

_cache_option = click.option(
    "--cache", type=click.Path(path_type=Path), help="Where layers are kept.  [default: in the user's cache folder]"
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Tell the result as JSON.")
_fresh_option = click.option("--fresh", is_flag=True, help="Install the packages anew, whatever the cache has.")


def _print_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


_sources_option = click.option(
    "--sources", type=click.Path(path_type=Path), multiple=True, help="apt sources instead of this machine's."
)
_package_option = click.option("--package", "extra", multiple=True, help="A further Debian package; may be repeated.")
_epoch_option = click.option(
    "--epoch",
    type=click.IntRange(0, 1 << 40),
    envvar="SOURCE_DATE_EPOCH",
    show_envvar=True,
    default=minimal.DEFAULT_EPOCH,
    show_default=True,
    help="Seconds since 1970 that date everything in it.",
)


@click.command()
@_sources_option
@_package_option
@_epoch_option
@_cache_option
@_fresh_option
def packages(*, sources: tuple[Path, ...], extra: tuple[str, ...], epoch: int, cache: Path | None, fresh: bool) -> None:
    """Installs the packages of our own system into the cache, where `base` and `build` find them; needs no agent.

    For pipelines: this is what takes a minute or two, and it can be done while the agent is built.
    """
    with steps.shown(sys.stderr) as told:
        tree = minimal.install_packages(
            sources=sources, extra=extra, epoch=epoch, cache=cache or minimal.cache_directory(), fresh=fresh, steps=told
        )
    click.echo(f"{tree}: {tree.stat().st_size >> 20} MiB")


@click.command()
@click.option("--role", type=click.Choice(["se", "controller"]), required=True, help="Who will live on it.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="FILE.qcow2 or FILE.raw.")
@click.option("--agent", type=click.Path(path_type=Path), help="The agent, directory form.")
@_sources_option
@_package_option
@click.option("--size", type=click.IntRange(1024, 1 << 20), default=2048, show_default=True, help="MiB of the disk.")
@_epoch_option
@_cache_option
@_fresh_option
@_json_option
def base(
    *,
    role: Any,
    out: Path,
    agent: Path | None,
    sources: tuple[Path, ...],
    extra: tuple[str, ...],
    size: int,
    epoch: int,
    cache: Path | None,
    fresh: bool,
    as_json: bool,
) -> None:
    """Makes a minimal Debian 12 that starts by BIOS and UEFI, with the agent in it; beside it a list of packages.

    It takes a minute or two, and seconds when the cache has it. Neither root nor loop devices are needed.
    """
    from image_builder import sbom
    from image_builder.output import Draft, publish

    form = out.suffix.removeprefix(".")
    if form not in {"qcow2", "raw"}:
        raise UsageError(f"{out}: a name that ends in .qcow2 or .raw expected")
    sidecars = {"packages": out.with_suffix(".packages.txt"), "bill": out.with_suffix(".cdx.json")}
    problems = [problem for target in (out, *sidecars.values()) for problem in check_target(target)]
    if problems:
        raise UsageError("\n".join(problems))
    with steps.shown(sys.stderr) as told:
        system = minimal.make(
            role,
            agent_files.load(agent or minimal.default_agent()),
            sources=sources,
            extra=extra,
            epoch=epoch,
            size_bytes=size << 20,
            cache=cache or minimal.cache_directory(),
            fresh=fresh,
            steps=told,
        )
        minimal.copy_out(system, out, form=form, steps=told)
    found = system.description
    with Draft(out.absolute().parent) as draft:
        (draft / "packages").write_bytes(sbom.manifest(found.packages, agent_version=found.agent_version))
        bill = sbom.cyclonedx(
            found.packages,
            name=f"appliance {role}",
            digest=found.digest,
            epoch=found.epoch,
            agent_version=found.agent_version,
            agent_digest=found.agent_digest,
        )
        (draft / "bill").write_bytes(bill)
        publish({draft / kind: target for kind, target in sidecars.items()}, modes={})
    if as_json:
        _print_json({"file": str(out.absolute()), "sha256": _sha256(out), "system": found})
        return
    click.echo(
        f"{out}: Debian {found.release} for the role {role}, {len(found.packages)} packages,"
        f" agent {found.agent_version}, {boot_disk.CONSOLE}"
    )


def _sha256(path: Path) -> str:
    from image_builder import disk

    return disk.sha256_of(path)


def _read_recipe(path: Path | None, given: dict[str, Any], problems: list[str]) -> recipe.Recipe:
    values = recipe.read_file(path, problems) if path is not None else {}
    values |= given_values(given)
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if "baked_at" not in values and epoch:
        if epoch.isascii() and epoch.isdigit():
            values["baked_at"] = int(epoch)
        else:
            problems.append(f"SOURCE_DATE_EPOCH {epoch!r}: whole seconds since 1970 expected")
    return recipe.check(values, now=int(time.time()), agent=minimal.default_agent(), problems=problems)


@click.command()
@click.argument("recipe_file", metavar="[RECIPE.toml]", required=False, type=click.Path(path_type=Path))
@recipe_options(recipe.FIELDS)
@_cache_option
@_fresh_option
@_json_option
def build(*, recipe_file: Path | None, cache: Path | None, fresh: bool, as_json: bool, **given: Any) -> None:
    """Bakes an image: a system with seed and agent, in every form that is wanted.

    What to bake stands in RECIPE.toml, in options, or in both; options go first. In the file, --base-image is `image`
    in the section [base], and so on. All mistakes are told at once, before anything is built.
    """
    problems: list[str] = []
    wished = _read_recipe(recipe_file, given, problems)
    with steps.shown(sys.stderr) as told:
        built = baking.build(
            wished,
            now=int(time.time()),
            cache=cache or minimal.cache_directory(),
            fresh=fresh,
            problems=problems,
            steps=told,
        )
    if as_json:
        _print_json(built)
        return
    for name in built.files:
        click.echo(str(wished.directory / name))
    of = f"cluster {built.cluster_id}, image key {built.image_key_id}, " if built.cluster_id else ""
    click.echo(f"image {built.image_id}: {of}agent {built.agent_version}; next: image-builder verify FILE")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--rebuild", type=click.Path(path_type=Path), metavar="RECIPE.toml", help="Bake again and compare.")
@_cache_option
@_json_option
def verify(*, file: Path, rebuild: Path | None, cache: Path | None, as_json: bool) -> None:
    """Says what is baked into FILE (qcow2, raw, OVA, ISO), and refuses it where it holds what no image may.

    That is: a private key other than the seed's image key, a seed that doesn't hold, an OVA that importers refuse.
    """
    with steps.shown(sys.stderr) as told:
        found = verifying.verify(file, steps=told)
        if rebuild is not None:
            found.problems.extend(_compare(file, found, rebuild, cache or minimal.cache_directory(), told))
    if as_json:
        _print_json(found)
    else:
        _show(found, is_rebuilt=rebuild is not None)
    if found.problems:
        raise ImageError(
            f"{file} is refused:" + "".join(f"\n  - {problem}" for problem in found.problems),
            hint="don't hand it out; if it held a private key, that key is known now",
        )


def _compare(file: Path, found: verifying.Baked, path: Path, cache: Path, told: Steps) -> list[str]:
    """Bakes a recipe again, dated as `file` is, and says how the two differ."""
    if found.form not in recipe.FORMATS:
        raise UsageError(f"{file} is a {found.form}, which no recipe makes", hint="give the file that build wrote")
    problems: list[str] = []
    values = recipe.read_file(path, problems)
    if values.get("image_key.create"):
        raise SeedError(
            "the recipe makes a new image key each time, so no two images of it are equal",
            hint="put the bundle that was written beside the image into the recipe instead",
        )
    with tempfile.TemporaryDirectory(prefix=".image-builder-", dir=file.absolute().parent) as folder:
        values |= {"output.directory": folder, "output.formats": [found.form]}
        values.pop("output.register", None)
        if found.baked_at:
            values["baked_at"] = found.baked_at
        wished = recipe.check(values, now=int(time.time()), agent=minimal.default_agent(), problems=problems)
        built = baking.build(wished, now=int(time.time()), cache=cache, fresh=False, problems=problems, steps=told)
        (again,) = (digest for name, digest in built.files.items() if name.endswith(f".{found.form}"))
        if again == found.sha256:
            return []
        other = f", its image id is {built.image_id}, not {found.image_id}" if built.image_id != found.image_id else ""
        return [f"baked again from {path} it is another file: SHA-256 {again}, not {found.sha256}{other}"]


def _show(found: verifying.Baked, *, is_rebuilt: bool) -> None:
    rows = {
        "file": f"{found.file} ({found.form})",
        "sha256": found.sha256,
        "system": f"{found.system} {found.role}".strip(),
        "agent": found.agent_version,
        "seed on": found.seed_on,
        "image": found.image_id,
        "cluster": found.cluster_id,
        "root CA": found.root_fingerprint,
        "image key": found.image_key_id,
        "baked at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(found.baked_at)) if found.baked_at else "",
        "controllers": ", ".join(found.controllers),
        "properties": ", ".join(found.ova_properties),
        "signed by": found.ova_signer,
        "system's keys": f"{found.system_keys} private keys came with the system" if found.system_keys else "",
        "baked again": "the same bytes" if is_rebuilt and not found.problems else "",
    }
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for key, value in rows.items():
        if value:
            console.print(f"{key:<14} {value}")
    for name, digest in found.digests.items():
        console.print(f"{name:<14} {digest}")
