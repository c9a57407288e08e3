"""Backup and restore on disk: whole or not at all, and nothing of the former life can be played again."""

from __future__ import annotations

import asyncio
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_parts import HandClock

from appliance.controller import backup, init, restore
from appliance.controller.backup import Contents
from appliance.controller.material import Files, Material
from appliance.controller.recovery import RECOVERY
from appliance.controller.restore import STAGING, NewPlace
from appliance.controller.store.copy import StoreCopy
from appliance.controller.store.port import Put
from appliance.controller.store.sqlite import SqliteStore
from appliance.errors import ApplianceError, DowngradeError, SettingsError, StorageError, TrustError, UsageError
from appliance.paths import Paths
from appliance.pki import sealed
from appliance.pki.secret import Secret
from appliance.protocol.trust import replaces

PASSPHRASE = Secret(b"correct horse battery staple")
CLOCK = HandClock()
NOW = int(CLOCK.now())


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """The passphrase is tried often here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed, "SCRYPT_LOG2_N", 4)
        yield


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A controller that was made and never ran."""
    paths = Paths(tmp_path_factory.mktemp("origin"))
    init.initialise(paths, addresses=["192.0.2.1"], enroll_port=8443, ssh_port=22, clock=CLOCK)
    paths.settings_file.parent.mkdir(parents=True)
    paths.settings_file.write_text("[controller]\n")
    return paths


@pytest.fixture(scope="module")
def file(origin: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "b"
    backup.make(origin, out, PASSPHRASE, now=NOW)
    return out


def copied(origin: Paths, tmp_path: Path) -> Paths:
    shutil.copytree(origin.root, tmp_path / "copy")
    return Paths(tmp_path / "copy")


def resealed(file: Path, to: Path, **changes: Any) -> Path:
    """The backup with other contents, sealed as well as the first."""
    contents, _ = backup.load(file, PASSPHRASE)
    plain = zlib.compress(msgspec.msgpack.encode(msgspec.structs.replace(contents, **changes)))
    to.write_bytes(sealed.seal(plain, PASSPHRASE, magic=sealed.BACKUP, about={}))
    return to


def without(contents: Contents, name: str) -> list[backup.StateFile]:
    return [entry for entry in contents.files if entry.name != name]


# ---------------------------------------------------------------------------------------------------- backup


def test_a_backup_holds_all_and_is_for_its_owner_alone(origin: Paths, file: Path) -> None:
    assert file.stat().st_mode & 0o777 == 0o600
    contents, raw = backup.load(file, PASSPHRASE)
    names = {entry.name for entry in contents.files}
    assert {"root-ca.key", "node.key", "id_se", "ssh_host_ed25519_key", "trust.json", "nonce.key"} <= names
    assert any(name.startswith("bundles/") for name in names)
    assert not names & {"initialised", "store.sqlite", "disk-reserve"}
    assert contents.settings == b"[controller]\n"
    assert b"PRIVATE KEY" not in raw
    summary = backup.verify(file, PASSPHRASE)
    assert (summary.made_at, summary.epoch, summary.ses, summary.next_number) == (NOW, 1, 0, 1)
    assert summary.sha256 == sealed.digest(raw)


def test_no_backup_is_written_over(origin: Paths, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(StorageError, match="exists already"):
        backup.make(origin, file, PASSPHRASE, now=NOW)
    with pytest.raises(UsageError, match="shorter than"):
        backup.make(origin, file.with_name("c"), Secret(b"short"), now=NOW)
    assert file.read_bytes() == before


def test_there_must_be_a_controller(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="holds no initialised controller"):
        backup.make(Paths(tmp_path / "none"), tmp_path / "b", PASSPHRASE, now=NOW)
    with pytest.raises(StorageError, match="there is no"):
        backup.verify(tmp_path / "none", PASSPHRASE)


def test_files_that_change_meanwhile_are_read_again(origin: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    real, turns = backup._read_files, []

    def changing(files: Files) -> Any:
        turns.append(1)
        found = real(files)
        return found[1:] if len(turns) == 2 else found

    monkeypatch.setattr(backup, "_read_files", changing)
    assert backup.collect(origin, now=NOW).files
    assert len(turns) == 4
    monkeypatch.setattr(backup, "_read_files", lambda _: [object()])
    with pytest.raises(StorageError, match="change all the time"):
        backup.collect(origin, now=NOW)


def test_a_broken_controller_makes_no_backup(origin: Paths, tmp_path: Path) -> None:
    """A backup that can't be restored would be found out on the worst day."""
    paths = copied(origin, tmp_path)
    (paths.controller_state / "trust.json").write_text("{}")
    with pytest.raises(ApplianceError):
        backup.make(paths, tmp_path / "b", PASSPHRASE, now=NOW)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["cluster.json", "root-ca.pem", "root-ca.key", "trust.json", "id_se"])
def test_a_backup_without_one_of_its_files_is_found(file: Path, tmp_path: Path, name: str) -> None:
    contents, _ = backup.load(file, PASSPHRASE)
    with pytest.raises(StorageError, match=f"has no {name}"):
        backup.verify(resealed(file, tmp_path / "b", files=without(contents, name)), PASSPHRASE)


def test_a_backup_whose_audit_was_cut_is_found(origin: Paths, tmp_path: Path) -> None:
    paths = copied(origin, tmp_path)

    async def go() -> None:
        store = SqliteStore.open(paths.store_file, clock=CLOCK)
        await store.txn([], [Put("audit-head/1", b"ab 1")])
        await store.close()

    asyncio.run(go())
    with pytest.raises(TrustError, match="audit in the backup is broken"):
        backup.make(paths, tmp_path / "b", PASSPHRASE, now=NOW)


def test_what_opens_and_is_no_backup_is_refused(file: Path, tmp_path: Path) -> None:
    newer = resealed(file, tmp_path / "newer", version=backup.VERSION + 1)
    with pytest.raises(DowngradeError, match="knows up to 1"):
        backup.load(newer, PASSPHRASE)
    for content in (b"text", zlib.compress(b"\xc1")):
        (tmp_path / "b").write_bytes(sealed.seal(content, PASSPHRASE, magic=sealed.BACKUP, about={}))
        with pytest.raises(StorageError, match="holds no backup"):
            backup.load(tmp_path / "b", PASSPHRASE)
    with pytest.raises(TrustError, match=str(file)):
        backup.load(file, Secret(b"another passphrase"))


# --------------------------------------------------------------------------------------------------- restore


def restored(paths: Paths, file: Path, *, now: int = NOW + 100, **more: Any) -> restore.Restored:
    return restore.restore(paths, file, PASSPHRASE, clock=CLOCK, date=now, **more)


def test_a_restore_jumps_ahead_of_all_that_was(origin: Paths, file: Path, tmp_path: Path) -> None:
    paths = Paths(tmp_path / "r")
    done = restored(paths, file)
    before, after = Material(Files(origin.controller_state)), Material(Files(paths.controller_state))
    assert done.epoch == after.cluster.epoch == after.trust.epoch == NOW + 100
    assert done.trust_version == NOW + 100
    assert replaces(after.trust, before.trust)
    assert after.nonce_key != before.nonce_key
    assert after.root_pem == before.root_pem
    assert after.trust.nodes == before.trust.nodes
    assert not done.settings_kept
    assert paths.settings_file.read_text() == "[controller]\n"
    assert not (paths.state / STAGING).exists()
    for key in ("root-ca.key", "id_se", "nonce.key", "store.sqlite"):
        assert (paths.controller_state / key).stat().st_mode & 0o077 == 0, key
    with StoreCopy(paths.store_file.read_bytes(), name=paths.store_file) as store:
        number, record = store.get("number-next"), store.get(RECOVERY)
        assert number is not None
        assert int(number.value) == done.numbers_from == 1 + 65_536
        assert record is not None


def test_two_restores_of_one_backup_are_two_epochs(file: Path, tmp_path: Path) -> None:
    epochs = [restored(Paths(tmp_path / str(now)), file, now=now).epoch for now in (NOW + 5, NOW + 6)]
    assert len(set(epochs)) == 2


def test_an_epoch_never_goes_back(file: Path, tmp_path: Path) -> None:
    """A clock that was ahead at one restore must not make the next one a step back."""
    paths = Paths(tmp_path / "ahead")
    ahead = restored(paths, file, now=NOW + 10_000)
    again = tmp_path / "again"
    backup.make(paths, again, PASSPHRASE, now=NOW + 1)
    later = restored(Paths(tmp_path / "later"), again, now=NOW + 2)
    assert later.epoch == ahead.epoch + 1
    assert later.trust_version > ahead.trust_version


def test_a_restore_elsewhere_tells_ses_the_new_addresses(file: Path, tmp_path: Path) -> None:
    paths = Paths(tmp_path / "r")
    restored(paths, file, place=NewPlace(["198.51.100.7", "c.example"], 9443, 2222))
    trust = Material(Files(paths.controller_state)).trust
    assert trust.nodes[0].enroll == ["198.51.100.7:9443", "c.example:9443"]
    assert trust.nodes[0].ssh == ["198.51.100.7:2222", "c.example:2222"]


def test_a_restore_touches_no_controller_that_is_there(origin: Paths, file: Path, tmp_path: Path) -> None:
    paths = copied(origin, tmp_path)
    before = {path.name: path.read_bytes() for path in paths.controller_state.iterdir() if path.is_file()}
    with pytest.raises(StorageError, match="holds a controller"):
        restored(paths, file)
    assert {path.name: path.read_bytes() for path in paths.controller_state.iterdir() if path.is_file()} == before


def test_settings_that_are_there_are_kept(file: Path, tmp_path: Path) -> None:
    paths = Paths(tmp_path / "r")
    paths.settings_file.parent.mkdir(parents=True)
    paths.settings_file.write_text("[log]\n")
    assert restored(paths, file).settings_kept
    assert paths.settings_file.read_text() == "[log]\n"


def test_a_restore_wants_to_know_the_time(file: Path, tmp_path: Path) -> None:
    class Unsure(HandClock):
        def synchronised(self) -> bool:
            return False

    with pytest.raises(SettingsError, match="isn't synchronised"):
        restore.restore(Paths(tmp_path / "r"), file, PASSPHRASE, clock=Unsure())
    with pytest.raises(UsageError, match="was taken at"):
        restored(Paths(tmp_path / "r"), file, now=NOW - 1)
    assert restore.restore(Paths(tmp_path / "r"), file, PASSPHRASE, clock=CLOCK).epoch == NOW


def test_there_are_so_many_numbers_and_no_more(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be skipped"):
        restored(Paths(tmp_path / "r"), file, skip_numbers=10_000_000)


def test_a_file_that_belongs_elsewhere_is_refused(file: Path, tmp_path: Path) -> None:
    contents, _ = backup.load(file, PASSPHRASE)
    strange = backup.StateFile(name="../../../etc/cron.d/x", mode=0o644, content=b"x")
    bad = resealed(file, tmp_path / "b", files=[*contents.files, strange])
    with pytest.raises(StorageError, match="which is no file of a controller"):
        restored(Paths(tmp_path / "r"), bad)
    assert not (tmp_path / "etc").exists()
    assert not (tmp_path / "r/etc/cron.d").exists()


def test_what_an_earlier_try_left_is_replaced(file: Path, tmp_path: Path) -> None:
    paths = Paths(tmp_path / "r")
    for directory in (paths.state / STAGING, paths.controller_state):
        directory.mkdir(parents=True)
        (directory / "left.over").write_text("x")
    restored(paths, file)
    assert not (paths.controller_state / "left.over").exists()
    assert not (paths.state / STAGING).exists()
