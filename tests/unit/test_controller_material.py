"""The controller's trust material: what is missing or damaged is named, a node certificate is issued anew in time."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.controller import material
from appliance.controller.material import NODE_CERTIFICATE_DAYS, Files, Material
from appliance.errors import StorageError, TrustError
from appliance.pki import tls
from appliance.pki.authority import certificate_terms
from appliance.storage.atomic import write_atomic

NOW = 1_800_000_000
DAY_S = 86_400


def make(state: Path, cluster_id: str = "c-1") -> Files:
    files = Files(state)
    material.create(
        files, cluster_id=cluster_id, addresses=["127.0.0.1", "node.example"], enroll_port=8443, ssh_port=22, now=NOW
    )
    return files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make(tmp_path / "state")


NEEDED = ["cluster", "root_certificate", "root_key", "trust", "nonce_key", "host_key", "login_key"]


def refused(files: Files) -> StorageError:
    with pytest.raises(StorageError) as caught:
        Material(files)
    return caught.value


def test_what_was_made_is_loaded(files: Files) -> None:
    loaded = Material(files)
    assert loaded.cluster.cluster_id == loaded.trust.cluster_id == loaded.authority.cluster_id == "c-1"
    assert loaded.trust.nodes[0].enroll == ["127.0.0.1:8443", "node.example:8443"]
    assert loaded.trust.roots == [loaded.root_pem]
    assert len(loaded.nonce_key) == 32


def test_private_files_are_private(files: Files) -> None:
    public = {"root-ca.pem", "node.pem", "trust.json", "cluster.json"}
    for path in files.state.iterdir():
        mode = path.stat().st_mode & 0o777
        if path.is_dir():
            assert mode == 0o700, path
        else:
            assert mode == (0o644 if path.name in public or path.suffix == ".pub" else 0o600), path
    assert files.state.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_file_is_named(files: Files, name: str) -> None:
    path: Path = getattr(files, name)
    path.unlink()
    error = refused(files)
    assert str(path) in error.message
    assert "is missing" in error.message
    assert "backup" in error.hint


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize(
    "damage",
    [lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: b"\xff\x00" * 20, lambda raw: raw * 4000],
    ids=["empty", "half", "garbage", "huge"],
)
def test_a_damaged_file_is_named(files: Files, name: str, damage: Callable[[bytes], bytes]) -> None:
    path: Path = getattr(files, name)
    path.write_bytes(damage(path.read_bytes()))
    error = refused(files)
    assert str(path) in error.message
    assert error.hint


@pytest.mark.parametrize("name", NEEDED)
def test_a_directory_in_place_of_a_file_is_named(files: Files, name: str) -> None:
    path: Path = getattr(files, name)
    path.unlink()
    path.mkdir()
    assert str(path) in refused(files).message


@pytest.mark.parametrize("name", ["cluster", "root_certificate", "root_key", "trust", "host_key"])
def test_a_file_of_another_cluster_is_named(files: Files, tmp_path: Path, name: str) -> None:
    other = make(tmp_path / "other", "c-2")
    getattr(files, name).write_bytes(getattr(other, name).read_bytes())
    error = refused(files)
    assert any(str(getattr(files, each)) in error.message for each in (name, "root_key"))
    assert "backup" in error.hint


def test_a_cut_off_init_is_told(files: Files) -> None:
    with pytest.raises(StorageError, match="no initialised controller") as caught:
        files.check_ready()
    assert "controller init" in caught.value.hint


# The node certificate's life.


def test_renewal_is_due_to_the_second(files: Files) -> None:
    loaded = Material(files)
    terms = certificate_terms(files.node_certificate.read_bytes())
    assert (terms.not_before, terms.not_after) == (NOW - DAY_S, NOW + NODE_CERTIFICATE_DAYS * DAY_S)
    due = terms.not_before + (terms.not_after - terms.not_before) * 2 / 3
    assert not loaded.renewal_due(NOW)
    assert not loaded.renewal_due(due - 1)
    assert loaded.renewal_due(due)
    assert loaded.renewal_due(terms.not_after + 1)
    # A month is left when it becomes due: a controller that looks each hour has 700 tries.
    assert terms.not_after - due > 30 * DAY_S


def test_renewal_makes_a_new_pair_with_the_same_names(files: Files) -> None:
    loaded = Material(files)
    before = certificate_terms(files.node_certificate.read_bytes())
    key = files.node_key.read_bytes()
    later = NOW + 61 * DAY_S
    assert loaded.renewal_due(later)
    loaded.renew_node_certificate(later)
    after = certificate_terms(files.node_certificate.read_bytes())
    assert after.not_after == later + NODE_CERTIFICATE_DAYS * DAY_S == loaded.node_certificate_expires_at
    assert after.key_id != before.key_id
    assert files.node_key.read_bytes() != key
    assert (after.cluster_id, after.node) == (before.cluster_id, before.node)
    assert not loaded.renewal_due(later)
    assert isinstance(tls.server_context(files.node_certificate, files.node_key), ssl.SSLContext)


def test_a_renewal_cut_between_key_and_certificate_is_repaired_by_another(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Material(files)
    written = write_atomic

    def cut(path: Path, content: bytes, *, mode: int) -> None:
        if path == files.node_certificate:
            raise KeyboardInterrupt
        written(path, content, mode=mode)

    with monkeypatch.context() as patch:
        patch.setattr("appliance.controller.material.write_atomic", cut)
        with pytest.raises(KeyboardInterrupt):
            loaded.renew_node_certificate(NOW)
    with pytest.raises(TrustError, match="no certificate with its key"):
        tls.server_context(files.node_certificate, files.node_key)
    Material(files).renew_node_certificate(NOW)
    tls.server_context(files.node_certificate, files.node_key)


@pytest.mark.parametrize("damage", [None, b"", b"no certificate"])
def test_a_missing_or_damaged_node_certificate_is_due_and_stops_nothing(files: Files, damage: bytes | None) -> None:
    if damage is None:
        files.node_certificate.unlink()
    else:
        files.node_certificate.write_bytes(damage)
    loaded = Material(files)
    assert loaded.renewal_due(NOW)
    assert loaded.node_certificate_expires_at == 0
    loaded.renew_node_certificate(NOW)
    assert not loaded.renewal_due(NOW)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(make(tmp_path_factory.mktemp("shared") / "state"))


@given(part=st.floats(0, 1.2))
def test_due_means_two_thirds(part: float, shared: Material) -> None:
    terms = certificate_terms(shared.files.node_certificate.read_bytes())
    at = terms.not_before + (terms.not_after - terms.not_before) * part
    if abs(part - 2 / 3) > 1e-9:
        assert shared.renewal_due(at) == (part > 2 / 3)
