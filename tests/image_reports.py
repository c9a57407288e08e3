"""Reports of built images, for tests."""

from __future__ import annotations

from typing import Any

from appliance.protocol.image import REPORT_SCHEMA, ImageReport


def report(**changes: Any) -> ImageReport:
    """A report that holds."""
    fields: dict[str, Any] = {
        "schema": REPORT_SCHEMA,
        "image_id": "seed-0123456789abcdef",
        "name": "edge",
        "role": "se",
        "cluster_id": "c-1",
        "image_key_id": "ik-0123456789ab",
        "baked_at": 1_700_000_000,
        "controllers": ["192.0.2.1:8443"],
        "agent_version": "0.1.0",
        "agent_digest": "ab" * 32,
        "system": "minimal:" + "cd" * 32,
        "disk_bytes": 2 << 30,
        "files": {"edge.qcow2": "11" * 32},
        "recipe_digest": "ef" * 32,
    }
    return ImageReport(**{**fields, **changes})
