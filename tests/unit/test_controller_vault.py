"""controller.vault: who may have the root opened, and how often it may be tried."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from appliance.controller import material, trust
from appliance.controller.material import Files, Material
from appliance.controller.rotation import Kind, Rotation, make_root
from appliance.controller.trust import Publication
from appliance.controller.vault import MAX_WAIT_S, Vault
from appliance.errors import PassphraseError, StorageError, TooSoonError, UsageError, WrongPassphraseError
from appliance.pki import sealed
from appliance.pki.secret import Secret
from appliance.protocol.operator import Forced, IssuingRenewal, NewPassphrase, Unlocking

NOW = 1_800_000_000
WORD, WRONG, NEW = (
    Secret(text) for text in (b"correct horse battery", b"wrong horse battery", b"another horse battery")
)


class Stand:
    """A vault over a state on disk, with a clock that stands."""

    def __init__(self, state: Path, passphrase: Secret | None) -> None:
        files = Files(state)
        material.create(
            files, cluster_id="c-1", addresses=["127.0.0.1"], enroll_port=8443, ssh_port=22, now=NOW,
            passphrase=passphrase,
        )  # fmt: skip
        self.at, self.switched = 0.0, 0
        self.material = Material(files)
        self.publication = Publication(self.material, on_publish=lambda _: None, wall=lambda: NOW)
        self.vault = Vault(
            self.material, self.publication, on_switch=self._switched, wall=lambda: NOW, monotonic=lambda: self.at
        )

    def _switched(self) -> None:
        self.switched += 1

    async def open(self, passphrase: Secret | None) -> bool:
        """Opens the root for one act, and tells whether it was open in it."""
        async with self.vault.opened(passphrase):
            return not self.material.authority.is_locked


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "SCRYPT_LOG2_N", 4)


def test_the_root_is_open_for_one_act_alone(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "state", WORD)
    assert asyncio.run(stand.open(WORD))
    assert stand.material.authority.is_locked
    assert not asyncio.run(stand.open(None))
    with pytest.raises(PassphraseError, match="is locked"):
        stand.material.check_open()


def test_an_act_that_fails_leaves_the_root_locked(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "state", WORD)

    async def go() -> None:
        async with stand.vault.opened(WORD):
            raise UsageError("no")

    with pytest.raises(UsageError):
        asyncio.run(go())
    assert stand.material.authority.is_locked


def test_after_a_wrong_passphrase_the_next_one_waits(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "state", WORD)

    async def go() -> None:
        waits = []
        for _ in range(9):
            with pytest.raises(WrongPassphraseError):
                await stand.open(WRONG)
            waits.append(stand.vault.wait_s)
            with pytest.raises(TooSoonError, match="looked at in"):
                await stand.open(WORD)
            stand.at += stand.vault.wait_s
        assert waits == [1, 2, 4, 8, 16, 32, MAX_WAIT_S, MAX_WAIT_S, MAX_WAIT_S]
        assert await stand.open(WORD)
        # The right one takes the count back.
        with pytest.raises(WrongPassphraseError):
            await stand.open(WRONG)
        assert stand.vault.wait_s == 1

    asyncio.run(go())


def test_many_guesses_at_once_are_looked_at_one_by_one(tmp_path: Path) -> None:
    stand = Stand(tmp_path / "state", WORD)

    async def go() -> list[bool | BaseException]:
        return await asyncio.gather(*(stand.open(WRONG) for _ in range(20)), return_exceptions=True)

    kinds = [type(found) for found in asyncio.run(go())]
    assert kinds.count(WrongPassphraseError) == 1
    assert kinds.count(TooSoonError) == 19


def test_what_makes_no_sense_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    plain, locked = Stand(tmp_path / "plain", None), Stand(tmp_path / "locked", WORD)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    async def go() -> None:
        for act in (
            plain.vault.change(WORD, NEW), plain.vault.remove(WORD), plain.vault.renew_issuing(WORD, revoke=False),
            locked.vault.set(NEW), plain.vault.set(Secret(b"short")), locked.vault.change(WORD, Secret(b"short")),
        ):  # fmt: skip
            with pytest.raises(UsageError):
                await act
        for act in (locked.vault.change(WRONG, NEW), locked.vault.remove(WRONG)):
            with pytest.raises(WrongPassphraseError):
                await act
            locked.at += 10

    asyncio.run(go())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert plain.switched == locked.switched == 0


def test_a_locked_root_without_its_issuing_ca_or_with_another_roots_is_named(tmp_path: Path) -> None:
    stand, other = Stand(tmp_path / "state", WORD), Stand(tmp_path / "other", WORD)
    files = stand.material.files
    for path, theirs in (
        (files.issuing_certificate, other.material.files.issuing_certificate),
        (files.issuing_key, other.material.files.issuing_key),
    ):
        path.write_bytes(theirs.read_bytes())
    with pytest.raises(StorageError, match="was not issued by the root CA"):
        Material(files)
    files.issuing_key.unlink()
    with pytest.raises(StorageError, match=r"issuing-ca.key is missing"):
        Material(files)


def revoked_keys(count: int) -> list[str]:
    return [f"{number:064x}" for number in range(count)]


def state_of(files: Files) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in files.state.rglob("*") if path.is_file()}


def test_a_trust_document_too_large_to_be_read_again_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    """Stored, no start of this node would read it."""
    stand = Stand(tmp_path / "state", WORD)
    files, publication = stand.material.files, stand.publication

    async def revoke() -> None:
        await stand.vault.renew_issuing(WORD, revoke=True)

    with stand.material.unlocked(stand.material.unlock(WORD)):
        publication.publish(revoked_node_keys=revoked_keys(2000))
        assert publication.problem() == ""
        publication.publish(revoked_node_keys=revoked_keys(2650))
    assert "the trust document has 23" in publication.problem()
    asyncio.run(revoke())
    with stand.material.unlocked(stand.material.unlock(WORD)):
        for more in (2740, 4000):
            with pytest.raises(UsageError, match="at most 245760 expected; ") as refused:
                publication.publish(revoked_node_keys=revoked_keys(more))
        assert "without --revoke" in refused.value.hint
        for count in range(2660, 2740):  # to the last one that there is room for
            with contextlib.suppress(UsageError):
                publication.publish(revoked_node_keys=revoked_keys(count))
    before = state_of(files)
    with pytest.raises(UsageError, match="revoked keys are in it"):
        asyncio.run(revoke())
    assert state_of(files) == before
    assert Material(files).trust == stand.material.trust
    # What the hint says can still be done: the revoked keys leave room for it.
    asyncio.run(stand.vault.renew_issuing(WORD, revoke=False))
    rotation = Rotation(stand.material, publication, waiting=lambda _: [], on_switch=lambda _: None, wall=lambda: NOW)
    for kind in Kind:
        with stand.material.unlocked(stand.material.unlock(WORD)):
            rotation.begin(kind, make_root("c-1", now=NOW, passphrase=WORD) if kind is Kind.CA else None)
    for kind in Kind:
        with stand.material.unlocked(stand.material.unlock(WORD)):
            rotation.finish(kind)
    assert Material(files).trust.roots != [before[files.root_certificate].decode()]


def test_a_change_that_the_trust_document_has_no_room_for_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path / "state", None)
    files = stand.material.files
    monkeypatch.setattr(trust, "MAX_TRUST_BYTES", len(files.trust.read_bytes()) + 50)
    rotation = Rotation(
        stand.material, stand.publication, waiting=lambda _: [], on_switch=lambda _: None, wall=lambda: NOW
    )
    before = state_of(files)
    for kind in Kind:
        with pytest.raises(UsageError, match="the trust document would have"):
            rotation.begin(kind)
        assert rotation.view(kind).phase == "none"
        after = state_of(files)
        after.pop(files.state / "rotation.json")
        assert after == before
        assert stand.material.successor is None


def test_a_request_with_a_passphrase_never_shows_it() -> None:
    for body in (
        Unlocking(passphrase="hush"), Forced(passphrase="hush"), NewPassphrase(passphrase="hush", new="hush"),
        IssuingRenewal(passphrase="hush"),
    ):  # fmt: skip
        assert "hush" not in f"{body!r} {body} {list(body.__rich_repr__())}"
