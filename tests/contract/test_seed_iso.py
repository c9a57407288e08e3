"""A seed's ISO as other programs read it: label, names in all three name spaces, modes, contents."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pycdlib
import pytest

from image_builder import iso
from image_builder.seed import SeedFile

AT = 1_700_000_000
FILES = [
    SeedFile("user-data", b"#cloud-config\n", 0o644),
    SeedFile("meta-data", b"instance-id: x\n", 0o644),
    SeedFile("seed.json", b'{"schema":1}\n', 0o644),
    SeedFile("root-ca.pem", b"root\n" * 1000, 0o644),
    SeedFile("trust.json", b"{}\n", 0o644),
    SeedFile("image-key.pem", b"key\n", 0o600),
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "seed.iso"
    path.write_bytes(iso.render(FILES, at=AT))
    return path


def output_of(*arguments: str | Path) -> str:
    if shutil.which(str(arguments[0])) is None:
        pytest.skip(f"{arguments[0]} is not installed")
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60).stdout


def test_pycdlib_reads_it_in_both_name_spaces(image: Path) -> None:
    reader = pycdlib.PyCdlib()
    reader.open(str(image))
    try:
        assert reader.pvd.volume_identifier.decode().strip() == "CIDATA"
        for file in FILES:
            for form in ("rr_path", "joliet_path"):
                content = io.BytesIO()
                reader.get_file_from_iso_fp(content, **{form: f"/{file.name}"})
                assert content.getvalue() == file.content, (file.name, form)
    finally:
        reader.close()


def test_the_label_stands_where_blkid_looks(image: Path) -> None:
    # ECMA-119 8.4: the primary volume descriptor is sector 16, its volume identifier bytes 40 to 71
    descriptor = image.read_bytes()[16 * 2048 : 17 * 2048]
    assert descriptor[:6] == b"\x01CD001"
    assert descriptor[40:72].rstrip() == b"CIDATA"
    if shutil.which("blkid"):
        assert output_of("blkid", "-p", "-o", "value", "-s", "LABEL", image).strip() == "CIDATA"


def test_bsdtar_lists_and_reads_it(image: Path) -> None:
    listed = output_of("bsdtar", "-tvf", image).splitlines()
    modes = {line.split()[-1].removeprefix("./"): line.split()[0] for line in listed}
    for file in FILES:
        assert modes[file.name] == stat.filemode(stat.S_IFREG | file.mode)
        assert output_of("bsdtar", "-xOf", image, file.name).encode() == file.content


def test_isoinfo_reads_rock_ridge_and_joliet(image: Path) -> None:
    assert "Volume id: CIDATA" in output_of("isoinfo", "-d", "-i", image)
    for names in ("-R", "-J"):
        listed = output_of("isoinfo", names, "-f", "-i", image).split()
        assert sorted(listed) == sorted(f"/{file.name}" for file in FILES)
        assert output_of("isoinfo", names, "-x", "/root-ca.pem", "-i", image).encode() == FILES[3].content


def test_xorriso_finds_nothing_to_complain_of(image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output_of("xorriso", "-osirrox", "on", "-abort_on", "WARNING", "-indev", image, "-extract", "/", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {file.name: file.content for file in FILES}


def test_the_kernel_mounts_it(image: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    point = tmp_path / "mnt"
    point.mkdir()
    mounted = subprocess.run(
        ["mount", "-o", "loop,ro", image, point], check=False, capture_output=True, text=True, timeout=60
    )
    if mounted.returncode:
        pytest.skip(f"no loop mount here: {mounted.stderr.strip()}")
    try:
        assert {path.name: path.read_bytes() for path in point.iterdir()} == {file.name: file.content for file in FILES}
        assert stat.S_IMODE((point / "image-key.pem").stat().st_mode) == 0o600
        assert int((point / "user-data").stat().st_mtime) == AT
    finally:
        subprocess.run(["umount", point], check=True, timeout=60)
