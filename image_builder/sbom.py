"""What is in an image, for people (one package a line) and for scanners (CycloneDX 1.5, JSON). Pure.

Dates and serial numbers follow from the image, so that the same image gets the same bill.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from appliance import __version__
from image_builder.debian import Package

_NAMESPACE = uuid.UUID("5eeda991-1a0c-4e55-9c1b-0a5eed0a9912")


def manifest(packages: Sequence[Package], *, agent_version: str) -> bytes:
    """Returns the list for people: name, version, architecture, tab between."""
    lines = [f"{package.name}\t{package.version}\t{package.architecture}" for package in packages]
    if agent_version:
        lines.append(f"appliance\t{agent_version}\tamd64")
    return ("\n".join(lines) + "\n").encode()


def cyclonedx(
    packages: Sequence[Package],
    *,
    name: str,
    digest: str,
    epoch: int,
    agent_version: str,
    agent_digest: str,
    foreign: dict[str, str] | None = None,
) -> bytes:
    """Returns the bill of materials (cyclonedx.org, 1.5).

    Args:
        packages: Debian packages of the system.
        name: of the image.
        digest: of the image's inputs; the serial number follows from it.
        epoch: its date, seconds since 1970.
        agent_version: empty where there is no agent.
        agent_digest: SHA-256 over its files, hex.
        foreign: file name to SHA-256 of a system that we didn't make and whose parts we don't know.
    """
    components: list[dict[str, Any]] = [
        {
            "type": "library",
            "bom-ref": f"deb:{package.name}:{package.architecture}",
            "name": package.name,
            "version": package.version,
            "purl": f"pkg:deb/debian/{quote(package.name)}@{quote(package.version, safe='')}"
            f"?arch={package.architecture}&distro=debian-12",
            "properties": [{"name": "debian:source", "value": package.source}],
        }
        for package in packages
    ]
    if agent_version:
        components.append(
            {
                "type": "application",
                "bom-ref": "appliance",
                "name": "appliance",
                "version": agent_version,
                "properties": [{"name": "appliance:tree-sha256", "value": agent_digest}],
            }
        )
    components += [
        {
            "type": "operating-system",
            "bom-ref": f"image:{file}",
            "name": file,
            "hashes": [{"alg": "SHA-256", "content": sha256}],
        }
        for file, sha256 in (foreign or {}).items()
    ]
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest)}",
        "version": 1,
        "metadata": {
            "timestamp": dt.datetime.fromtimestamp(epoch, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tools": {"components": [{"type": "application", "name": "image-builder", "version": __version__}]},
            "component": {"type": "operating-system", "bom-ref": "image", "name": name},
        },
        "components": components,
    }
    return (json.dumps(bill, indent=1) + "\n").encode()
