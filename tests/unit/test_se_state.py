"""What an SE keeps on disk about itself and its cluster, and what it makes of broken files."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from appliance.errors import DowngradeError, StateMachineError, StorageError, TrustError
from appliance.paths import Paths
from appliance.pki import ssh_keys
from appliance.pki.authority import Authority
from appliance.pki.identity import Identity
from appliance.protocol import strict_json
from appliance.protocol.trust import TRUST_TYPE, Envelope, TrustDocument
from appliance.protocol.tunnel import ImageKeyCopies
from appliance.se.believed import Beliefs
from appliance.se.identity import SeState, host_keys

NOW = int(time.time())
AUTHORITY = Authority.create("c-1", now=NOW)


def signed(authority: Authority = AUTHORITY, **changes: object) -> tuple[Envelope, TrustDocument]:
    terms: dict[str, object] = {
        "cluster_id": authority.cluster_id, "version": 1, "epoch": 0, "signed_at": NOW,
        "roots": [authority.certificate_pem.decode()], "nodes": [], **changes,
    }  # fmt: skip
    document = TrustDocument(**terms)  # type: ignore[arg-type]
    return authority.sign(TRUST_TYPE, strict_json.encode(document)), document


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


@pytest.fixture
def state(paths: Paths) -> SeState:
    return SeState(paths)


def reloaded(paths: Paths) -> SeState:
    found = SeState(paths)
    found.load()
    return found


def beliefs(state: SeState) -> Beliefs:
    return Beliefs(state.trust_document, authorized_keys=state.authorized_keys_path)


def test_an_identity_is_the_same_after_a_restart(paths: Paths, state: SeState) -> None:
    state.load()
    assert state.record is None
    with pytest.raises(StateMachineError):
        state.require()
    with pytest.raises(StateMachineError):
        _ = state.identity
    state.create(image_id="i")
    again = reloaded(paths)
    assert again.require() == state.require()
    assert again.identity.public_line == state.identity.public_line
    assert again.grant is None
    assert "PRIVATE" not in repr(again.require())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\0" * 500])
@pytest.mark.parametrize("name", ["identity.json", "tickets.json"])
def test_broken_documents_are_set_aside_and_told(paths: Paths, state: SeState, name: str, content: bytes) -> None:
    state.create(image_id="")
    state.save_ticket(1, "t")
    (paths.se_state / name).write_bytes(content)
    again = reloaded(paths)
    assert len(again.set_aside) == 1
    assert (paths.se_state / f"{name}.broken-1").read_bytes() == content
    assert (again.record is None) == (name == "identity.json")
    assert again.ticket(1) == ("" if name == "tickets.json" else "t")


def test_an_identity_without_a_usable_key_is_broken(paths: Paths, state: SeState) -> None:
    from appliance.se.identity import IdentityRecord
    from appliance.storage.document import Document

    document = Document(paths.se_state / "identity.json", IdentityRecord)
    document.save(IdentityRecord(se_id="x", key="no key", attempt_id="y"))
    again = reloaded(paths)
    assert again.record is None
    assert again.set_aside


def test_a_newer_version_is_refused(paths: Paths, state: SeState) -> None:
    state.create(image_id="")
    file = paths.se_state / "identity.json"
    file.write_bytes(file.read_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(DowngradeError):
        reloaded(paths)


def test_tickets_are_per_node(paths: Paths, state: SeState) -> None:
    state.save_ticket(1, "a")
    state.save_ticket(2, "b")
    again = reloaded(paths)
    assert [again.ticket(node) for node in (1, 2, 3)] == ["a", "b", ""]


def test_the_image_key_is_kept_and_destroyed(paths: Paths, state: SeState) -> None:
    key = Identity.create()
    assert state.image_key() is None
    state.keep_image_key(key)
    kept = state.image_key()
    assert kept is not None
    assert kept.public_line == key.public_line
    baked = paths.root / "etc/appliance/seed/image-key.pem"
    baked.parent.mkdir(parents=True)
    baked.write_bytes(key.pkcs8().reveal())
    copies, told = state.scrub_image_key(paths)
    assert copies is ImageKeyCopies.DESTROYED
    assert len(told) == 2
    assert state.scrub_image_key(paths) == (ImageKeyCopies.DESTROYED, []), "told again on the next link"
    assert not baked.exists()
    assert state.image_key() is None


def test_half_destroyed_and_damaged_image_keys_count_as_none(paths: Paths, state: SeState) -> None:
    state.image_key_path.write_bytes(b"\0" * 119)
    assert state.image_key() is None
    state.image_key_path.write_bytes(b"damaged")
    assert state.image_key() is None
    assert state.set_aside


def test_an_image_key_that_cannot_be_destroyed_is_passed_over(
    paths: Paths, state: SeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.keep_image_key(Identity.create())

    def refuse(_path: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    copies, (text,) = state.scrub_image_key(paths)
    assert copies is ImageKeyCopies.LEFT
    assert "NOT destroyed" in text


def test_host_keys(paths: Paths) -> None:
    file = paths.root / "etc/ssh/ssh_host_ed25519_key.pub"
    assert host_keys(paths) == []
    file.parent.mkdir(parents=True)
    line = ssh_keys.generate()[1]
    file.write_text(f"{line} root@se\n")
    assert host_keys(paths) == [line]
    file.write_bytes(b"\xff\xff")
    assert host_keys(paths) == []
    file.write_text("ssh-rsa AAAA")
    assert host_keys(paths) == []


def test_a_seed_gives_the_first_document(state: SeState) -> None:
    believed = beliefs(state)
    believed.load(None)
    assert believed.version == 0
    with pytest.raises(TrustError):
        _ = believed.current
    key = ssh_keys.generate()[1]
    believed.start_from_seed(*signed(login_keys=[key]))
    assert state.authorized_keys_path.read_text() == f'from="127.0.0.1,::1" {key} cluster-c-1\n'
    assert state.authorized_keys_path.stat().st_mode & 0o777 == 0o600
    again = beliefs(state)
    again.load(None)
    assert again.current == believed.current


def test_an_older_seed_changes_nothing_another_cluster_s_does(state: SeState) -> None:
    believed = beliefs(state)
    believed.start_from_seed(*signed(version=3))
    believed.start_from_seed(*signed(version=2))
    assert believed.version == 3
    believed.start_from_seed(*signed(Authority.create("c-2", now=NOW)))
    assert believed.current.cluster_id == "c-2"


def test_only_newer_documents_of_a_known_root_take_force(state: SeState) -> None:
    believed, heard = beliefs(state), []
    believed.start_from_seed(*signed(version=2))
    believed.on_change(lambda document: heard.append(document.version))
    assert not believed.accept(signed(version=1)[0])
    assert not believed.accept(signed(version=2)[0])
    assert believed.accept(signed(version=3)[0])
    with pytest.raises(TrustError):
        believed.accept(signed(Authority.create("c-1", now=NOW), version=4)[0])
    assert (believed.version, heard) == (3, [3])


def test_a_root_hands_over_to_the_next(state: SeState) -> None:
    following = Authority.create("c-1", now=NOW)
    both = [AUTHORITY.certificate_pem.decode(), following.certificate_pem.decode()]
    believed = beliefs(state)
    believed.start_from_seed(*signed())
    with pytest.raises(TrustError):
        believed.accept(signed(following, version=2)[0])
    assert believed.accept(signed(version=2, roots=both)[0])
    assert believed.accept(signed(following, version=3)[0])
    with pytest.raises(TrustError):
        believed.accept(signed(version=4)[0])


def test_a_broken_trust_file_falls_back_to_the_grant_s(state: SeState) -> None:
    believed = beliefs(state)
    believed.start_from_seed(*signed(version=5))
    (state.directory / "trust.json").write_bytes(b"{")
    again = beliefs(state)
    again.load(signed(version=4)[0])
    assert again.version == 4
    assert (state.directory / "trust.json.broken-1").exists()


def test_a_document_that_cannot_be_stored_takes_no_force(state: SeState, monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.storage import atomic

    believed = beliefs(state)
    believed.start_from_seed(*signed())

    def full(_fd: int, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "write_all", full)
    with pytest.raises(StorageError):
        believed.accept(signed(version=2)[0])
    assert believed.version == 1
