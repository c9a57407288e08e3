"""Partition tables, FAT and ISO as our own readers see them, beside the tools that made them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import machine_disk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_disk import MIB, SEED_BYTES, SEED_START

from appliance.errors import SeedError
from appliance.machine import gpt, media
from appliance.machine.disk import Disk, root_disk
from appliance.machine.fat import Fat
from appliance.machine.iso import Iso
from appliance.protocol import seed as protocol
from image_builder import fat, iso
from image_builder.seed import SeedFile

CONTENT = {"seed.json": b"{}", "image-key.pem": b"k" * 5000, "empty": b""}


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return machine_disk.make(tmp_path / "disk", CONTENT)


def table_of(path: Path) -> list[tuple[int, int]]:
    """Start and length of each partition, in sectors, as sfdisk reads them."""
    told = subprocess.run(["sfdisk", "--json", str(path)], check=True, capture_output=True, timeout=60).stdout
    return [(one["start"], one["size"]) for one in json.loads(told)["partitiontable"]["partitions"]]


def verify(path: Path) -> None:
    told = subprocess.run(["sgdisk", "--verify", str(path)], capture_output=True, text=True, timeout=60, check=True)
    assert "No problems found" in told.stdout, told.stdout


def test_the_seed_partition_is_found_by_type_and_name(disk: Disk) -> None:
    found = disk.seed_partition()
    assert found is not None
    assert (found.number, found.start * 512, found.sectors * 512) == (3, SEED_START, SEED_BYTES)
    assert disk.read_seed(found, ("seed.json", "image-key.pem", "empty", "other")) == CONTENT


@pytest.mark.parametrize(
    ("type", "name"), [(protocol.OWN_TYPE, "CIDATA"), ("EBD0A0A2-B9E5-4433-87C0-68B6B72699C7", protocol.OWN_LABEL)]
)
def test_neither_type_nor_name_alone_makes_it_ours(tmp_path: Path, type: str, name: str) -> None:  # noqa: A002
    assert machine_disk.make(tmp_path / "disk", CONTENT, type=type, name=name).seed_partition() is None


def test_two_of_them_are_none(tmp_path: Path) -> None:
    disk = machine_disk.make(tmp_path / "disk", CONTENT)
    words = ["--delete=1", "--new=1:2048:4095", f"--typecode=1:{protocol.OWN_TYPE}"]
    subprocess.run(
        ["sgdisk", *words, f"--change-name=1:{protocol.OWN_LABEL}", str(disk.path)], check=True, capture_output=True,
        timeout=60,
    )  # fmt: skip
    assert disk.seed_partition() is None


def test_removing_gives_the_room_to_the_root(disk: Disk) -> None:
    disk.remove(3)
    assert table_of(disk.path) == [(2048, 2048), (4096, (23 - 2) * MIB // 512)]
    verify(disk.path)
    assert disk.seed_partition() is None
    disk.remove(3)  # again, as after a cut
    verify(disk.path)


def test_a_disk_that_was_enlarged_is_used_to_its_end(disk: Disk) -> None:
    os.truncate(disk.path, 40 * MIB)
    disk.remove(3)
    assert table_of(disk.path)[1] == (4096, (39 - 2) * MIB // 512)
    verify(disk.path)


def test_a_partition_behind_the_root_ends_its_growth(disk: Disk) -> None:
    before = table_of(disk.path)
    disk.remove(99)
    assert table_of(disk.path) == [before[0], (4096, 17 * MIB // 512), before[2]]


def test_only_a_page_of_the_first_copy_changes(disk: Disk) -> None:
    before = disk.path.read_bytes()
    disk.remove(3)
    after = disk.path.read_bytes()
    changed = [at for at in range(0, 34 * 512, 512) if before[at : at + 512] != after[at : at + 512]]
    assert changed == [512, 1024]


@pytest.mark.parametrize("torn", [range(1, 2), range(2, 3), range(1, 34)])
def test_a_torn_first_copy_leaves_the_second(disk: Disk, torn: range) -> None:
    with disk.path.open("r+b") as stream:
        for sector in torn:
            stream.seek(sector * 512 + 9)
            stream.write(b"\xa5" * 32)
    found = disk.seed_partition()
    assert found is not None
    disk.remove(found.number)
    verify(disk.path)


def test_no_table_is_told(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 * MIB))
    with pytest.raises(SeedError, match="no partition table"):
        Disk(path, root=2, root_device=None).seed_partition()


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=34 * 512))
def test_any_bytes_are_no_table_or_one(content: bytes) -> None:
    with pytest.raises(SeedError):
        gpt.read(content, content[::-1], sectors=100_000)


def test_wiping_leaves_zeros_and_nothing_else_changes(disk: Disk) -> None:
    before = disk.path.read_bytes()
    found = disk.seed_partition()
    assert found is not None
    assert b"kkkk" in before
    disk.wipe(found)
    after = disk.path.read_bytes()
    assert after[SEED_START : SEED_START + SEED_BYTES] == bytes(SEED_BYTES)
    assert after[:SEED_START] == before[:SEED_START]
    assert after[SEED_START + SEED_BYTES :] == before[SEED_START + SEED_BYTES :]
    with pytest.raises(SeedError, match="no FAT"):
        disk.read_seed(found, ("seed.json",))


def test_the_root_is_found_by_its_device_number(tmp_path: Path) -> None:
    sys = tmp_path / "sys"
    partition = sys / "devices/pci/virtio0/block/vda/vda2"
    partition.mkdir(parents=True)
    (partition / "partition").write_text("2\n")
    (sys / "dev/block").mkdir(parents=True)
    (sys / "dev/block/254:2").symlink_to(partition)
    (sys / "dev/block/253:0").symlink_to(partition.parent)
    found = root_disk(sys=sys, dev=tmp_path, device=os.makedev(254, 2))
    assert found is not None
    assert found.path == tmp_path / "vda"
    assert root_disk(sys=sys, dev=tmp_path, device=os.makedev(253, 0)) is None
    assert root_disk(sys=sys, dev=tmp_path, device=os.makedev(0, 40)) is None


# --- file systems ----------------------------------------------------------------------------------------------------


def fat_image(path: Path, files: dict[str, bytes], *, size: int, fat32: bool = False) -> bytes:
    sources = {}
    for number, (name, content) in enumerate(files.items()):
        sources[name] = path.with_name(f"{path.name}.{number}")
        sources[name].write_bytes(content)
    fat.make(path, sources, label="CIDATA", size_bytes=size, serial=1, epoch=1, first_sector=0, fat32=fat32)
    return path.read_bytes()


def reader(content: bytes) -> object:
    return lambda offset, length: content[offset : offset + length] if offset >= 0 and length >= 0 else b""


@pytest.mark.parametrize(("size", "fat32"), [(4 * MIB, False), (33 * MIB, False), (70 * MIB, True)])
def test_fat_of_each_width(tmp_path: Path, size: int, fat32: bool) -> None:
    large = os.urandom(100_000)
    files = {
        "image-key.pem": b"key",
        "a file whose name is long, in two parts": large,
        "SHORT.TXT": b"s",
        "x/inner": b"i",
    }
    found = Fat(reader(fat_image(tmp_path / "fat", files, size=size, fat32=fat32)))  # type: ignore[arg-type]
    assert found.label == "CIDATA"
    wanted = [*files, "inner", "x"]
    read = found.files(wanted, max_bytes=200_000)
    assert read == {name: content for name, content in files.items() if "/" not in name}
    assert found.files(["IMAGE-key.PEM"], max_bytes=10) == {"IMAGE-key.PEM": b"key"}
    with pytest.raises(SeedError, match="at most 10 are read"):
        found.files(["SHORT.TXT", "a file whose name is long, in two parts"], max_bytes=10)


def test_a_chain_that_runs_in_a_circle_ends(tmp_path: Path) -> None:
    content = bytearray(fat_image(tmp_path / "fat", {"big": bytes(100_000)}, size=4 * MIB))
    reserved = int.from_bytes(content[14:16], "little") * 512
    content[reserved + 3 : reserved + 3 + 60] = b"\x02\x20\x00" * 20  # clusters 2 and 3 lead to cluster 2
    assert len(Fat(reader(bytes(content))).files(["big"], max_bytes=200_000)["big"]) == 100_000  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_fat_and_iso_are_seed_errors_or_read(data: st.DataObject) -> None:
    for whole, kind in ((_FAT, Fat), (_ISO, Iso)):
        content = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 8))):
            at = data.draw(st.sampled_from([*range(64), *range(32768, 33000), *range(512, 600)]))
            content[at % len(content)] = data.draw(st.integers(0, 255))
        with contextlib.suppress(SeedError):
            kind(reader(bytes(content))).files(["seed.json"], max_bytes=4096)  # type: ignore[arg-type]


SEED_FILES = [SeedFile("seed.json", b'{"a": 1}', 0o644), SeedFile("network-config", b"version: 2\n", 0o644)]
_ISO = iso.render(SEED_FILES, at=1_700_000_000)


def _small_fat() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return fat_image(Path(folder) / "fat", {"seed.json": b"x" * 3000}, size=MIB)


_FAT = _small_fat()


def test_an_iso_of_ours_is_read() -> None:
    found = Iso(reader(_ISO))  # type: ignore[arg-type]
    assert found.label == "CIDATA"
    assert found.files(["seed.json", "network-config", "other"], max_bytes=100) == {
        one.name: one.content for one in SEED_FILES
    }
    with pytest.raises(SeedError, match="at most 4 are read"):
        found.files(["seed.json"], max_bytes=4)


@pytest.mark.skipif(shutil.which("xorriso") is None, reason="xorriso is not installed")
@pytest.mark.parametrize("names", [["-r"], ["-J"], []])
def test_an_iso_of_another_tool_is_read(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "ovf-env.xml").write_text("<Environment/>")
    (folder / "deeper").mkdir()
    (folder / "deeper/seed.json").write_text("no")
    made = tmp_path / "made.iso"
    # `mkisofs` calls a name with a minus `OVF_ENV.XML` where it writes neither Rock Ridge nor Joliet.
    words = ["xorriso", "-as", "mkisofs", "-quiet", "-V", "OVF ENV", *names, "-o", str(made), str(folder)]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    found = Iso(reader(made.read_bytes()))  # type: ignore[arg-type]
    assert found.label == "OVF ENV"
    assert found.files(["ovf-env.xml", "seed.json"], max_bytes=100) == {"ovf-env.xml": b"<Environment/>"}


def test_attached_disks_are_looked_through_and_the_roots_is_not(tmp_path: Path) -> None:
    sys, dev = tmp_path / "sys", tmp_path / "dev"
    dev.mkdir()
    for name in ("vda", "vdb", "sr0", "sr1", "loop0"):
        (sys / "block" / name).mkdir(parents=True)
    (sys / "block/vdb/vdb1").mkdir()
    (sys / "block/vdb/vdb1/partition").write_text("1")
    for name, content in {"vda": _ISO, "vdb": bytes(MIB), "vdb1": _FAT, "sr0": _ISO, "loop0": _ISO}.items():
        (dev / name).write_bytes(content)
    notes: list[str] = []
    found = media.attached(["seed.json"], max_bytes=4096, but="vda", notes=notes, sys=sys, dev=dev)
    assert [(one.source, one.label, len(one.files["seed.json"])) for one in found] == [
        (f"{dev}/sr0", "CIDATA", 8), (f"{dev}/vdb1", "CIDATA", 3000),
    ]  # fmt: skip
    assert notes == []
    media.attached(["seed.json"], max_bytes=10, but="vda", notes=notes, sys=sys, dev=dev)
    assert notes == [f"{dev}/vdb1 left out: seed.json has 3000 bytes, at most 10 are read"]
