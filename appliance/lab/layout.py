"""A lab's names, directories and documents. Pure: nothing here touches the disk or a process.

<root>/lab.json          Lab: ports, parts, and which processes were started (pid and start time)
<root>/lab.lock          held while a command changes the lab
<root>/known_hosts       the SEs' SSH host keys as the controller recorded them, for the reverse path
<root>/controller/       a whole instance (`--root`)
<root>/se-<n>/           a whole instance each, and beside it:
    seed/                what `image-builder seed` baked for it
    sshd/                sshd_config and log of its SSH server
    etc/ssh/             that server's host key, as on an appliance
<root>/<part>/daemon.log what the part's daemon wrote
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from appliance.errors import ApplianceError, UsageError
from appliance.paths import Paths
from appliance.protocol.address import format_endpoint

LOOPBACK = "127.0.0.1"
LAB_FILE = "lab.json"
MAX_SES = 200
"""Each SE is two processes of up to 60 MB; `lab fleet` simulates more."""

_REFUSED_IN_PATHS = "\"'\\%#{}"
"""Have a meaning of their own in sshd_config, known_hosts or TOML."""

_MAX_SOCKET_PATH = 107
"""sun_path of unix(7) less its closing NUL."""


class LabError(ApplianceError):
    """The lab could not be brought to where it was asked to be."""

    code = "LAB-001"
    exit_code = 9


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One process that can't be mistaken for another that got its pid later."""

    pid: int
    started: int
    """Clock ticks after boot: field 22 of /proc/PID/stat."""
    boot_id: str


class ControllerPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The controller. Its ports are fixed for the lab's life: they stand in the trust document."""

    enroll_port: int
    ssh_port: int
    reverse_port: int
    metrics_port: int
    bundle: str = ""
    """Path of the bundle that seeds are baked from; empty until the controller is initialised."""
    process: Process | None = None


class SePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One SE and its SSH server."""

    name: str
    sshd_port: int
    process: Process | None = None
    sshd: Process | None = None


class Lab(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`lab.json`."""

    user: str
    """Who runs it all, and whom `ssh` over the reverse path logs in."""
    controller: ControllerPart
    ses: list[SePart] = []


class ControllerStatus(msgspec.Struct, kw_only=True):
    """What an outside client needs of the controller. Paths are absolute."""

    root: str
    running: bool
    pid: int
    enroll_url: str
    ssh_host: str
    ssh_port: int
    ssh_user: str
    """Whom SEs log in as."""
    ssh_host_key: str
    """Public key file of the gateway."""
    reverse_port: int
    metrics_url: str
    operator_socket: str
    root_certificate: str
    trust_document: str
    """Signed by the root; what an SE believes."""
    login_key: str
    """Private key that logs in to SEs over the reverse path."""
    state: str
    settings: str
    log: str
    health: str
    bundle: str
    """Holds the private image key."""


class SeStatus(msgspec.Struct, kw_only=True):
    """What an outside client needs of one SE. Paths are absolute; without a controller the fleet's words are empty."""

    name: str
    root: str
    running: bool
    pid: int
    sshd_running: bool
    sshd_pid: int
    sshd_port: int
    sshd_host_key: str
    """Public key file of its SSH server."""
    sshd_log: str
    seed: str
    state: str
    """State directory."""
    identity: str
    """Its se_id, private key and grant, JSON; there from its first attempt to enroll on."""
    settings: str
    log: str
    health: str
    forward_socket: str
    se_id: str = ""
    number: int = 0
    address: str = ""
    fleet_state: str = ""
    reason: str = ""
    text: str = ""
    ssh: list[str] = []
    """Command that logs in over the reverse path; empty without an address."""


class LabStatus(msgspec.Struct, kw_only=True):
    """`lab status --json`."""

    root: str
    user: str
    known_hosts: str
    trouble: str
    """Why the fleet's words are missing; empty where the controller answers."""
    controller: ControllerStatus
    ses: list[SeStatus]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything of one lab lies."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.absolute())
        text = str(self.root)
        if any(char in _REFUSED_IN_PATHS or char.isspace() or not char.isprintable() for char in text):
            raise UsageError(
                f"{text!r} can't be a lab's root: it has white space or one of {_REFUSED_IN_PATHS}",
                hint="give another one with --root; sshd's configuration can't carry such a path",
            )
        longest = os.fsencode(self.controller.controller_socket)
        if len(longest) > _MAX_SOCKET_PATH:
            raise UsageError(
                f"a lab at {text} would have socket paths of {len(longest)} bytes, {_MAX_SOCKET_PATH} are possible",
                hint="give a shorter --root",
            )

    @property
    def file(self) -> Path:
        """The lab's own document."""
        return self.root / LAB_FILE

    @property
    def lock(self) -> Path:
        """Held by the one command that changes the lab."""
        return self.root / "lab.lock"

    @property
    def known_hosts(self) -> Path:
        """SSH host keys of the SEs by their loopback address."""
        return self.root / "known_hosts"

    @property
    def controller(self) -> Paths:
        """The controller's instance."""
        return Paths(self.root / "controller")

    def se(self, name: str) -> Paths:
        """The instance of one SE."""
        return Paths(self.root / name)

    def seed(self, name: str) -> Path:
        """The seed that one SE starts from."""
        return self.root / name / "seed"

    def sshd(self, name: str) -> Path:
        """Directory of one SE's SSH server."""
        return self.root / name / "sshd"

    def host_key(self, name: str) -> Path:
        """Private host key of one SE's SSH server, where it lies on an appliance too."""
        return self.root / name / "etc/ssh/ssh_host_ed25519_key"

    def log(self, name: str) -> Path:
        """What one part's daemon writes."""
        return self.root / name / "daemon.log"


def se_name(number: int) -> str:
    """Returns the name of the lab's SE `number`, from 1."""
    return f"se-{number}"


def enroll_url(part: ControllerPart) -> str:
    """Returns the URL under which SEs enroll."""
    return f"https://{format_endpoint(LOOPBACK, part.enroll_port)}/v1/enroll"


def metrics_url(part: ControllerPart) -> str:
    """Returns the URL of the Prometheus figures."""
    return f"http://{format_endpoint(LOOPBACK, part.metrics_port)}/metrics"


def known_host(address: str, port: int) -> str:
    """Returns how known_hosts names `address` at `port` (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""
    return address if port == 22 else f"[{address}]:{port}"


def ssh_command(layout: Layout, lab: Lab, address: str) -> list[str]:
    """Returns the OpenSSH command that logs in to the SE at `address`, over the reverse path; append what to run."""
    options = [
        f"UserKnownHostsFile={layout.known_hosts}",
        "GlobalKnownHostsFile=/dev/null",
        "StrictHostKeyChecking=yes",
        "IdentitiesOnly=yes",
        "BatchMode=yes",
    ]
    return [
        "ssh",
        "-F",
        "none",
        "-i",
        str(layout.controller.controller_state / "id_se"),
        "-p",
        str(lab.controller.reverse_port),
        *(word for option in options for word in ("-o", option)),
        f"{lab.user}@{address}",
    ]


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(inner)}" for key, inner in value.items()) + "}"
    # JSON's scalars and lists of them are TOML's, except for an escaped slash, which msgspec doesn't write
    return msgspec.json.encode(value).decode()


def to_toml(sections: Mapping[str, Mapping[str, object]]) -> str:
    """Returns a settings file's text. Values are texts, numbers, booleans, lists or tables of them."""
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)
