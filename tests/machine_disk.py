"""A disk like those that the builder writes, as a plain file: three partitions, the last one a seed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from appliance.machine.disk import Disk
from appliance.protocol import seed as protocol
from image_builder import fat

MIB = 1 << 20
DISK_BYTES = 24 * MIB
SEED_START = 19 * MIB
SEED_BYTES = 4 * MIB
ROOT_START = 2 * MIB

USER_DATA = (
    b'#cloud-config\nhostname: "edge-1"\npreserve_hostname: false\nruncmd: [["appliance", "mode", "set", "se"]]\n'
)
META_DATA = b'instance-id: "seed-1"\nlocal-hostname: "edge-1"\n'


def make(
    path: Path,
    files: dict[str, bytes],
    *,
    type: str = protocol.OWN_TYPE,  # noqa: A002 - GPT's own word
    name: str = protocol.OWN_LABEL,
    fat32: bool = False,
) -> Disk:
    """Makes the disk; its seed partition holds `files`."""
    with path.open("wb") as stream:
        stream.truncate(DISK_BYTES)
    sector = 512
    spans = [(MIB, 1), (ROOT_START, 17), (SEED_START, 4)]
    words = []
    for number, (start, mib) in enumerate(spans, 1):
        words.append(f"--new={number}:{start // sector}:{(start + mib * MIB) // sector - 1}")
    words += [f"--typecode=3:{type}", f"--change-name=3:{name}", "--change-name=2:APPLIANCE-ROOT"]
    subprocess.run(["sgdisk", *words, str(path)], check=True, capture_output=True, timeout=60)
    folder = path.with_name(f"{path.name}.files")
    folder.mkdir()
    sources = {}
    for file, content in files.items():
        sources[file] = folder / file
        sources[file].write_bytes(content)
    image = path.with_name(f"{path.name}.fat")
    fat.make(image, sources, label=name[:11], size_bytes=SEED_BYTES, serial=1, epoch=1, first_sector=0, fat32=fat32)
    with path.open("r+b") as stream:
        stream.seek(SEED_START)
        stream.write(image.read_bytes())
    return Disk(path, root=2, root_device=None)
