"""What one image shall be: a TOML file, every field of which is also an option of `image-builder build`.

`FIELDS` is the one list of them: names, kinds and help. The command line is made from it, and so is the check. Nothing
is built here and no image is opened; what can be seen wrong is told all at once.

A field is named `section.field`, as in the file, or `--section-field`, on the command line, which goes first.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from appliance.errors import SeedError, UsageError
from appliance.protocol import token as tokens
from appliance.protocol.enroll import Policy
from image_builder.cloud import CloudWishes, Hook, Network
from image_builder.controller import Cluster
from image_builder.controller import check as check_cluster
from image_builder.fat import MIB
from image_builder.seed import Wishes

Kind = Literal["text", "whole", "yes", "path", "texts", "paths"]
OWN_BASE = "minimal"
"""Instead of a file: our own minimal system."""
FORMATS = ("qcow2", "raw", "ova", "iso")
MAX_RECIPE_BYTES = 256 * 1024
MAX_HOOK_FILE_BYTES = 64 * 1024
MAX_TOKEN_FILE_CHARS = 1024

_SIZE = re.compile(r"([1-9][0-9]{0,6})\s*([MGT])(i?B?)")
_NAME = re.compile(r"[^/\0\n\r\t]{1,80}")
_DURATION = re.compile(r"[1-9][0-9]{0,5}[smhdw]")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")


class Field(msgspec.Struct, frozen=True):
    """One field of a recipe."""

    name: str
    kind: Kind
    help: str
    choices: tuple[str, ...] = ()

    option: str = ""
    """Its last word on the command line, where it isn't the name or, for lists, the name without its s."""

    @property
    def flag(self) -> str:
        """Its option on the command line."""
        section, _, last = self.name.rpartition(".")
        last = self.option or (last.removesuffix("s") if self.kind in {"texts", "paths"} else last)
        return "--" + f"{section}.{last}".strip(".").replace(".", "-").replace("_", "-")


FIELDS = (
    Field("name", "text", "Name of the image and of its files.  [default: appliance-ROLE]"),
    Field("role", "text", "Who will live on it.  [default: se]", ("se", "controller")),
    Field("baked_at", "whole", "Seconds since 1970: dates everything.  [default: SOURCE_DATE_EPOCH, else now]"),
    Field("bundle", "path", "Trust bundle of the controller, with the image key."),
    Field("cluster", "text", "Id of the cluster: a bundle of another one is refused."),
    Field("controllers", "texts", "HOST[:PORT] instead of the bundle's; A,B gives a node a second address."),
    Field("seed_name", "text", "Name the SE asks for."),
    Field("labels", "texts", "KEY=VALUE, label of the SE."),
    Field("token", "text", "Token that lets one VM in, or a file with it; where the image key's policy asks for one."),
    Field("hostname", "text", "Host name of the VM.  [default: from seed_name]"),
    Field("timezone", "text", "Time zone, such as Europe/Berlin.  [default: UTC]"),
    Field("operator_key", "text", "Public key (ssh-ed25519 …) of an operator who may log in, or a file with it."),
    Field("hooks", "paths", "Script run once as root before the agent starts."),
    Field("controller.addresses", "texts", "Make a cluster at first boot, which SEs reach by this.", option="address"),
    Field("controller.trust_clock", "yes", "For that: take the hypervisor's time, not a time server's."),
    Field("base.image", "text", f"Disk image of a cloud system, or {OWN_BASE!r} for our own.  [default: {OWN_BASE}]"),
    Field("base.sha256", "text", "What that file must have."),
    Field("base.sources", "paths", "For our own system: apt sources instead of this machine's."),
    Field("base.packages", "texts", "For our own system: further Debian packages."),
    Field("disk.size", "text", "Size of the disk, such as 8G.  [default: the base's, and room for the seed]"),
    Field("image_key.id", "text", "The image key that the bundle must hold."),
    Field("image_key.create", "yes", "Make an image key on this machine's controller instead of taking a bundle."),
    Field("image_key.root", "path", "For create: root directory of that controller.  [default: /]"),
    Field("image_key.expires", "text", "For create: how long it opens the door.  [default: 30d]"),
    Field("image_key.max_uses", "whole", "For create: how many SEs.  [default: 500]"),
    Field("image_key.policy", "text", "For create: who gets in.  [default: open]", tuple(Policy)),
    Field("image_key.networks", "texts", "For create: only from this network."),
    Field("agent.directory", "path", "The agent, directory form.  [default: beside this program, or dist/appliance]"),
    Field("network.interface", "text", "Management interface.  [default: the first]"),
    Field("network.addresses", "texts", "ADDRESS/PREFIX; without one, DHCP.", option="address"),
    Field("network.gateways", "texts", "Of one of these networks."),
    Field("network.dns", "texts", "Address of a DNS server.", option="dns"),
    Field("network.ntp", "texts", "Name or address of a time server.", option="ntp"),
    Field("network.vlan", "whole", "VLAN of the management network, 0 for none."),
    Field("output.directory", "path", "Where the files go.  [default: .]"),
    Field("output.formats", "texts", "What to make.  [default: qcow2]", FORMATS),
    Field("output.register", "path", "Root directory of this machine's controller, to be told of the image."),
    Field("ova.certificate", "path", "Certificate (PEM) that signs the OVA."),
    Field("ova.key", "path", "Its RSA key (PEM)."),
)
_BY_NAME = {field.name: field for field in FIELDS}


class KeyWish(msgspec.Struct, frozen=True, kw_only=True):
    """An image key to be made by a controller."""

    root: Path = Path("/")
    expires: str = "30d"
    max_uses: int = 500
    policy: str = "open"
    networks: list[str] = []


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """A checked recipe. Files named in it were there, and are of the right kind."""

    name: str
    role: Literal["se", "controller"]
    baked_at: int
    bundle: Path | None
    cluster: str
    wishes: Wishes
    cloud: CloudWishes
    cluster_to_make: Cluster
    """A controller's, at first boot."""
    base: Path | None
    """None: our own minimal system."""
    base_sha256: str
    base_sources: list[Path]
    base_packages: list[str]
    disk_bytes: int
    """0: the base's."""
    key_id: str
    create_key: KeyWish | None
    agent: Path
    directory: Path
    formats: list[str]
    register: Path | None
    """Root directory of the controller that is told of the image."""
    certificate: Path | None
    key: Path | None


def _flatten(table: Mapping[str, Any], problems: list[str], *, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            found[key] = value
    for name in [name for name in found if name not in _BY_NAME]:
        near = difflib.get_close_matches(name, _BY_NAME, n=1)
        problems.append(f"{where}: there is no field {name!r}" + (f", {near[0]!r} perhaps?" if near else ""))
        del found[name]
    return found


def read_file(path: Path, problems: list[str]) -> dict[str, Any]:
    """Returns the fields of a recipe file, `section.field` to value, with paths relative to that file made absolute.

    Mistakes go to `problems`; fields of the wrong kind are left out.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_RECIPE_BYTES + 1)
        if len(raw) > MAX_RECIPE_BYTES:
            problems.append(f"the recipe {path} has more than {MAX_RECIPE_BYTES} bytes")
            return {}
        table = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        problems.append(f"the recipe {path} can't be read: {error.strerror}")
        return {}
    except (ValueError, RecursionError) as error:  # TOML and UTF-8; a parser that recurses
        problems.append(f"the recipe {path} is no TOML: {error}")
        return {}
    found: dict[str, Any] = {}
    for name, value in _flatten(table, problems, where=str(path)).items():
        field = _BY_NAME[name]
        if not _is_kind(value, field.kind):
            problems.append(f"{path}: {name} is {value!r}, {_KINDS[field.kind]} expected")
        elif field.kind == "path" or (name in _WORD_OR_FILE and not _WORD_OR_FILE[name].match(value)):
            found[name] = str(path.absolute().parent / value)
        elif field.kind == "paths":
            found[name] = [str(path.absolute().parent / one) for one in value]
        else:
            found[name] = value
    return found


_WORD_OR_FILE = {
    "base.image": re.compile(rf"{OWN_BASE}\Z"),
    "operator_key": re.compile(r"ssh-|\Z"),
    "token": re.compile(rf"(?:{'|'.join(tokens.Kind)})-|\Z"),
}
"""Fields that name a file unless they look like this."""
_KINDS: Mapping[Kind, str] = {
    "text": "text",
    "whole": "a whole number",
    "yes": "true or false",
    "path": "a path as text",
    "texts": "a list of texts",
    "paths": "a list of paths as texts",
}


def _is_kind(value: Any, kind: Kind) -> bool:
    match kind:
        case "text" | "path":
            return isinstance(value, str)
        case "whole":
            return isinstance(value, int) and not isinstance(value, bool)
        case "yes":
            return isinstance(value, bool)
        case "texts" | "paths":
            return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _size(text: str, problems: list[str]) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        problems.append(f"disk.size {text!r}: a number with M, G or T expected, such as 8G")
        return 0
    return int(match[1]) * MIB * {"M": 1, "G": 1024, "T": 1024 * 1024}[match[2]]


def _controllers(texts: list[str], problems: list[str]) -> list[str]:
    """Returns the first address of every node, then the second ones: an SE tries them in this order."""
    nodes = [[part.strip() for part in text.split(",")] for text in texts]
    for text, node in zip(texts, nodes, strict=True):
        if len(node) > 2 or not all(node):
            problems.append(f"controller {text!r}: one address, or two with a comma between, expected")
    return [node[rank] for rank in (0, 1) for node in nodes if len(node) > rank and node[rank]]


def _hooks(paths: list[str], problems: list[str]) -> list[Hook]:
    hooks = []
    for path in paths:
        try:
            with Path(path).open("rb") as stream:
                hooks.append(Hook(Path(path).name, stream.read(MAX_HOOK_FILE_BYTES)))
        except OSError as error:
            problems.append(f"the hook {path} can't be read: {error.strerror}")
    return hooks


def _operator_key(text: str, problems: list[str]) -> str:
    if _WORD_OR_FILE["operator_key"].match(text):
        return text
    try:
        return Path(text).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"operator_key is neither a public key line nor a file that can be read: {error}")
        return ""


def _token(text: str, problems: list[str]) -> str:
    """Returns a token; what was given in its place is never repeated, since it may be most of one."""
    if not text:
        return ""
    if not _WORD_OR_FILE["token"].match(text):
        try:
            with Path(text).open(encoding="utf-8") as stream:
                text = stream.read(MAX_TOKEN_FILE_CHARS).strip()
        except (OSError, ValueError):
            problems.append("token is neither a token (enroll-… or rejoin-…) nor a file that can be read")
            return ""
    try:
        tokens.parse(text)
    except UsageError as error:
        problems.append(f"token: {error.message}")
        return ""
    return text


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Asks the system about a path; it says even of names that no file can have (too long) that they aren't there."""
    try:
        return kind(path)
    except OSError:
        return False


def _file(values: Mapping[str, Any], name: str, problems: list[str]) -> Path | None:
    if name not in values:
        return None
    path = Path(values[name])
    if not _is(path, Path.is_file) or not os.access(path, os.R_OK):
        kind = "is not there"
        if _is(path, Path.exists):
            kind = "is a folder" if path.is_dir() else "can't be read"
        problems.append(f"{name}: the file {path} {kind}")
        return None
    return path


def _key_wish(values: Mapping[str, Any], problems: list[str]) -> KeyWish | None:
    given = [
        name for name in values if name.startswith("image_key.") and name not in {"image_key.id", "image_key.create"}
    ]
    if not values.get("image_key.create"):
        problems += [f"{name} says how to make a key, but image_key.create isn't set" for name in given]
        return None
    if "bundle" in values:
        problems.append("bundle and image_key.create: a bundle brings its key, so one of the two expected")
    wish = KeyWish(
        root=Path(values.get("image_key.root", "/")),
        expires=values.get("image_key.expires", "30d"),
        max_uses=values.get("image_key.max_uses", 500),
        policy=values.get("image_key.policy", "open"),
        networks=values.get("image_key.networks", []),
    )
    if not _DURATION.fullmatch(wish.expires):
        problems.append(f"image_key.expires {wish.expires!r}: a number with s, m, h, d or w expected, such as 30d")
    for network in wish.networks:
        try:
            ipaddress.ip_network(network)
        except ValueError:
            problems.append(f"image_key.networks {network!r}: a network such as 192.0.2.0/24 expected")
    if not 1 <= wish.max_uses <= 1_000_000:
        problems.append(f"image_key.max_uses {wish.max_uses}: 1 to 1,000,000 expected")
    return wish


def _check_choices(values: Mapping[str, Any], problems: list[str]) -> None:
    problems += [
        f"{name} {one!r}: {', '.join(_BY_NAME[name].choices)} expected"
        for name, value in values.items()
        if _BY_NAME[name].choices
        for one in (value if isinstance(value, list) else [value])
        if one not in _BY_NAME[name].choices
    ]


def _base(values: Mapping[str, Any], problems: list[str]) -> tuple[Path | None, list[Path], str]:
    image = values.get("base.image", OWN_BASE)
    base = _file(values, "base.image", problems) if image != OWN_BASE else None
    sha256 = values.get("base.sha256", "")
    if sha256 and not _SHA256.fullmatch(sha256):
        problems.append(f"base.sha256 {sha256!r}: 64 hex digits expected")
    if sha256 and image == OWN_BASE:
        problems.append("base.sha256: there is no base.image that it could be of")
    for_own = [one for one in ("base.sources", "base.packages") if one in values and image != OWN_BASE]
    problems += [f"{one} is for our own system, but base.image names another" for one in for_own]
    problems += [
        f"base.packages {one!r}: name of a Debian package expected"
        for one in values.get("base.packages", [])
        if not _PACKAGE.fullmatch(one)
    ]
    sources = [Path(one) for one in values.get("base.sources", [])]
    problems += [f"base.sources: the file {path} is not there" for path in sources if not _is(path, Path.is_file)]
    return base, sources, sha256.lower()


def read_wishes(values: Mapping[str, Any], problems: list[str]) -> tuple[Wishes, CloudWishes]:
    """Makes what a seed carries beside its bundle; what is wrong with it is added to `problems`."""
    wishes = Wishes(
        controllers=_controllers(values.get("controllers", []), problems),
        name=values.get("seed_name", ""),
        labels=values.get("labels", []),
        hostname=values.get("hostname", ""),
        token=_token(values.get("token", ""), problems),
    )
    cloud = CloudWishes(
        timezone=values.get("timezone", ""),
        operator_key=_operator_key(values.get("operator_key", ""), problems),
        network=Network(
            interface=values.get("network.interface", ""),
            addresses=values.get("network.addresses", []),
            gateways=values.get("network.gateways", []),
            dns=values.get("network.dns", []),
            vlan=values.get("network.vlan", 0),
        ),
        ntp=values.get("network.ntp", []),
        hooks=_hooks(values.get("hooks", []), problems),
    )
    return wishes, cloud


def _outputs(values: Mapping[str, Any], role: str, problems: list[str]) -> tuple[list[str], Path]:
    formats = list(dict.fromkeys(values.get("output.formats", ["qcow2"])))
    directory = Path(values.get("output.directory", "."))
    if not formats:
        problems.append("output.formats: at least one expected")
    if "iso" in formats and role == "controller":
        problems.append("output.formats: a controller has no seed, so there is no iso of it")
    if not _is(directory, Path.is_dir):
        problems.append(f"output.directory {directory} is no folder: make it first")
    return formats, directory


def check(values: Mapping[str, Any], *, now: int, agent: Path, problems: list[str]) -> Recipe:
    """Makes a recipe of fields.

    Args:
        values: `section.field` to value, each of its field's kind.
        now: this machine's clock, seconds since 1970.
        agent: where the agent lies by default.
        problems: mistakes found already; what is wrong here is added.

    """
    _check_choices(values, problems)
    role = "controller" if values.get("role") == "controller" else "se"
    name = values.get("name", f"appliance-{role}")
    if not _NAME.fullmatch(name) or name.startswith("."):
        problems.append(f"name {name!r}: up to 80 characters, no '/' and no '.' at the beginning, expected")
    create_key = _key_wish(values, problems)
    bundle = _file(values, "bundle", problems)
    for_se = (
        "bundle", "controllers", "seed_name", "labels", "token", "image_key.create", "image_key.id", "cluster",
        "output.register",
    )  # fmt: skip
    if role == "controller":
        problems += [f"{one} is for SEs: a controller's image carries no seed" for one in for_se if values.get(one)]
    elif "bundle" not in values and create_key is None:
        problems.append("bundle or image_key.create: one of the two expected")
    cluster = Cluster(
        addresses=values.get("controller.addresses", []), trust_clock=values.get("controller.trust_clock", False)
    )
    problems += check_cluster(cluster)
    if role == "se" and cluster.addresses:
        problems.append("controller.addresses is for a controller's image; `controllers` says where SEs find theirs")
    base, base_sources, sha256 = _base(values, problems)
    formats, directory = _outputs(values, role, problems)
    signing = [_file(values, one, problems) for one in ("ova.certificate", "ova.key")]
    if ("ova.certificate" in values) != ("ova.key" in values):
        problems.append("ova.certificate and ova.key: both or none expected")
    elif "ova.key" in values and "ova" not in formats:
        problems.append("ova.certificate signs an OVA, but output.formats has no ova")
    wishes, cloud = read_wishes(values, problems)
    return Recipe(
        name=name,
        role=role,  # type: ignore[arg-type]  # one of the two, see above
        baked_at=values.get("baked_at", now),
        bundle=bundle,
        cluster=values.get("cluster", ""),
        wishes=wishes,
        cloud=cloud,
        cluster_to_make=cluster,
        base=base,
        base_sha256=sha256,
        base_sources=base_sources,
        base_packages=values.get("base.packages", []),
        disk_bytes=_size(values["disk.size"], problems) if "disk.size" in values else 0,
        key_id=values.get("image_key.id", ""),
        create_key=create_key,
        agent=Path(values.get("agent.directory", agent)),
        directory=directory,
        formats=formats,
        register=Path(values["output.register"]) if "output.register" in values else None,
        certificate=signing[0],
        key=signing[1],
    )


def refusal(problems: list[str]) -> SeedError:
    """Returns the error that tells all mistakes, one a line."""
    return SeedError(
        "the recipe doesn't hold:" + "".join(f"\n  - {problem}" for problem in problems),
        hint="nothing was built; `image-builder build --help` names all fields",
    )
