"""Stage seed, the record of a built image: `NAME.image.json`, which `image-builder build` writes beside what it made.

It says what was baked, by which image key, and the SHA-256 of every file, and is how a controller learns of images that
were built where it can't be reached: `appliance image add NAME.image.json`. All outputs of one build are one image, and
carry its id in their seeds (`image_id`, for a seed alone one of `also`), which an SE names when it enrolls.

It isn't signed: the one private key that a builder has is the image key, which everybody counts as having who can read
an image. What speaks for a record is the operator who adds it.
"""

from __future__ import annotations

import re

import msgspec

REPORT_SCHEMA = 1
MAX_REPORT_BYTES = 64 * 1024
MAX_FILES = 32
MAX_IDS = 8
MAX_CHARS = 200
"""Of a name or a text."""

_IMAGE_ID = re.compile(r"seed-[0-9a-f]{16}")
_IMAGE_KEY_ID = re.compile(r"ik-[0-9a-f]{12}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ImageReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one build made. Times are seconds since 1970."""

    schema: int
    image_id: str
    name: str
    role: str
    """`se` or `controller`; the latter has no seed, so no cluster and no image key."""
    cluster_id: str
    image_key_id: str
    baked_at: int
    controllers: list[str]
    agent_version: str
    agent_digest: str
    system: str
    """`minimal:<digest>` or `sha256:<digest>` of the foreign file."""
    disk_bytes: int
    files: dict[str, str]
    """File name to SHA-256."""
    recipe_digest: str = ""
    """SHA-256 over what was wished for, without the names of files and folders."""
    also: list[str] = []
    """Ids that some of its files carry instead: that of a seed alone, where the disk's is for a foreign system."""

    @property
    def ids(self) -> list[str]:
        """All ids that an SE of this image may name."""
        return [self.image_id, *self.also]


def is_image_id(text: str) -> bool:
    """Whether `text` is an image id as `image-builder` makes them."""
    return _IMAGE_ID.fullmatch(text) is not None


def check_report(report: ImageReport) -> list[str]:
    """Returns what keeps a report from being a controller's record of an image, one sentence each."""
    if report.schema != REPORT_SCHEMA:
        return [f"schema {report.schema}, this controller reads {REPORT_SCHEMA}: upgrade the older of the two"]
    if report.role != "se":
        return [f"it is an image for the role {report.role[:MAX_CHARS]!r}: only SEs enroll by their image"]
    problems = []
    if not all(is_image_id(one) for one in report.ids) or len(set(report.ids)) > MAX_IDS:
        problems.append(f"image ids {', '.join(report.ids)[:MAX_CHARS]!r}: 1 to {MAX_IDS} of the form seed-… expected")
    if not _IMAGE_KEY_ID.fullmatch(report.image_key_id):
        problems.append(f"image key id {report.image_key_id[:MAX_CHARS]!r}: ik- and 12 hex digits expected")
    if not 1 <= len(report.files) <= MAX_FILES or not all(_SHA256.fullmatch(one) for one in report.files.values()):
        problems.append(f"{len(report.files)} files: 1 to {MAX_FILES}, each with its SHA-256 in hex, expected")
    digests = (report.recipe_digest, report.agent_digest)
    texts = (*digests, report.name, report.agent_version, report.system, *report.files)
    if not all(0 <= len(text) <= MAX_CHARS and text.isprintable() for text in texts) or not report.name:
        problems.append(f"a name or text is empty, longer than {MAX_CHARS} characters, or can't be printed")
    if not 0 < report.baked_at < 1 << 40:
        problems.append(f"baked_at {report.baked_at}: seconds since 1970 expected")
    return problems
