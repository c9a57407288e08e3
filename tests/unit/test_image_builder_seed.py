"""What goes into a seed, what never does, and that all mistakes are told at once."""

from __future__ import annotations

import base64
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cluster_bundle import NOW, Cluster
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from appliance.errors import SeedError, StorageError
from appliance.pki import image_key, ssh_keys
from appliance.pki.authority import Authority
from appliance.pki.identity import Identity
from appliance.pki.trust import verify_trust
from appliance.protocol import strict_json, token
from appliance.protocol.seed import Seed
from appliance.protocol.trust import TRUST_TYPE, Envelope
from image_builder import cli, iso, output
from image_builder.seed import BakedSeed, Wishes, bake

ALL_FILES = ["user-data", "meta-data", "seed.json", "root-ca.pem", "trust.json", "image-key.pem"]


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return Cluster()


def ca_key_pem() -> str:
    return (
        ec.generate_private_key(ec.SECP256R1())
        .private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        .decode()
    )


def baked(raw: bytes, **wishes: Any) -> BakedSeed:
    return bake(raw, Wishes(**wishes), baked_at=NOW, now=NOW)


def refused(raw: bytes | None, **wishes: Any) -> str:
    with pytest.raises(SeedError) as caught:
        bake(raw, Wishes(**wishes), baked_at=NOW, now=NOW)
    return caught.value.message


def content(seed: BakedSeed, name: str) -> bytes:
    return next(file.content for file in seed.files if file.name == name)


def test_a_seed_holds_exactly_the_files_of_the_protocol(cluster: Cluster) -> None:
    seed = baked(cluster.bundle(), name="edge-1", labels=["site=north", "rack=7"])
    assert [file.name for file in seed.files] == ALL_FILES
    assert [file.mode for file in seed.files] == [0o644] * 5 + [0o600]
    told = strict_json.decode(content(seed, "seed.json"), Seed, max_bytes=65536)
    assert told == seed.seed
    assert (told.cluster_id, told.image_key_id, told.baked_at) == ("c-1", cluster.image_key_id, NOW)
    assert told.controllers == ["c.example:8443"]
    assert (told.hints.name, told.hints.labels) == ("edge-1", {"site": "north", "rack": "7"})
    root = content(seed, "root-ca.pem").decode()
    envelope = strict_json.decode(content(seed, "trust.json"), Envelope, max_bytes=65536)
    assert verify_trust(envelope, anchors=[root], current=None) == cluster.document()
    assert Identity.from_pkcs8(content(seed, "image-key.pem")).public_line == cluster.image_key.public_line


def test_cloud_init_gets_host_name_and_mode(cluster: Cluster) -> None:
    seed = baked(cluster.bundle(), name="Edge_1.north")
    user, meta = content(seed, "user-data").decode(), content(seed, "meta-data").decode()
    assert user.splitlines()[0] == "#cloud-config"
    assert 'hostname: "edge-1-north"' in user
    assert json.loads(user.split("runcmd: ")[1]) == [["appliance", "mode", "set", "se"]]
    assert meta == f'instance-id: "{seed.seed.image_id}"\nlocal-hostname: "edge-1-north"\n'
    assert 'hostname: "on"' in content(baked(cluster.bundle(), hostname="on"), "user-data").decode()
    assert "hostname" not in content(baked(cluster.bundle()), "user-data").decode()


def test_equal_inputs_are_equal_bytes_and_other_wishes_another_image_id(cluster: Cluster) -> None:
    raw = cluster.bundle()
    first, second = baked(raw, name="a"), baked(raw, name="a")
    assert first == second
    assert first.seed.image_id != baked(raw, name="b").seed.image_id


def test_the_iso_is_the_same_in_another_time_zone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    files = baked(cluster.bundle()).files
    images = []
    for zone in ("UTC", "Asia/Kathmandu", "America/New_York"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        images.append(iso.render(files, at=NOW))
    monkeypatch.undo()
    time.tzset()
    assert images[0] == images[1] == images[2]
    assert iso.render(files, at=NOW + 1) != images[0]


def test_given_controllers_take_the_place_of_the_bundles(cluster: Cluster) -> None:
    seed = baked(cluster.bundle(), controllers=["10.0.0.1", "[2001:db8::1]:443", "b.example:1"])
    assert seed.seed.controllers == ["10.0.0.1:8443", "[2001:db8::1]:443", "b.example:1"]


Put = Callable[[Cluster, str], tuple[bytes, dict[str, Any]]]


def _bundle_field(**make: Callable[[Cluster, str], Any]) -> Put:
    return lambda cluster, pem: (cluster.bundle(**{name: value(cluster, pem) for name, value in make.items()}), {})


def _wish(**make: Callable[[str], Any]) -> Put:
    return lambda cluster, pem: (cluster.bundle(), {name: value(pem) for name, value in make.items()})


PLACES: dict[str, Put] = {
    "cluster_id": _bundle_field(cluster_id=lambda _, pem: pem),
    "root_ca": _bundle_field(root_ca=lambda _, pem: pem),
    "behind root_ca": _bundle_field(root_ca=lambda cluster, pem: cluster.authority.certificate_pem.decode() + pem),
    "image_key": _bundle_field(image_key=lambda _, pem: pem),
    "behind image_key": _bundle_field(image_key=lambda cluster, pem: cluster.image_key.pkcs8().reveal().decode() + pem),
    "image_key_id": _bundle_field(image_key_id=lambda _, pem: pem),
    "controllers": _bundle_field(controllers=lambda _, pem: [pem]),
    "trust payload": _bundle_field(
        trust=lambda cluster, pem: cluster.authority.sign(TRUST_TYPE, pem.encode()),
    ),
    "trust type": _bundle_field(
        trust=lambda cluster, pem: msgspec.structs.replace(cluster.authority.sign(TRUST_TYPE, b"{}"), payload_type=pem)
    ),
    "trusted root": _bundle_field(
        document=lambda cluster, pem: cluster.document(roots=[cluster.authority.certificate_pem.decode() + pem])
    ),
    "log-in key": _bundle_field(document=lambda cluster, pem: cluster.document(login_keys=[pem])),
    "bundle key": _bundle_field(document=lambda cluster, pem: cluster.document(bundle_key=pem)),
    "name": _wish(name=lambda pem: pem),
    "hostname": _wish(hostname=lambda pem: pem),
    "label value": _wish(labels=lambda pem: [f"key={pem}"]),
    "label name": _wish(labels=lambda pem: [f"{pem}=value"]),
    "label in base64": _wish(labels=lambda pem: [base64.b64encode(pem.encode()).decode()]),
    "controller": _wish(controllers=lambda pem: [pem]),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_ca_key_goes_nowhere_and_is_never_shown(cluster: Cluster, place: str) -> None:
    pem = ca_key_pem()
    raw, wishes = PLACES[place](cluster, pem)
    message = refused(raw, **wishes)
    body = "".join(pem.splitlines()[1:-1])
    assert not any(body[start : start + 24] in message for start in range(len(body) - 24)), "the key is in the message"


def test_where_a_private_key_was_found_is_named(cluster: Cluster) -> None:
    assert "wish.labels[0] holds a private key" in refused(cluster.bundle(), labels=[f"k={ca_key_pem()}"])
    assert "bundle.trust.payload holds a private key" in refused(
        cluster.bundle(trust=cluster.authority.sign(TRUST_TYPE, ca_key_pem().encode()))
    )
    roots = [cluster.authority.certificate_pem.decode() + cluster.image_key.pkcs8().reveal().decode()]
    assert "holds a private key" in refused(cluster.bundle(cluster.document(roots=roots)))


def test_a_key_with_another_role_is_no_image_key(cluster: Cluster) -> None:
    node = Identity(ssh_keys.load_private(cluster.host_key.reveal()))
    raw = cluster.bundle(
        image_key=node.pkcs8().reveal().decode(), image_key_id=image_key.image_key_id(node.public_line)
    )
    assert "another role in the cluster" in refused(raw)


def test_an_image_key_of_another_form_or_id_is_refused(cluster: Cluster) -> None:
    openssh = cluster.image_key.openssh().reveal().decode()
    assert "PKCS #8" in refused(cluster.bundle(image_key=openssh))
    encrypted = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    assert "PKCS #8" in refused(cluster.bundle(image_key=encrypted.decode()))
    ec_pkcs8 = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    assert "no Ed25519 image key" in refused(cluster.bundle(image_key=ec_pkcs8.decode()))
    assert f"image key is {cluster.image_key_id}, but" in refused(cluster.bundle(image_key_id="ik-000000000000"))


def test_a_trust_document_of_another_root_or_cluster_is_refused(cluster: Cluster) -> None:
    other = Authority.create("c-1", now=NOW)
    assert "does not verify" in refused(cluster.bundle(root_ca=other.certificate_pem.decode()))
    assert "bundle says cluster 'c-2'" in refused(cluster.bundle(cluster_id="c-2"))


def test_all_mistakes_are_told_at_once(cluster: Cluster) -> None:
    raw = cluster.bundle(image_key_id="ik-000000000000", root_ca="none")
    with pytest.raises(SeedError) as caught:
        bake(
            raw,
            Wishes(
                name="-",
                labels=["a", "b=1", "b=2", "c=\n"],
                hostname="x.y",
                controllers=["", "h:0", "h h", "999.1.1.1"],
            ),
            baked_at=NOW + 90_000,
            now=NOW,
            problems=["first"],
        )
    message = caught.value.message
    for part in (
        "- first",
        "label 'a': key=value",
        "label 'b' stands twice",
        "name '-'",
        "value of label 'c'",
        "host name 'x.y'",
        "controller '': host:port",
        "controller 'h:0'",
        "controller 'h h'",
        "controller '999.1.1.1'",
        f"baked_at {NOW + 90_000}",
        "root_ca: one PEM certificate",
        "the bundle's image key is",
    ):
        assert part in message, part
    assert message.count("\n") == 13


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"schema": 1, "schema": 1}', b"\xff", b"[" * 100])
def test_a_file_that_is_no_bundle_is_refused(raw: bytes) -> None:
    assert "the bundle can't be used" in refused(raw)


def test_a_newer_bundle_and_one_without_controllers_are_refused(cluster: Cluster) -> None:
    assert "schema 2" in refused(cluster.bundle(schema=2))
    assert "neither the bundle nor --controller" in refused(cluster.bundle(controllers=[]))
    assert "at most 16" in refused(cluster.bundle(controllers=["c.example:1"] * 17))
    assert baked(cluster.bundle(controllers=[]), controllers=["a"]).seed.controllers == ["a:8443"]


# --- on disk -----------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["image-builder", *arguments])
    return cli.main()


def test_the_command_writes_folder_and_iso(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    bundle, folder, image = tmp_path / "b.json", tmp_path / "seed", tmp_path / "seed.iso"
    bundle.write_bytes(cluster.bundle())
    arguments = ["seed", "--bundle", str(bundle), "--out", str(folder), "--iso", str(image), "--name", "edge-1"]
    assert run(monkeypatch, *arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["baked_at"], told["directory"], told["iso"]) == (1_700_000_000, str(folder), str(image))
    assert told["files"] == ALL_FILES
    assert sorted(path.name for path in folder.iterdir()) == sorted(ALL_FILES)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "image-key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "seed", "seed.iso"]

    again = tmp_path / "again.iso"
    assert run(monkeypatch, "seed", "--bundle", str(bundle), "--iso", str(again), "--name", "edge-1") == 0
    assert again.read_bytes() == image.read_bytes()
    assert told["image_id"] in capsys.readouterr().out

    assert run(monkeypatch, *arguments) == SeedError.exit_code
    err = capsys.readouterr().err
    assert "exists already" in err
    assert "fresh bundle" not in err, "there is nothing wrong with this one"
    bundle.write_text("{}")
    assert run(monkeypatch, "seed", "--bundle", str(bundle), "--out", str(tmp_path / "x")) == SeedError.exit_code
    assert "a fresh bundle comes from" in capsys.readouterr().err


def test_a_seed_takes_every_field_that_it_can_carry(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, folder, secret, hook = (tmp_path / name for name in ("b.json", "seed", "token", "prepare.sh"))
    bundle.write_bytes(cluster.bundle())
    text = token.compose(b"t" * 32)
    secret.write_text(text + "\n")
    hook.write_text("#!/bin/sh\n")
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJzCZ1pSBUL9KDvQkWqKYBdRNVEeUnJGuJ0pvDjiRqYP"
    given = {
        "--bundle": bundle, "--out": folder, "--seed-name": "edge-1", "--token": secret, "--hook": hook,
        "--controller": "10.0.0.1,[2001:db8::1]:444", "--label": "site=north", "--hostname": "branch",
        "--timezone": "Europe/Berlin", "--operator-key": key, "--network-address": "192.0.2.10/24",
        "--network-gateway": "192.0.2.1", "--network-dns": "192.0.2.53", "--network-vlan": "12",
    }  # fmt: skip
    words = [str(word) for pair in given.items() for word in pair]
    assert run(monkeypatch, "seed", *words, "--json") == 0
    said = capsys.readouterr().out
    assert json.loads(said)["has_token"] is True
    assert text not in said
    found = strict_json.decode((folder / "seed.json").read_bytes(), Seed, max_bytes=1 << 16)
    assert (found.token, found.hints.name, found.hints.labels) == (text, "edge-1", {"site": "north"})
    assert found.controllers == ["10.0.0.1:8443", "[2001:db8::1]:444"]
    assert stat.S_IMODE((folder / "seed.json").stat().st_mode) == 0o600
    user = (folder / "user-data").read_text()
    assert all(word in user for word in ("Europe/Berlin", "branch", key, "01-prepare.sh"))
    network = (folder / "network-config").read_text()
    assert all(word in network for word in ("192.0.2.10/24", "192.0.2.1", "192.0.2.53", "vlan12"))


def test_a_seeds_mistakes_name_the_field_and_never_the_token(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "b.json"
    bundle.write_bytes(cluster.bundle())
    words = ["seed", "--bundle", str(bundle), "--out", str(tmp_path / "seed"), "--cluster", "c-2"]
    words += ["--image-key-id", "ik-2", "--timezone", "no zone", "--network-vlan", "5000"]
    for wrong in ("enroll-most-of-a-secret", "most-of-a-secret"):
        assert run(monkeypatch, *words, "--token", wrong) == SeedError.exit_code
        said = capsys.readouterr().err
        wanted = ("'c-2' was named", "'ik-2' was named", "timezone 'no zone'", "vlan 5000", "- token")
        assert all(one in said for one in wanted), said
        assert "most-of-a-secret" not in said
    assert not (tmp_path / "seed").exists()


def test_the_commands_mistakes_come_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same = str(tmp_path / "x")
    missing = str(tmp_path / "no" / "y")
    arguments = ["seed", "--bundle", str(tmp_path / "none"), "--baked-at", "soon"]
    assert run(monkeypatch, *arguments) == SeedError.exit_code
    error = capsys.readouterr().err
    assert "no output" in error
    assert "can't be read: No such file" in error
    assert "baked_at 'soon'" in error
    assert run(monkeypatch, *arguments, "--out", same, "--iso", same) == SeedError.exit_code
    assert f"both {same}" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--out", missing) == SeedError.exit_code
    assert "no directory: make it first" in capsys.readouterr().err
    assert run(monkeypatch, "seed") == 2
    assert "--bundle" in capsys.readouterr().err
    assert run(monkeypatch, "--version") == 0


def test_nothing_is_left_where_the_second_form_fails(cluster: Cluster, tmp_path: Path) -> None:
    files = baked(cluster.bundle()).files
    folder, image = tmp_path / "seed", tmp_path / "seed.iso"
    image.mkdir()  # came into being after the check
    with pytest.raises(StorageError):
        output.place(files, directory=folder, iso=image, iso_content=b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["seed.iso"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_told(cluster: Cluster, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        output.place(baked(cluster.bundle()).files, directory=tmp_path / "seed", iso=None, iso_content=b"")
