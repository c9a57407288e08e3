"""The SE's seed: directory and ISO, what is believed and what is left out."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pycdlib
import pytest

from appliance.errors import SeedError
from appliance.paths import Paths
from appliance.pki.authority import Authority
from appliance.pki.image_key import create_image_key
from appliance.protocol import strict_json
from appliance.protocol.seed import SCHEMA, Hints, Seed
from appliance.protocol.trust import TRUST_TYPE, TrustDocument
from appliance.se import seed
from appliance.se.identity import IMAGE_DIRECTORY

NOW = int(time.time())
KEY_ID, KEY = create_image_key()


def files(cluster_id: str = "c-1", **changes: object) -> dict[str, bytes]:
    """The files of a whole seed by name."""
    authority = Authority.create(cluster_id, now=NOW)
    root = authority.certificate_pem
    document = TrustDocument(cluster_id=cluster_id, version=1, epoch=0, signed_at=NOW, roots=[root.decode()], nodes=[])
    terms = {
        "schema": SCHEMA, "cluster_id": cluster_id, "image_key_id": KEY_ID, "image_id": "i", "baked_at": NOW,
        "controllers": ["a.example", "b.example:1"], **changes,
    }  # fmt: skip
    return {
        "seed.json": strict_json.encode(Seed(**terms)),  # type: ignore[arg-type]
        "root-ca.pem": root,
        "trust.json": strict_json.encode(authority.sign(TRUST_TYPE, strict_json.encode(document))),
        "image-key.pem": KEY.pkcs8().reveal(),
    }


def write(directory: Path, content: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, raw in content.items():
        (directory / name).write_bytes(raw)
    return directory


def iso(path: Path, content: dict[str, bytes], *, rock_ridge: bool) -> Path:
    image = pycdlib.PyCdlib()
    image.new(vol_ident="CIDATA", joliet=None if rock_ridge else 3, rock_ridge="1.09" if rock_ridge else None)
    for number, (name, raw) in enumerate(content.items()):
        names = {"rr_name": name} if rock_ridge else {"joliet_path": f"/{name}"}
        image.add_fp(io.BytesIO(raw), len(raw), f"/F{number}.;1", **names)
    image.write(str(path))
    image.close()
    return path


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "root")


@pytest.fixture
def image(paths: Paths) -> Path:
    """Where an image carries its seed."""
    return paths.root / IMAGE_DIRECTORY


def test_a_directory(paths: Paths, image: Path) -> None:
    write(image, files(hints=Hints(name="n"), token="t"))
    loaded = seed.load(paths, setting="")
    assert loaded.seed.cluster_id == loaded.document.cluster_id == "c-1"
    assert loaded.controllers == ("a.example:8443", "b.example:1")
    assert loaded.image_key is not None
    assert loaded.image_key.public_line == KEY.public_line
    assert (loaded.token, loaded.hints.name, loaded.notes) == ("t", "n", ())


@pytest.mark.parametrize("rock_ridge", [True, False])
def test_an_iso_named_by_the_setting(paths: Paths, tmp_path: Path, rock_ridge: bool) -> None:
    path = iso(tmp_path / "seed.iso", files(), rock_ridge=rock_ridge)
    assert seed.load(paths, setting=str(path)).image_key is not None


def test_the_setting_goes_before_the_image(paths: Paths, image: Path, tmp_path: Path) -> None:
    write(image, files("c-image"))
    named = write(tmp_path / "named", files("c-named"))
    loaded = seed.load(paths, setting=str(named))
    assert loaded.document.cluster_id == "c-named"
    assert any("it is for cluster 'c-image'" in note for note in loaded.notes), "and takes nothing of the other"


def test_a_setting_without_trust_gives_addresses_to_the_image(paths: Paths, image: Path, tmp_path: Path) -> None:
    write(image, files())
    named = write(tmp_path / "named", {"seed.json": files(controllers=["c.example:2"])["seed.json"]})
    assert seed.load(paths, setting=str(named)).controllers == ("a.example:8443", "b.example:1", "c.example:2")


def test_a_disk_cannot_replace_trust(paths: Paths, image: Path) -> None:
    ours = files()
    write(image, ours)
    evil = files(controllers=["evil.example:1"], token="theirs")
    write(paths.root / "dev/disk/by-label/cidata", evil)
    loaded = seed.load(paths, setting="")
    assert loaded.document.roots == [ours["root-ca.pem"].decode()]
    assert loaded.controllers[-1] == "evil.example:1"
    assert loaded.token == "theirs"


def test_a_disk_that_is_no_iso_is_told(paths: Paths, image: Path) -> None:
    write(image, files())
    write(paths.root / "dev/disk/by-label", {"cidata": b"FAT" * 100})
    assert any("can't be read as an ISO image" in note for note in seed.load(paths, setting="").notes)


def test_what_a_disk_gets_wrong_is_left_out(paths: Paths, image: Path) -> None:
    write(image, files())
    disk = paths.root / "dev/disk/by-label/cidata"
    write(disk, {"seed.json": b"{"})
    assert any("left out" in note for note in seed.load(paths, setting="").notes)
    write(disk, {"seed.json": files(controllers=["a:b:c:d", "[x"], hints=Hints(name="-bad-"))["seed.json"]})
    loaded = seed.load(paths, setting="")
    assert loaded.hints.name == ""
    assert len(loaded.notes) >= 2


@pytest.mark.parametrize("missing", ["seed.json", "root-ca.pem"])
def test_an_incomplete_seed(paths: Paths, image: Path, missing: str) -> None:
    content = files()
    del content[missing]
    write(image, content)
    with pytest.raises(SeedError, match=missing):
        seed.load(paths, setting="")


def test_no_seed_says_where_it_looked(paths: Paths) -> None:
    with pytest.raises(SeedError, match="etc/appliance/seed"):
        seed.load(paths, setting="")
    with pytest.raises(SeedError, match="is not there"):
        seed.load(paths, setting="/nonexistent/seed")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("root-ca.pem", files()["root-ca.pem"], "doesn't hold"),
        ("root-ca.pem", b"\xff", "doesn't hold"),
        ("trust.json", b"[]", "doesn't hold"),
        ("image-key.pem", b"no key", "doesn't hold"),
        ("image-key.pem", create_image_key()[1].pkcs8().reveal(), "the image key of the seed is"),
        ("seed.json", files("c-2")["seed.json"], "seed.json is of cluster 'c-2'"),
        ("seed.json", files(schema=9)["seed.json"], "schema 9"),
        ("seed.json", json.dumps({"schema": 1}).encode(), "doesn't hold"),
        ("seed.json", b" " * 100_000, "seed.json"),
    ],
)
def test_a_spoilt_seed_is_refused(paths: Paths, image: Path, name: str, content: bytes, told: str) -> None:
    write(image, {**files(), name: content})
    with pytest.raises(Exception, match=told):
        seed.load(paths, setting="")


def test_a_scrubbed_image_key_counts_as_none(paths: Paths, image: Path) -> None:
    write(image, {**files(), "image-key.pem": b"\0" * 100})
    assert seed.load(paths, setting="").image_key is None


def test_a_file_on_an_iso_is_bounded(paths: Paths, tmp_path: Path) -> None:
    path = iso(tmp_path / "seed.iso", {**files(), "seed.json": b" " * 100_000}, rock_ridge=True)
    with pytest.raises(SeedError, match="too large"):
        seed.load(paths, setting=str(path))


def test_what_is_given_on_the_console_goes_before_setting_and_image(paths: Paths, image: Path, tmp_path: Path) -> None:
    given = files("c-given")
    write(image, files("c-image", controllers=["image:1"]))
    named = str(write(tmp_path / "named", files("c-named", controllers=["named:1"])))
    loaded = seed.load(paths, setting=named, given=given)
    assert loaded.document.cluster_id == "c-given"
    # Nor are those of other clusters hints.
    assert loaded.controllers == ("a.example:8443", "b.example:1")
