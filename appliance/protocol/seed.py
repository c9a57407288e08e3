"""Stage seed: what an image or a per-VM disk carries.

A seed is a NoCloud folder or ISO (label CIDATA) with these files. `user-data` and `meta-data` are for cloud-init; the
rest is read by our own code only:

    user-data   meta-data   seed.json   root-ca.pem   trust.json   image-key.pem (0600)

A *bundle* is the same trust material as one file, which the controller writes (`image-key create`) and `image-
builder` reads. A per-VM seed disk without `trust.json` may add hints only; it can never replace trust anchors
(FACTS, trap 3).
"""

from __future__ import annotations

import re

import msgspec

from appliance.errors import SeedError
from appliance.protocol.trust import Envelope

SEED_FILE = "seed.json"
ROOT_CA_FILE = "root-ca.pem"
TRUST_FILE = "trust.json"
IMAGE_KEY_FILE = "image-key.pem"
USER_DATA_FILE = "user-data"
META_DATA_FILE = "meta-data"
NETWORK_CONFIG_FILE = "network-config"
ISO_LABEL = "CIDATA"
DEFAULT_HOSTNAME = "appliance-se"
"""In the meta-data of a seed that names no host; on our own system each VM makes a name of its own of it."""

IMAGE_DIRECTORY = "etc/appliance/seed"
"""Below the root: where an image carries its seed, or first boot put it."""
WISHES_DIRECTORY = "etc/appliance/wishes"
"""Below the root: a `seed.json` of what this VM's own disks and its hypervisor wish. Never an anchor of trust."""

OWN_LABEL = "APPL-SEED"
"""FAT label and GPT name of the seed partition on our own minimal system."""
OWN_TYPE = "5EEDA991-1A0C-4E55-9C1B-0A5EED0A9910"
"""GPT type of that partition; nobody else makes one of it, so nothing mounts it by itself."""

MAX_SEED_BYTES = 64 * 1024
MAX_BUNDLE_BYTES = 512 * 1024
MAX_LABELS = 16

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"[ -~]{0,63}")


class Hints(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Self-asserted wishes of a VM; they decide nothing."""

    name: str = ""
    labels: dict[str, str] = {}


class Seed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`seed.json`."""

    schema: int
    cluster_id: str
    image_key_id: str
    image_id: str
    baked_at: int
    """Seconds since 1970: the floor under any clock this VM will believe."""
    controllers: list[str]
    """`host:port` of HTTPS enrollment, tried in this order beside those of the trust document."""
    token: str = ""
    hints: Hints = Hints()


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a pipeline needs to bake: public trust plus one image key. Holds no CA or node private key, ever."""

    schema: int
    cluster_id: str
    root_ca: str
    trust: Envelope
    image_key_id: str
    image_key: str
    """PKCS #8 PEM, Ed25519."""
    image_key_expires_at: int = 0
    """Seconds since 1970, so that a builder without a way to the controller can refuse in time; 0: not told."""
    controllers: list[str]


SCHEMA = 1


def check_hints(hints: Hints) -> list[str]:
    """Returns what is wrong with `hints`, one sentence each; empty where they hold."""
    problems = []
    if hints.name and not _NAME.fullmatch(hints.name):
        problems.append(f"name {hints.name!r}: letters, digits, '.', '_', '-', at most 63, expected")
    if len(hints.labels) > MAX_LABELS:
        problems.append(f"{len(hints.labels)} labels, at most {MAX_LABELS} are kept")
    for key, value in hints.labels.items():
        if not _NAME.fullmatch(key):
            problems.append(f"label {key!r}: letters, digits, '.', '_', '-', at most 63, expected")
        if not _LABEL_VALUE.fullmatch(value):
            problems.append(f"value of label {key!r}: at most 63 printable ASCII characters expected")
    return problems


def check_schema(schema: int) -> None:
    """Refuses a seed or bundle of a version this program doesn't know."""
    if schema != SCHEMA:
        raise SeedError(
            f"seed schema {schema}, this program reads {SCHEMA}",
            hint="bake the seed with an image-builder of the agent's version",
        )
