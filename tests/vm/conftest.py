"""Images for virtual machines, built once: packages come from the builder's cache after the first time."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster_bundle import Cluster
from images import AGENT, image_builder
from qemu import need_qemu


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a cluster that isn't running."""
    need_qemu()
    assert (AGENT / "appliance").exists(), "the frozen agent is missing; run scripts/build"
    path = tmp_path_factory.mktemp("bundle") / "bundle.json"
    path.write_bytes(Cluster().bundle())
    return path


@pytest.fixture(scope="session")
def se_image(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    """A baked SE image, qcow2 and OVA beside it, on our own minimal system."""
    directory = tmp_path_factory.mktemp("image")
    formats = ["--output-format", "qcow2", "--output-format", "ova"]
    image_builder(
        "build", "--name", "se", "--bundle", bundle, "--seed-name", "edge-1", "--agent-directory", AGENT,
        "--output-directory", directory, *formats,
    )  # fmt: skip
    return directory / "se.qcow2"
