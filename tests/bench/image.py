"""How long baking takes: a seed's ISO, our own system, a seed into its 2 GB disk, and an OVA of that."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from appliance.paths import Paths
from appliance.runtime import child
from bench.processes import BenchError
from bench.report import Report, Row
from bench.stand import PROJECT, Options, Stand

ISOS = 7
DISKS = 3


def run(stand: Stand, options: Options) -> Report:
    """Measures all four; packages are fetched anew for `image.base_s`."""
    agent = stand.directory_form.parent
    if not stand.directory_form.is_file():
        raise BenchError(f"there is no {stand.directory_form}, which goes into images: run scripts/build")
    builder = [str(PROJECT / "dist/image-builder/image-builder")] if stand.frozen else _SOURCES
    notes = [f"image-builder is {'frozen, directory form' if stand.frozen else 'run from its sources'}"]
    with stand.place() as place:
        stand.command("--root", str(place / "c"), "controller", "init", "--address", "127.0.0.1", "--date", "now")
        (bundle,) = (Paths(place / "c").controller_state / "bundles").glob("*.json")
        isos = [
            _seconds([*builder, "seed", "--bundle", str(bundle), "--iso", str(place / f"{number}.iso")])
            for number in range(ISOS)
        ]
        stand.say("installing our own system anew")
        base = place / "base.qcow2"
        cache = ["--cache", str(place / "cache")]
        base_s = _seconds(
            [*builder, "base", "--fresh", *cache, "--role", "se", "--agent", str(agent), "--out", str(base)]
        )
        common = [*builder, "build", *cache, "--bundle", str(bundle), "--agent-directory", str(agent)]
        common += ["--base-image", str(base), "--output-directory", str(place)]
        stand.say("baking disks")
        disks = [_seconds([*common, "--name", f"disk-{number}"]) for number in range(DISKS)]
        stand.say("baking an OVA")
        ova_s = _seconds([*common, "--name", "ova", "--output-format", "ova"])
        peer_s = _virt_customize(place, place / "disk-0.qcow2", bundle, notes)
    return Report(
        bench="image",
        rows=[
            Row(name="image.seed_iso_s", value=_median(isos), unit="s", goal=0.5, better="low"),
            Row(
                name="image.qcow2_s", value=_median(disks), unit="s", goal=5.0, better="low",
                peer="virt-customize --upload of one file", peer_value=peer_s,
            ),
            Row(name="image.ova_s", value=round(ova_s, 2), unit="s", goal=60.0, better="low"),
            Row(name="image.base_s", value=round(base_s, 1), unit="s", goal=120.0, better="low"),
        ],
        notes=notes,
    )  # fmt: skip


_SOURCES = [sys.executable, "-m", "image_builder"]


def _seconds(command: Sequence[str]) -> float:
    began = time.perf_counter()
    child.run(command, timeout_s=1800)
    return time.perf_counter() - began


def _median(times: Sequence[float]) -> float:
    return round(statistics.median(times), 3)


def _virt_customize(place: Path, image: Path, file: Path, notes: list[str]) -> float | None:
    """Uploads one small file into a copy of the same image, as others bake; None where it doesn't run."""
    if child.find_program("virt-customize") is None:
        notes.append("virt-customize isn't installed (libguestfs-tools)")
        return None
    copy = place / "peer.qcow2"
    shutil.copyfile(image, copy)
    line = ["virt-customize", "-q", "-a", str(copy), "--no-network", "--upload", f"{file}:/etc/uploaded"]
    began = time.perf_counter()
    done = child.run(line, timeout_s=600, check=False, env={"LIBGUESTFS_BACKEND": "direct"})
    if done.returncode != 0:
        notes.append(f"virt-customize doesn't run here: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return round(time.perf_counter() - began, 2)
