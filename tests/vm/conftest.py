"""Images for virtual machines, built once: packages come from the builder's cache after the first time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster_bundle import Cluster
from qemu import need_qemu

PROJECT = Path(__file__).resolve().parents[2]
AGENT = PROJECT / "dist/appliance"


def image_builder(*arguments: str | Path, timeout_s: float = 1200, check: bool = True) -> Any:
    """Runs `image-builder` of these sources."""
    line = [sys.executable, "-m", "image_builder", *map(str, arguments)]
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=timeout_s, cwd=PROJECT, stdin=subprocess.DEVNULL
    )
    assert not check or done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done


@pytest.fixture(scope="session")
def se_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baked SE image, qcow2 and OVA beside it, on our own minimal system."""
    need_qemu()
    assert (AGENT / "appliance").exists(), "the frozen agent is missing; run scripts/build"
    directory = tmp_path_factory.mktemp("image")
    bundle = directory / "bundle.json"
    bundle.write_bytes(Cluster().bundle())
    formats = ["--output-format", "qcow2", "--output-format", "ova"]
    image_builder(
        "build", "--name", "se", "--bundle", bundle, "--seed-name", "edge-1", "--agent-directory", AGENT,
        "--output-directory", directory, *formats,
    )  # fmt: skip
    return directory / "se.qcow2"
