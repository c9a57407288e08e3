"""Our own system, baked twice in two folders, is the same to the byte; and its disks are what QEMU calls whole."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from images import AGENT, PROJECT, image_builder

pytestmark = [pytest.mark.slow, pytest.mark.frozen]

FORMATS = ("qcow2", "ova", "iso")


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.suffix != ".toml"
    }


def test_two_folders_same_bytes(tmp_path: Path, bundle: Path) -> None:
    told = []
    for name in ("one", "zwei Ordner, größer"):
        out = tmp_path / name
        out.mkdir()
        recipe = out / "edge.toml"
        terms = {
            "name": "edge", "bundle": str(bundle), "baked_at": 1_750_000_000, "seed_name": "edge-1",
            "agent.directory": str(AGENT), "output.directory": ".", "output.formats": list(FORMATS),
        }  # fmt: skip
        recipe.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in terms.items()))
        image_builder("build", recipe)
        told.append(digests(out))
    assert told[0] == told[1]
    assert {f"edge.{form}" for form in FORMATS} <= set(told[0])
    for form in FORMATS:
        said = json.loads(image_builder("verify", "--json", "--rebuild", recipe, out / f"edge.{form}").stdout)
        assert said["problems"] == []
    check = ["qemu-img", "check", str(out / "edge.qcow2")]
    assert "No errors" in subprocess.run(check, capture_output=True, text=True, timeout=120, check=True).stdout
    assert not list(PROJECT.glob(".image-builder-*"))
