"""Looks at everything a recipe names before anything is made, and tells all that is wrong with it at once."""

from __future__ import annotations

from pathlib import Path

import msgspec

from appliance.errors import ApplianceError, ImageError
from appliance.pki import trust
from appliance.pki.manifest_signature import sign_manifest
from appliance.pki.secret import Secret
from appliance.protocol import seed as protocol
from appliance.protocol import strict_json
from appliance.protocol.seed import MAX_BUNDLE_BYTES
from image_builder import agent as agent_files
from image_builder import boot_disk, cloud, disk, fat, overlay, partition, private_keys, scan
from image_builder.agent import Agent
from image_builder.disk import Layout, Source
from image_builder.fat import MIB
from image_builder.recipe import Recipe, refusal
from image_builder.seed import BakedSeed, bake, check_named, check_wishes
from image_builder.steps import Steps


class System(msgspec.Struct, frozen=True, kw_only=True):
    """What the image starts from, looked at."""

    source: Source
    layout: Layout
    digest: str
    """SHA-256 of a foreign file, or the digest of our own system."""
    keys: list[str] = []
    """Digests of private keys that a foreign system came with."""

    @property
    def target(self) -> cloud.Target:
        """What user-data is for on it."""
        return cloud.Target.FOREIGN if self.layout.own is None else cloud.Target.OWN


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """What was read before anything is made."""

    agent: Agent
    bundle: bytes | None
    system: System | None
    """None: our own system, not built yet."""
    signer: tuple[bytes, Secret] | None


def look_at(recipe: Recipe, draft: Path, *, now: int, cache: Path, problems: list[str], steps: Steps) -> Inputs:
    """Reads and checks all inputs.

    Args:
        recipe: checked by itself.
        draft: a folder for moments.
        now: this machine's clock, seconds since 1970.
        cache: where what is known about a foreign system is kept.
        problems: mistakes found already, told together with those found here.
        steps: is told what goes on.

    Raises:
        SeedError: with all mistakes.
    """
    tools = ["qemu-img", "qemu-io", "mcopy", "mformat", "sfdisk", "sgdisk"]
    lacking = boot_disk.missing_tools() if recipe.base is None else []
    lacking += [one for one in boot_disk.tools_missing(tools) if one not in lacking]
    problems += lacking
    agent = None
    try:
        agent = agent_files.load(recipe.agent)
        overlay.units_of(agent)
    except ImageError as error:
        problems.append(error.message)
    bundle = _read_bundle(recipe, problems)
    system = None
    if recipe.base is not None and not lacking:
        system = _look_at_base(recipe, recipe.base, agent, draft, problems)
        if system is not None and agent is not None and system.layout.own is None:
            told, keys = _foreign_problems(system, agent, bundle, draft, cache=cache, steps=steps)
            problems += told
            system = msgspec.structs.replace(system, keys=keys)
    if recipe.role == "se":
        if bundle is None:
            problems += check_wishes(recipe.wishes, recipe.cloud)
        else:
            target = cloud.Target.OWN if system is None else system.target
            try:
                bake_seed(recipe, bundle, now=now, target=target, system="")
            except ApplianceError as error:
                problems += [line.removeprefix("  - ") for line in error.message.splitlines()[1:]]
    else:
        problems += check_wishes(recipe.wishes, recipe.cloud)
    least = boot_disk.DEFAULT_BYTES + _likely_seed_bytes(None) + 2 * MIB
    if recipe.base is None and 0 < recipe.disk_bytes < least:
        problems.append(f"disk.size: our own system with its seed needs {least // MIB}M")
    signer = _signer(recipe, problems)
    if agent is None or problems:
        raise refusal(problems)
    return Inputs(agent=agent, bundle=bundle, system=system, signer=signer)


def _likely_seed_bytes(agent: Agent | None) -> int:
    """Returns about how large the seed's partition will be, `agent` being the one that goes onto it."""
    files, size = (agent.files, agent.size_bytes) if agent is not None else (0, 0)
    # a tar has a header and padding for each file
    return fat.size_for(size + files * 2 * partition.SECTOR + 64 * 1024, files=12)


def _look_at_base(recipe: Recipe, path: Path, agent: Agent | None, draft: Path, problems: list[str]) -> System | None:
    try:
        found = disk.inspect(path)
        digest = disk.sha256_of(path)
        if recipe.base_sha256 and digest != recipe.base_sha256:
            problems.append(f"base.image {path} has the SHA-256 {digest}, base.sha256 says {recipe.base_sha256}")
        layout = disk.layout_of(path, name=str(path), size_bytes=found.size_bytes, scratch=draft, form=found.format)
        if 0 < recipe.disk_bytes < found.size_bytes:
            problems.append(f"disk.size is less than the base's disk of {found.size_bytes // MIB}M; no disk is shrunk")
        else:
            seed = _likely_seed_bytes(None if layout.own is not None else agent)
            sectors = disk_bytes(recipe, found, seed_bytes=seed) // partition.SECTOR
            partition.place_for(layout.table, name=str(path), sectors=sectors, size_bytes=seed)
    except ApplianceError as error:
        problems.append(f"{error.message}; {error.hint}" if error.hint else error.message)
        return None
    own = layout.own
    if own is not None and own.role != recipe.role:
        problems.append(
            f"base.image {path} is our own system for the role {own.role}, the recipe's role is {recipe.role}"
        )
    return System(source=found, layout=layout, digest=digest if own is None else own.digest)


def _foreign_problems(
    system: System, agent: Agent, bundle: bytes | None, draft: Path, *, cache: Path, steps: Steps
) -> tuple[list[str], list[str]]:
    """Says what the raw content of a foreign system tells against it, and the digests of keys it came with."""
    name = system.source.path.name
    seen = _seen(system, draft, cache=cache, steps=steps)
    problems = private_keys.problems(
        [(key, -1) for key in seen.keys],
        cluster=seen.owners | _cluster_keys(bundle),
        image_key="",
        known={key.digest for key in seen.keys},
    )
    problems = [f"base.image {system.source.path}: {problem.replace(' at byte -1', ' on it')}" for problem in problems]
    if seen.keys:
        steps.note(f"{name} came with {len(seen.keys)} private keys of its own; packages carry some, files shouldn't")
    need = ".".join(map(str, agent.glibc))
    if not seen.glibc:
        steps.note(f"no C library can be seen in {name}; first boot looks for glibc {need} itself")
    elif max(seen.glibc) < agent.glibc:
        have = ".".join(map(str, max(seen.glibc)))
        problems.append(
            f"base.image {system.source.path} has glibc {have}, the agent needs {need}: take a newer system"
        )
    return problems, [key.digest for key in seen.keys]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the raw content of a foreign system tells; kept, since looking takes seconds."""

    glibc: list[tuple[int, int]]
    keys: list[private_keys.KeyNote]
    owners: dict[str, str]
    """From `private_keys.of_certificates`."""


def _seen(system: System, draft: Path, *, cache: Path, steps: Steps) -> Seen:
    kept = cache / f"seen-{system.digest}.json"
    try:
        return msgspec.json.decode(kept.read_bytes(), type=Seen)
    except (OSError, *strict_json.UNDECODABLE):
        pass  # never looked at, or by another version
    raw = system.source.path
    if system.source.format != "raw":
        raw = draft / "scanned"
        disk.convert_any(system.source, raw, to="raw", steps=steps, text=f"unpack {system.source.path.name}")
    with steps.step("look through the system"):
        found = scan.look_through(raw)
    if raw != system.source.path:
        raw.unlink()
    seen = Seen(
        glibc=sorted(set(found.glibc)),
        keys=[private_keys.note(key) for key in found.keys],
        owners=private_keys.of_certificates(found.certificates),
    )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(msgspec.json.encode(seen))
    except OSError as error:
        steps.note(f"what was found in {system.source.path.name} can't be kept: {error.strerror}")
    return seen


def _cluster_keys(bundle: bytes | None) -> dict[str, str]:
    """Returns the cluster's keys where a bundle tells them; baking says what is wrong with one that doesn't."""
    try:
        found = msgspec.json.decode(bundle or b"", type=protocol.Bundle)
        document = trust.verify_trust(found.trust, anchors=[found.root_ca], current=None)
        return private_keys.of_cluster(found.root_ca, document)
    except (ApplianceError, *strict_json.UNDECODABLE):
        return {}


def _read_bundle(recipe: Recipe, problems: list[str]) -> bytes | None:
    if recipe.bundle is None:
        return None
    try:
        with recipe.bundle.open("rb") as stream:
            raw = stream.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        problems.append(f"the bundle {recipe.bundle} can't be read: {error.strerror}")
        return None
    problems += check_named(raw, cluster=recipe.cluster, key_id=recipe.key_id)
    return raw


def _signer(recipe: Recipe, problems: list[str]) -> tuple[bytes, Secret] | None:
    if recipe.certificate is None or recipe.key is None:
        return None
    try:
        signer = recipe.certificate.read_bytes(), Secret(recipe.key.read_bytes())
        sign_manifest(b"", name="trial.mf", certificate_pem=signer[0], key_pem=signer[1])
    except OSError as error:
        problems.append(f"{error.filename} can't be read: {error.strerror}")
    except ApplianceError as error:
        problems.append(error.message)
    else:
        return signer
    return None


def bake_seed(recipe: Recipe, bundle: bytes, *, now: int, target: cloud.Target, system: str) -> BakedSeed:
    """Bakes the recipe's seed for a kind of disk and a system's digest, "" while it isn't known. As `seed.bake`."""
    return bake(
        bundle,
        recipe.wishes,
        baked_at=recipe.baked_at,
        now=now,
        cloud_wishes=recipe.cloud,
        target=target,
        system=system,
    )


def disk_bytes(recipe: Recipe, source: Source, *, seed_bytes: int) -> int:
    """Returns the size of the image's disk: as wished, else the base's with room for the seed at its end."""
    return recipe.disk_bytes or boot_disk.whole_mib(source.size_bytes) + seed_bytes + 2 * MIB
