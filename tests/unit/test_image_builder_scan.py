"""Private keys and C libraries in raw content, and whose the keys are."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from cluster_bundle import NOW, Cluster
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance.errors import ImageError
from appliance.pki import sealed, ssh_keys
from appliance.pki.authority import Authority
from appliance.pki.identity import Identity
from appliance.pki.secret import Secret
from image_builder import private_keys, scan


def ec_pem(*, passphrase: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def test_keys_are_found_wherever_they_lie(tmp_path: Path) -> None:
    keys = [ec_pem(), Identity.create().openssh().reveal(), ec_pem(passphrase=b"x")]
    path = tmp_path / "disk"
    with path.open("wb") as stream:
        stream.truncate(200 << 20)
        places = [5, (64 << 20) - 100, (100 << 20) + 3]
        for at, pem in zip(places, keys, strict=True):
            os.pwrite(stream.fileno(), pem, at)
        os.pwrite(stream.fileno(), json.dumps({"key": keys[0].decode()}).encode(), 150 << 20)
        os.pwrite(stream.fileno(), b"-----BEGIN PRIVATE KEY-----\0-----END PRIVATE KEY-----", 180 << 20)
    found = scan.look_through(path).keys
    assert [key.offset for key in found[:3]] == places
    assert [key.pem.strip() for key in found[:3]] == [pem.strip() for pem in keys]
    assert [key.kind for key in found] == ["", "OPENSSH", "ENCRYPTED", ""]
    assert found[3].pem == keys[0].strip()
    assert len(found) == 4  # the one without a body is what a program says, not a key


def test_the_c_library_tells_its_version(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(
        b"\0" * 5000 + b"GNU C Library (Debian GLIBC 2.31-13) stable release version 2.31.\n" + b"GNU C Library (x) no"
    )
    assert scan.look_through(path).glibc == [(2, 31)]
    empty = tmp_path / "empty"
    with empty.open("wb") as stream:
        stream.truncate(1 << 20)
    assert scan.look_through(empty) == scan.Findings(keys=[], glibc=[])


def notes(tmp_path: Path, *pems: bytes) -> list[tuple[private_keys.KeyNote, int]]:
    path = tmp_path / "content"
    path.write_bytes(b"\0".join(pems))
    return [(private_keys.note(key), key.offset) for key in scan.look_through(path).keys]


def test_keys_of_the_cluster_are_named_and_never_allowed(tmp_path: Path) -> None:
    cluster = Cluster()
    document = cluster.document(login_keys=[ssh_keys.generate()[1]])
    owners = private_keys.of_cluster(cluster.authority.certificate_pem.decode(), document)
    root, host = cluster.authority.key_file().reveal(), cluster.host_key.reveal()
    found = notes(tmp_path, root, host)
    problems = private_keys.problems(
        found, cluster=owners, image_key=cluster.image_key_id, known={key.digest for key, _ in found}
    )
    assert len(problems) == 2
    assert "a root CA's" in problems[0]
    assert "the SSH host key of node 1" in problems[1]


def test_what_a_controller_sealed_is_never_allowed(tmp_path: Path) -> None:
    cluster, passphrase = Cluster(), Secret(b"five random words or more")
    key = cluster.authority.key_file(passphrase).reveal()
    backup = sealed.seal(b"all of it", passphrase, magic=sealed.BACKUP, about={"cluster_id": "c-1"})
    mentioned = sealed.ROOT_KEY + b"\nis what such a file begins with"
    found = notes(tmp_path, b"x" * 999 + key, mentioned, backup)
    assert [note.kind for note, _ in found] == ["sealed root key", "sealed backup of a controller"]
    known = {note.digest for note, _ in found}
    told = private_keys.problems(found, cluster={}, image_key="", known=known)
    assert "a sealed root key lies at byte 999" in told[0]
    assert "a sealed backup of a controller lies at byte" in told[1]
    owners = private_keys.of_cluster(cluster.authority.certificate_pem.decode(), cluster.document())
    (first, _) = private_keys.problems(found, cluster=owners, image_key="", known=known)
    assert first == "a private key of the cluster lies at byte 999: a root CA's"


def test_a_key_beside_its_certificate_of_any_cluster_is_never_allowed(tmp_path: Path) -> None:
    """What a system was used for before: nothing in the bundle tells of these keys."""
    other = Authority.create("c-other", now=NOW)
    issuing, node = other.issue_issuing(now=NOW), other.issue_node(node=1, addresses=["192.0.2.1"], now=NOW)
    stranger = ec_pem()
    path = tmp_path / "disk"
    pairs = [pem for one in (issuing, node) for pem in (one.certificate_pem, one.key.reveal())]
    in_json = json.dumps({"certificate": issuing.certificate_pem.decode()}).encode()
    path.write_bytes(b"\0".join([*pairs, in_json, stranger, b"-----BEGIN CERTIFICATE-----\n" + b"A" * 99]))
    found = scan.look_through(path)
    owners = private_keys.of_certificates([*found.certificates, b"appliance://torn"])
    known = {private_keys.note(key).digest for key in found.keys}
    told = private_keys.problems(
        [(private_keys.note(key), key.offset) for key in found.keys], cluster=owners, image_key="", known=known
    )
    assert [text.partition(": ")[2] for text in told] == ["a CA's, of cluster c-other", "node 1's, of cluster c-other"]


def test_the_image_key_and_keys_of_the_system_may_be_there(tmp_path: Path) -> None:
    cluster = Cluster()
    image, stranger, published = cluster.image_key.pkcs8().reveal(), ec_pem(), ec_pem()
    found = notes(tmp_path, image, stranger, published)
    problems = private_keys.problems(found, cluster={}, image_key=cluster.image_key_id, known={found[2][0].digest})
    assert len(problems) == 1
    assert f"at byte {found[1][1]}" in problems[0]
    body = stranger.splitlines()[1].decode()
    assert body not in problems[0]
    other = private_keys.problems(found[:1], cluster={}, image_key="ik-000000000000", known=[])
    assert cluster.image_key.thumbprint in other[0]


def tar_with(path: Path, name: str, content: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        for member_name, text in ((name, content), ("./usr/after", b"x")):
            member = tarfile.TarInfo(member_name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return path


def test_only_packages_may_bring_keys_into_the_tree(tmp_path: Path) -> None:
    pem = ec_pem()
    digests = private_keys.published(tar_with(tmp_path / "a.tar", "./usr/lib/libgnutls.so", b"\x7fELF" + pem))
    assert len(digests) == 1
    assert private_keys.published(tar_with(tmp_path / "b.tar", "./usr/x", b"nothing")) == []
    with pytest.raises(ImageError, match=r"\./etc/ssl/private/key\.pem"):
        private_keys.published(tar_with(tmp_path / "c.tar", "./etc/ssl/private/key.pem", pem))
