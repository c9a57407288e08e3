"""Bakes a recipe: system and seed onto one disk, and that disk into every wanted form.

First everything that can be known wrong is told, then a key is made where one is wanted, then the work begins; what is
finished gets its name last, all of it or nothing. The same recipe, inputs and bundle give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import msgspec

from appliance.errors import ApplianceError
from appliance.protocol import seed as protocol
from appliance.protocol.image import REPORT_SCHEMA, ImageReport
from appliance.runtime import child
from image_builder import agent as agent_files
from image_builder import boot_disk, cloud, controller, debian, disk, iso, minimal, ova, overlay, register, sbom
from image_builder.agent import Agent
from image_builder.inputs import Inputs, System, bake_seed, look_at
from image_builder.inputs import disk_bytes as wished_bytes
from image_builder.output import Draft, check_target, publish
from image_builder.recipe import KeyWish, Recipe
from image_builder.seed import BakedSeed, SeedFile
from image_builder.steps import Steps

_SIDECARS = {"packages": "packages.txt", "bill": "cdx.json", "report": "image.json"}
_FIRST_BOOT_FILES = (
    protocol.SEED_FILE,
    protocol.ROOT_CA_FILE,
    protocol.TRUST_FILE,
    protocol.IMAGE_KEY_FILE,
)


def build(recipe: Recipe, *, now: int, cache: Path, fresh: bool, problems: list[str], steps: Steps) -> ImageReport:
    """Bakes the image and writes every wanted form.

    Args:
        recipe: checked by itself.
        now: this machine's clock, seconds since 1970.
        cache: where layers of our own system are kept.
        fresh: install our own system anew.
        problems: mistakes found in the recipe, told together with those found here.
        steps: is told what goes on.

    Raises:
        SeedError: with all mistakes, before anything was made.
        ImageError, ChildError, StorageError: the work failed; nothing is left of it.
    """
    targets = _targets(recipe)
    problems += [problem for target in targets.values() for problem in check_target(target)]
    with Draft(recipe.directory if recipe.directory.is_dir() else Path()) as draft:
        inputs = look_at(recipe, draft, now=now, cache=cache, problems=problems, steps=steps)
        if recipe.register is not None:
            register.check(inputs.agent, recipe.register)
        made_key: str = ""
        try:
            bundle = inputs.bundle
            if recipe.create_key is not None:
                bundle = _create_key(recipe.create_key, inputs.agent, draft, name=recipe.name)
                made_key = json.loads(bundle)["image_key_id"]
            built = _make(
                recipe, inputs, bundle, draft, targets=targets, now=now, cache=cache, fresh=fresh, steps=steps
            )
        except BaseException:
            if made_key and recipe.create_key is not None:
                _revoke_key(recipe.create_key, inputs.agent, made_key, steps)
            raise
    if recipe.register is not None:
        register.add(inputs.agent, recipe.register, targets["report"])
    return built


def _targets(recipe: Recipe) -> dict[str, Path]:
    files = {form: f"{recipe.name}.{form}" for form in recipe.formats}
    files |= {kind: f"{recipe.name}.{ending}" for kind, ending in _SIDECARS.items()}
    if recipe.create_key is not None:
        files["bundle"] = f"{recipe.name}.bundle.json"
    return {kind: recipe.directory / name for kind, name in files.items()}


def _create_key(wish: KeyWish, agent: Agent, draft: Path, *, name: str) -> bytes:
    file = draft / "bundle"
    terms = ["--expires", wish.expires, "--max-uses", str(wish.max_uses), "--policy", wish.policy]
    networks = [word for network in wish.networks for word in ("--network", network)]
    args = [*_appliance(wish, agent), "create", *terms, *networks, "--note", f"image {name}", "--out", str(file)]
    child.run(args, timeout_s=120.0)
    return file.read_bytes()


def _revoke_key(wish: KeyWish, agent: Agent, key: str, steps: Steps) -> None:
    try:
        child.run([*_appliance(wish, agent), "revoke", key, "--reason", "its image was not built"], timeout_s=60.0)
    except ApplianceError as error:
        steps.note(f"the image key {key} was made and could not be revoked: {error.message}")


def _appliance(wish: KeyWish, agent: Agent) -> list[str]:
    return [str((agent.directory / agent_files.PROGRAM).absolute()), "--root", str(wish.root), "image-key"]


def _make(
    recipe: Recipe,
    inputs: Inputs,
    bundle: bytes | None,
    draft: Path,
    *,
    targets: dict[str, Path],
    now: int,
    cache: Path,
    fresh: bool,
    steps: Steps,
) -> ImageReport:
    system = inputs.system
    if system is None:
        made = minimal.make(
            recipe.role,
            inputs.agent,
            sources=recipe.base_sources,
            extra=recipe.base_packages,
            epoch=minimal.DEFAULT_EPOCH,
            size_bytes=boot_disk.DEFAULT_BYTES,
            cache=cache,
            fresh=fresh,
            steps=steps,
        )
        found = disk.inspect(made.path)
        layout = disk.layout_of(made.path, name=str(made.path), size_bytes=found.size_bytes, scratch=draft)
        system = System(source=found, layout=layout, digest=made.description.digest)
    # Our own system has the agent in it; onto a foreign one it comes with the seed, and belongs to the image as much.
    whole = system.digest if system.layout.own is not None else f"{system.digest} {inputs.agent.digest}"
    baked = bake_seed(recipe, bundle, now=now, target=system.target, system=whole) if bundle is not None else None
    also: list[str] = []
    files: dict[Path, Path] = {}
    disk_bytes = 0
    if set(recipe.formats) - {"iso"}:
        work = draft / "work.qcow2"
        disk_bytes = _make_disk(recipe, inputs.agent, system, baked, work, steps=steps)
        image_id = _image_id(baked, recipe)
        files |= _make_forms(recipe, inputs, work, targets, image_id=image_id, size=disk_bytes, steps=steps)
    if "iso" in recipe.formats and bundle is not None:
        alone = bake_seed(recipe, bundle, now=now, target=cloud.Target.IMAGE, system=whole)
        also = [alone.seed.image_id]
        (draft / "iso").write_bytes(iso.render(alone.files, at=recipe.baked_at))
        files[draft / "iso"] = targets["iso"]
    if "bundle" in targets:
        files[draft / "bundle"] = targets["bundle"]
    built = _describe(recipe, inputs.agent, system, baked, also=also, disk_bytes=disk_bytes, files=files)
    files |= _write_sidecars(built, inputs.agent, system, draft, targets)
    secret = {target: 0o600 for kind, target in targets.items() if kind in {*recipe.formats, "bundle"}}
    publish(files, modes=secret if recipe.role == "se" else {})
    return built


def _image_id(baked: BakedSeed | None, recipe: Recipe) -> str:
    return baked.seed.image_id if baked is not None else f"controller-{recipe.name}"


def _make_disk(
    recipe: Recipe, agent: Agent, system: System, baked: BakedSeed | None, work: Path, *, steps: Steps
) -> int:
    if baked is not None:
        files = baked.files
    else:
        hostname = recipe.wishes.hostname
        files = controller.files(recipe.cloud, recipe.cluster_to_make, target=system.target, hostname=hostname)
    others: dict[str, Path] = {}
    if system.layout.own is None:
        tar = work.with_name(cloud.AGENT_TAR)
        agent_files.write_tar(tar, agent, epoch=recipe.baked_at)
        others[cloud.AGENT_TAR] = tar
        mode, needed = ("se", _FIRST_BOOT_FILES) if recipe.role == "se" else ("", ())
        script = cloud.install_script(mode=mode, glibc=agent.glibc, seed_files=needed)
        sshd = overlay.sshd_for_agent((0, 0)).encode()
        files = [*files, SeedFile(cloud.INSTALL_SCRIPT, script, 0o755), SeedFile("sshd.conf", sshd, 0o644)]
        files.append(
            SeedFile(agent_files.DESCRIPTION_FILE, agent_files.describe(agent, system_keys=system.keys), 0o644)
        )
    label = protocol.OWN_LABEL if system.layout.own is not None else protocol.ISO_LABEL
    image_id = _image_id(baked, recipe)
    with steps.step("make the seed partition"):
        image = work.with_name("seed.fat")
        length = disk.seed_partition(image, files, others, label=label, image_id=image_id, epoch=recipe.baked_at)
    size = wished_bytes(recipe, system.source, seed_bytes=length)
    disk.copy(system.source, work, size_bytes=size, steps=steps)
    with steps.step("put the seed into the disk"):
        disk.add_partition(
            work,
            system.layout,
            image,
            old_bytes=system.source.size_bytes,
            size_bytes=size,
            name=label,
            image_id=image_id,
        )
    image.unlink()
    for path in others.values():
        path.unlink()
    return size


def _make_forms(
    recipe: Recipe, inputs: Inputs, work: Path, targets: dict[str, Path], *, image_id: str, size: int, steps: Steps
) -> dict[Path, Path]:
    draft = work.parent
    files: dict[Path, Path] = {}
    if "raw" in recipe.formats:
        disk.convert(work, draft / "raw", to="raw", steps=steps, text=f"write {targets['raw'].name}")
        files[draft / "raw"] = targets["raw"]
    if "ova" in recipe.formats:
        vmdk = draft / "disk.vmdk"
        disk.convert(
            work, vmdk, to="vmdk", options=ova.VMDK_OPTIONS, steps=steps, text=f"compress {targets['ova'].name}"
        )
        machine = ova.Machine(name=recipe.name, version=inputs.agent.version, image_id=image_id, disk_bytes=size)
        # members' names travel through importers of all kinds; the appliance's own name stands in the descriptor
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe.name).strip("-.") or "appliance"
        with steps.step(f"write {targets['ova'].name}", watch=draft / "ova", expected_bytes=vmdk.stat().st_size):
            ova.write(
                draft / "ova",
                vmdk,
                machine,
                stem=stem,
                epoch=recipe.baked_at,
                populated_bytes=vmdk.stat().st_size,
                signer=inputs.signer,
            )
        vmdk.unlink()
        files[draft / "ova"] = targets["ova"]
    if "qcow2" in recipe.formats:
        files[work] = targets["qcow2"]
    return files


def _describe(
    recipe: Recipe,
    agent: Agent,
    system: System,
    baked: BakedSeed | None,
    *,
    also: list[str],
    disk_bytes: int,
    files: dict[Path, Path],
) -> ImageReport:
    own = system.layout.own
    return ImageReport(
        schema=REPORT_SCHEMA,
        image_id=_image_id(baked, recipe),
        name=recipe.name,
        role=recipe.role,
        cluster_id=baked.seed.cluster_id if baked is not None else "",
        image_key_id=baked.seed.image_key_id if baked is not None else "",
        baked_at=recipe.baked_at,
        controllers=baked.seed.controllers if baked is not None else [],
        agent_version=agent.version if own is None else own.agent_version,
        agent_digest=agent.digest if own is None else own.agent_digest,
        system=f"{'sha256' if own is None else 'minimal'}:{system.digest}",
        disk_bytes=disk_bytes,
        files={target.name: disk.sha256_of(made) for made, target in files.items()},
        recipe_digest=_recipe_digest(recipe, agent, system),
        also=also,
    )


def _recipe_digest(recipe: Recipe, agent: Agent, system: System) -> str:
    """Returns the SHA-256 over what was wished for: equal ones in two folders, or of two keys, have the same."""
    wished = [
        recipe.name,
        recipe.role,
        recipe.wishes,
        recipe.cloud,
        recipe.cluster_to_make,
        recipe.base_packages,
        recipe.disk_bytes,
        sorted(recipe.formats),
        system.digest,
        agent.digest,
    ]
    return hashlib.sha256(msgspec.json.encode(wished, order="deterministic")).hexdigest()


def _write_sidecars(
    built: ImageReport, agent: Agent, system: System, draft: Path, targets: dict[str, Path]
) -> dict[Path, Path]:
    own = system.layout.own
    packages: list[debian.Package] = [] if own is None else own.packages
    foreign = {system.source.path.name: system.digest} if own is None else {}
    contents = {
        "packages": sbom.manifest(packages, agent_version=built.agent_version),
        "bill": sbom.cyclonedx(
            packages,
            name=built.name,
            digest=built.image_id + built.system,
            epoch=built.baked_at,
            agent_version=built.agent_version,
            agent_digest=agent.digest if own is None else own.agent_digest,
            foreign=foreign,
        ),
        "report": msgspec.json.format(msgspec.json.encode(built), indent=2) + b"\n",
    }
    made = {}
    for kind, content in contents.items():
        path = draft / f"sidecar-{kind}"
        path.write_bytes(content)
        made[path] = targets[kind]
    return made
