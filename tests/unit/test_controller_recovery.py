"""RECOVERY: receipts against a real store; numbers are never given twice, nothing replaces what is newer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_parts import Book, book, request

from appliance.controller import material, records
from appliance.controller.admission import AUDITED_REFUSALS_PER_H, Enrolled
from appliance.controller.events import Events
from appliance.controller.material import Files, Material
from appliance.controller.recovery import RECOVERY, Recovery, RecoveryRecord
from appliance.controller.store.port import Put
from appliance.controller.witness import Witness
from appliance.errors import UsageError
from appliance.pki import ssh_keys
from appliance.pki.authority import Authority
from appliance.pki.identity import Identity
from appliance.protocol import strict_json
from appliance.protocol.address import MAX_SE_NUMBER
from appliance.protocol.enroll import Claim, EnrollRequest, RefreshRequest, Refusals, SeStatus
from appliance.protocol.receipt import SKIPPED_NUMBERS
from appliance.protocol.standing import Act
from appliance.protocol.trust import AUDIT_HEAD_TYPE, AuditHead, Envelope, Receipt

EPOCH = 2_000_000_000
MADE_AT = 1_000
NO_ENVELOPE = Envelope(payload="", payload_type="", signatures=[])


class Restored(Book):
    """A book whose controller was restored: the backup knew `known` as the next number."""

    known = 10

    async def begin(self) -> None:
        record = RecoveryRecord(
            epoch=EPOCH, began_at=1, backup_made_at=MADE_AT, backup_epoch=1, numbers_known=self.known,
            numbers_from=self.known + SKIPPED_NUMBERS, tokens_withdrawn=2, audit_sequence=3,
        )  # fmt: skip
        writes = [Put(RECOVERY, records.encode(record)), Put(records.NUMBER_NEXT, str(record.numbers_from).encode())]
        await self.store.txn([], writes)
        await self.registry.load(reserved=())
        self.recovery = Recovery(self.registry, self.store, wall=self.clock.now)
        await self.recovery.load()

    def receipt(self, wish: EnrollRequest, number: int, **changes: Any) -> Receipt:
        fields: dict[str, Any] = {
            "cluster_id": "c-1", "se_id": wish.se_id, "thumbprint": ssh_keys.fingerprint(wish.se_key),
            "number": number, "image_key_id": "ik-unknown", "epoch": 1, "issued_at": int(self.clock.now()),
            "name": f"old-{number}", "labels": {"rack": "7"},
        }  # fmt: skip
        return Receipt(**{**fields, **changes})

    async def claim(self, wish: EnrollRequest, receipt: Receipt) -> Enrolled:
        refresh = RefreshRequest(
            audience="c-1", nonce=wish.nonce, se_id=wish.se_id, agent_version="0.1.0", attempt_id=wish.attempt_id,
            claim=Claim(receipt=NO_ENVELOPE, se_key=wish.se_key, host_keys=wish.host_keys, facts=wish.facts),
        )  # fmt: skip
        thumbprint = ssh_keys.fingerprint(wish.se_key)
        return await self.recovery.claim(refresh, receipt, thumbprint=thumbprint, source="192.0.2.9", epoch=EPOCH)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def go(work: Any) -> None:
        async def inside() -> None:
            found = Restored(tmp_path / "store.sqlite")
            try:
                await found.begin()
                await work(found)
            finally:
                await found.store.close()

        asyncio.run(inside())

    return go


def test_an_unknown_se_is_held_under_its_old_number_and_name(run: Any) -> None:
    async def work(at: Restored) -> None:
        wish = request()
        outcome = await at.claim(wish, at.receipt(wish, 12))
        record = outcome.record
        assert record is not None
        assert (record.status, record.number, record.name, record.labels) == (
            SeStatus.PENDING, 12, "old-12", {"rack": "7"},
        )  # fmt: skip
        assert outcome.is_new
        assert not (await at.claim(wish, at.receipt(wish, 12))).is_new
        assert at.recovery.waiting() == list(at.recovery.approvable()) == [record]
        assert "1 SEs show receipts" in at.recovery.problem()
        # Its image key was made after the backup: that strands nobody.
        acted = await at.admission.act(record.se_id, Act.REJECT, actor="t", reason="")
        again = await at.admission.act(record.se_id, Act.REINSTATE, actor="t", reason="")
        approved = await at.admission.act(record.se_id, Act.APPROVE, actor="t", reason="")
        assert (acted.changed, again.changed, approved.record.number) == (True, True, 12)
        assert at.registry.next_number == at.known + SKIPPED_NUMBERS

    run(work)


def test_a_number_that_is_anothers_by_now_is_never_given_twice(run: Any) -> None:
    async def work(at: Restored) -> None:
        first, second = request(), request()
        await at.claim(first, at.receipt(first, 12))
        outcome = await at.claim(second, at.receipt(second, 12))
        assert outcome.record is not None
        assert outcome.record.number == at.known + SKIPPED_NUMBERS
        assert "is old-12's by now" in outcome.record.receipt_fault
        assert [record.se_id for record in at.recovery.approvable()] == [first.se_id]
        assert any("is not approved with the others" in text for text in at.recovery.warnings())
        key = await at.image_key()
        fresh = (await at.enroll(key)).record
        assert fresh is not None
        assert fresh.number == outcome.record.number + 1

    run(work)


def test_numbers_beyond_those_that_were_skipped_move_new_ones_on(run: Any) -> None:
    async def work(at: Restored) -> None:
        wish, shown = request(), at.known + SKIPPED_NUMBERS + 5
        await at.claim(wish, at.receipt(wish, shown))
        assert at.registry.next_number == shown + SKIPPED_NUMBERS
        other = at.another()
        await other.load(reserved=())
        assert other.next_number == shown + SKIPPED_NUMBERS
        last, late = request(), request()
        await at.claim(last, at.receipt(last, MAX_SE_NUMBER))
        refused = await at.claim(late, at.receipt(late, MAX_SE_NUMBER))
        assert refused.verdict.refusal is Refusals.NUMBERS

    run(work)


def test_a_newer_key_takes_the_backups_place_and_an_older_one_does_not(run: Any) -> None:
    async def work(at: Restored) -> None:
        key = await at.image_key()
        was = (await at.enroll(key)).record
        assert was is not None
        changed = request(se_id=was.se_id)
        stale = at.receipt(changed, was.number, issued_at=int(was.enrolled_at))
        assert (await at.claim(changed, stale)).verdict.refusal is Refusals.CONFLICT
        at.clock.pass_s(10)
        outcome = await at.claim(changed, at.receipt(changed, was.number))
        assert outcome.record is not None
        assert outcome.record.number == was.number
        assert outcome.record.name == was.name
        assert at.registry.se_by_key(was.thumbprint) is None
        uses = at.registry.image_key(key.image_key_id)
        assert uses is not None
        assert uses.uses == 1, "it was counted when it enrolled"

    run(work)


def test_a_use_of_an_image_key_is_counted_again(run: Any) -> None:
    async def work(at: Restored) -> None:
        key, wish = await at.image_key(), request()
        await at.claim(wish, at.receipt(wish, 12, image_key_id=key.image_key_id))
        found = at.registry.image_key(key.image_key_id)
        assert found is not None
        assert found.uses == 1

    run(work)


def test_a_key_with_another_role_gets_in_by_no_receipt(run: Any) -> None:
    async def work(at: Restored) -> None:
        identity = Identity.create()
        wish = request(se_key=identity.public_line)
        at.registry.reserve([identity.thumbprint])
        assert (await at.claim(wish, at.receipt(wish, 12))).verdict.refusal is Refusals.KEY_IN_USE
        plain = RefreshRequest(audience="c-1", nonce="n", se_id=wish.se_id, agent_version="0", attempt_id="a")
        refused = await at.recovery.claim(plain, at.receipt(wish, 12), thumbprint="x", source="s", epoch=EPOCH)
        assert refused.verdict.refusal is Refusals.SE_UNKNOWN

    run(work)


def test_recovery_ends_and_begins_again(run: Any) -> None:
    async def work(at: Restored) -> None:
        with pytest.raises(UsageError, match="RECOVERY already"):
            await at.recovery.begin(actor="t", reason="")
        await at.recovery.end(actor="t", reason="all are back")
        assert not at.recovery.is_active
        assert at.recovery.problem() == ""
        with pytest.raises(UsageError, match="not in RECOVERY"):
            await at.recovery.end(actor="t", reason="")
        again = Recovery(at.registry, at.store, wall=at.clock.now)
        await again.load()
        assert not again.is_active
        await again.begin(actor="t", reason="one was off")
        assert again.is_active
        actions = [entry.action for entry in await at.registry.audit.read()]
        assert actions == ["recovery.ended", "recovery.begun"]
        warnings = " ".join(again.warnings())
        for word in ("can't be known", "image keys revoked", "2 tokens were withdrawn"):
            assert word in warnings

    run(work)


def test_a_controller_that_was_never_restored_takes_no_receipts(tmp_path: Path) -> None:
    async def go() -> None:
        async with book(tmp_path) as at:
            recovery = Recovery(at.registry, at.store, wall=at.clock.now)
            await recovery.load()
            assert not recovery.is_active
            assert recovery.warnings() == []
            assert recovery.problem() == ""
            with pytest.raises(UsageError, match="was not restored"):
                await recovery.begin(actor="t", reason="")

    asyncio.run(go())


def test_a_flood_of_conflicts_does_not_fill_the_audit(tmp_path: Path) -> None:
    """Whoever can read an image can ask with its key: that must not write the disk full."""

    async def go() -> None:
        async with book(tmp_path) as at:
            key = await at.image_key()
            known = (await at.enroll(key)).record
            assert known is not None
            before, door = at.registry.audit.count, at.admission

            async def conflict(se_id: str) -> Enrolled:
                wish = request(se_id=se_id)
                thumbprint = ssh_keys.fingerprint(wish.se_key)
                return await door.enroll(wish, thumbprint=thumbprint, image_key_id=key.image_key_id, source="s")

            told = [await conflict(known.se_id) for _ in range(50)]
            assert {outcome.verdict.refusal for outcome in told} == {Refusals.CONFLICT}
            assert [outcome.is_told for outcome in told] == [True] + [False] * 49
            assert at.registry.audit.count == before + 1
            others = [(await at.enroll(key)).record for _ in range(250)]
            for number, other in enumerate(others):
                assert other is not None
                # Many at once, then one by one until the hour is over.
                at.clock.pass_s(0 if number < 150 else 35)
                await conflict(other.se_id)
            audited = at.registry.audit.count - before - len(others)
            assert AUDITED_REFUSALS_PER_H * 0.9 < audited <= AUDITED_REFUSALS_PER_H
            at.clock.pass_s(3601)
            assert (await conflict(known.se_id)).is_told

    asyncio.run(go())


def test_records_from_before_this_stage_are_read(tmp_path: Path) -> None:
    async def go() -> None:
        async with book(tmp_path) as at:
            key = await at.image_key()
            record = (await at.enroll(key)).record
            assert record is not None
            fields = msgspec.to_builtins(record)
            for name in ("receipt_epoch", "receipt_fault", "key_at"):
                del fields[name]
            assert records.decode(msgspec.json.encode(fields), records.SeRecord, "k") == record

    asyncio.run(go())


@pytest.mark.parametrize(
    ("time", "epoch", "told"),
    [(MADE_AT, 1, True), (MADE_AT - 1, 1, False), (MADE_AT, EPOCH, False), (MADE_AT, 0, False)],
    ids=["after the backup", "before the backup", "after the restore", "of an earlier life"],
)
def test_only_a_head_of_the_lost_time_tells_of_another_root(
    run: Any, tmp_path: Path, time: int, epoch: int, told: bool
) -> None:
    """An SE that slept since a root before the backup's shows a head that nobody here can verify, too."""

    async def work(at: Restored) -> None:
        files = Files(tmp_path / "state")
        material.create(files, cluster_id="c-1", addresses=["a"], enroll_port=8443, ssh_port=22, now=1_800_000_000)
        events = Events(at.clock.now)
        witness = Witness(Material(files), at.registry, at.recovery, events, wall=at.clock.now)
        head = AuditHead(cluster_id="c-1", node=1, epoch=epoch, sequence=5, hash="0" * 64, time=time)
        other = Authority.create("c-1", now=1_800_000_000).sign(AUDIT_HEAD_TYPE, strict_json.encode(head))
        await witness.shown([other], by="se-1", source="192.0.2.9")
        assert any("root CA was changed after this backup" in text for text in at.recovery.warnings()) is told

    run(work)
