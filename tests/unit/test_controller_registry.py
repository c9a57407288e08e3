"""The registry against a real store: one transaction a change, memory never ahead of the store, numbers given once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_parts import NOW, Book, book, request, turns

from appliance.controller import records
from appliance.controller.records import ImageKeyRecord, SeRecord
from appliance.controller.registry import Registry, drift
from appliance.controller.store.port import OvertakenError, Put
from appliance.errors import NotFoundError, StoreError, UsageError
from appliance.pki import ssh_keys
from appliance.protocol import standing
from appliance.protocol.enroll import NONCE_LIFE_S, Decision, InstanceFacts, Policy, Refusals, SeStatus
from appliance.protocol.seed import Hints

Act = Callable[[Book, ImageKeyRecord], Coroutine[Any, Any, None]]


def run(path: Path, act: Act, **terms: Any) -> None:
    """Runs `act` on a fresh book with one image key."""

    async def go() -> None:
        async with book(path) as found:
            await act(found, await found.image_key(**terms))

    asyncio.run(go())


async def enrolled(found: Book, key: ImageKeyRecord, name: str = "") -> SeRecord:
    outcome = await found.enroll(key, request(hints=Hints(name=name)))
    assert outcome.record is not None
    return outcome.record


def known(registry: Registry) -> tuple[object, ...]:
    """All that a registry knows, for comparing two of them."""
    return (
        dict(registry._ses),
        dict(registry._by_key),
        dict(registry._by_number),
        dict(registry._image_keys),
        registry.next_number,
        registry.audit.head,
        registry.audit.count,
    )


async def agrees(found: Book) -> None:
    """Memory is what a restart would read, the audit holds, and no number or use was given twice."""
    fresh = found.another()
    await fresh.load(reserved=())
    assert known(found.registry) == known(fresh)
    assert (await fresh.audit.verify()).intact
    numbers = [record.number for record, _ in fresh._ses.values()]
    assert sorted(numbers) == list(range(1, fresh.next_number))
    for key in fresh.image_keys():
        assert key.uses == sum(1 for record, _ in fresh._ses.values() if record.image_key_id == key.image_key_id)


# One transaction.


def test_an_enrollment_is_one_transaction(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        found.store.txns = 0
        before = (await found.store.txn([], [])).revision
        wish = request()
        outcome = await found.enroll(key, wish)
        record = outcome.record
        assert record is not None
        assert outcome.verdict.decision is Decision.GRANT_NEW
        assert found.store.txns == 2  # the one above and the enrollment's
        written = {
            entry.key: entry.mod_revision
            for prefix in ("se/", "key/", "number", "image-key/", "nonce/", "audit")
            for entry in await found.store.range(prefix)
            if entry.mod_revision > before
        }
        assert set(written.values()) == {before + 1}
        assert set(written) == {
            f"se/{record.se_id}",
            f"key/{record.thumbprint}",
            "number/00000001",
            "number-next",
            f"image-key/{key.image_key_id}",
            f"nonce/{wish.nonce}",
            "audit/1/000000000002",
            "audit-head/1",
        }
        await agrees(found)

    run(tmp_path, act)


CHANGES: dict[str, Callable[[Book, ImageKeyRecord, SeRecord], Awaitable[Any]]] = {
    "enroll": lambda found, key, se: found.enroll(key),
    "update": lambda found, key, se: found.registry.update_se(se, msgspec.structs.replace(se, ticket="t-1")),
    "audited": lambda found, key, se: found.registry.update_audited(
        se, msgspec.structs.replace(se, confirmed_at=NOW), actor="a", action="enroll.spent"
    ),
    "status": lambda found, key, se: found.admission.act(se.se_id, standing.Act.REVOKE, actor="a", reason="r"),
    "note": lambda found, key, se: found.registry.note(actor="a", action="x", subject="s"),
    "create key": lambda found, key, se: found.image_key(),
    "revoke key": lambda found, key, se: found.registry.revoke_image_key(key.image_key_id, actor="a", reason="r"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("fault", ["before", "after"])
def test_memory_follows_the_store_after_a_commit_that_failed(
    tmp_path: Path, change: Callable[[Book, ImageKeyRecord, SeRecord], Awaitable[Any]], fault: str
) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        before = known(found.registry)
        found.store.fail = [fault]
        with pytest.raises(StoreError):
            await change(found, key, se)
        assert known(found.registry) == before  # nothing is believed that wasn't acknowledged
        await found.registry.note(actor="test", action="next.turn", subject="")
        await agrees(found)
        await found.enroll(key)
        await agrees(found)

    run(tmp_path, act)


@pytest.mark.parametrize("fault", ["before", "after"])
def test_an_se_that_repeats_a_failed_enrollment_is_counted_once(tmp_path: Path, fault: str) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        wish = request()
        found.store.fail = [fault]
        with pytest.raises(StoreError) as caught:
            await found.enroll(key, wish)
        assert caught.value.retryable
        again = msgspec.structs.replace(wish, nonce="another")
        outcome = await found.enroll(key, again)
        assert outcome.record is not None
        assert outcome.record.number == 1
        assert outcome.verdict.decision is (Decision.GRANT_NEW if fault == "before" else Decision.GRANT_AGAIN)
        await agrees(found)

    run(tmp_path, act)


def test_a_store_that_fails_while_it_is_read_anew_is_read_again(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        found.store.fail = ["after"]
        with pytest.raises(StoreError):
            await found.admission.act(se.se_id, standing.Act.REVOKE, actor="a", reason="r")
        working, calls = found.store.range, []

        async def failing(prefix: str, **more: Any) -> Any:
            calls.append(prefix)
            if len(calls) == 2:
                raise StoreError("cannot read")
            return await working(prefix, **more)

        found.store.range = failing  # type: ignore[method-assign]
        with pytest.raises(StoreError, match="cannot read"):
            await found.registry.note(actor="a", action="x", subject="s")
        await found.registry.note(actor="a", action="x", subject="s")
        now = found.registry.se(se.se_id)
        assert now is not None
        assert now.status is SeStatus.REVOKED
        await agrees(found)

    run(tmp_path, act)


def test_numbers_are_never_given_twice(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        outcomes = await asyncio.gather(*(found.enroll(key) for _ in range(20)))
        found.store.fail = ["before", "after", "", "after", "before"]
        failed = await asyncio.gather(*(found.enroll(key) for _ in range(8)), return_exceptions=True)
        assert sum(isinstance(one, StoreError) for one in failed) == 4
        se = outcomes[7].record
        assert se is not None
        await found.admission.act(se.se_id, standing.Act.DELETE, actor="a", reason="")
        newest = await enrolled(found, key)
        given = [one.record.number for one in (*outcomes, *failed) if not isinstance(one, BaseException) and one.record]
        assert len(set(given)) == len(given) == 24
        assert newest.number == 27  # two of the failed ones had happened
        await agrees(found)

    run(tmp_path, act)


def test_another_node_that_took_the_number_is_noticed(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        await found.store.txn([], [Put(records.NUMBER_NEXT, b"41")])
        with pytest.raises(StoreError, match="changed under a decision") as caught:
            await found.enroll(key)
        assert caught.value.retryable
        assert (await enrolled(found, key)).number == 41

    run(tmp_path, act)


def test_the_last_number_is_the_last(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        await found.store.txn([], [Put(records.NUMBER_NEXT, str(127 * 65536 - 1).encode())])
        await found.registry.load(reserved=())
        assert (await enrolled(found, key)).number == 127 * 65536 - 1
        outcome = await found.enroll(key)
        assert (outcome.verdict.refusal, outcome.record) == (Refusals.NUMBERS, None)

    run(tmp_path, act)


# Uses and nonces.


def test_uses_are_counted_once_and_end(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        wish = request()
        for nonce in ("n-1", "n-2", "n-3"):
            assert (await found.enroll(key, msgspec.structs.replace(wish, nonce=nonce))).record is not None
        assert [entry.uses for entry in found.registry.image_keys()] == [1]
        outcomes = await asyncio.gather(*(found.enroll(key) for _ in range(5)))
        refusals = [one.verdict.refusal for one in outcomes]
        assert refusals.count(Refusals.IMAGE_KEY_USED_UP) == 3
        await agrees(found)

    run(tmp_path, act, max_uses=3)


def test_a_nonce_enrolls_once_even_where_memory_forgot_it(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        wish = request(nonce="n-1")
        await found.enroll(key, wish)
        for other in (request(nonce="n-1"), wish):
            with pytest.raises(StoreError, match="changed under a decision"):
                await found.enroll(key, other)
        await agrees(found)

    run(tmp_path, act)


def test_used_nonces_outlive_a_restart_but_not_their_freshness(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        await found.enroll(key, request(nonce="n-1"))
        found.clock.pass_s(59)
        await found.enroll(key, request(nonce="n-2"))
        found.clock.pass_s(NONCE_LIFE_S)

        async def remembered() -> list[str]:
            await found.store.txn([], [])  # leases end in the writing thread's next turn
            fresh = found.another()
            await fresh.load(reserved=())
            return fresh.used_nonces

        assert "n-2" in await remembered()
        found.clock.pass_s(61)
        assert await remembered() == []

    run(tmp_path, act)


# Races.


def test_a_revoke_is_not_undone_by_who_was_waiting_behind_it(tmp_path: Path) -> None:
    """A confirmation that was computed before a revoke, and committed after it, must not make the SE enrolled again."""

    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        confirmed = msgspec.structs.replace(se, confirmed_at=NOW, ticket="t-1")
        found.store.gate = asyncio.Event()
        revoke = asyncio.create_task(found.admission.act(se.se_id, standing.Act.REVOKE, actor="a", reason="r"))
        await asyncio.sleep(0)
        late = asyncio.create_task(found.registry.update_audited(se, confirmed, actor="se", action="enroll.spent"))
        await asyncio.sleep(0)
        found.store.gate.set()
        assert (await revoke).record.status is SeStatus.REVOKED
        with pytest.raises(StoreError, match="changed meanwhile") as caught:
            await late
        assert caught.value.retryable
        with pytest.raises(StoreError, match="changed meanwhile"):
            await found.registry.update_se(se, confirmed)
        now = found.registry.se(se.se_id)
        assert now is not None
        assert now.status is SeStatus.REVOKED
        await agrees(found)

    run(tmp_path, act)


@pytest.mark.parametrize("doing", [standing.Act.REVOKE, standing.Act.DELETE])
def test_a_revoke_that_meets_a_ticket_waits_for_it(tmp_path: Path, doing: standing.Act) -> None:
    """The ticket's commit is under way when the operator comes: neither fails, and the revoke has the last word."""

    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        ticketed = msgspec.structs.replace(se, ticket_pending="t-1")
        found.store.gate, before = asyncio.Event(), found.store.txns
        hello = asyncio.create_task(found.registry.update_se(se, ticketed))
        await turns(lambda: found.store.txns > before)
        revoke = asyncio.create_task(found.admission.act(se.se_id, doing, actor="a", reason="r"))
        await turns(lambda: found.registry._ledger.locked())
        found.store.gate.set()
        await hello
        record = (await revoke).record
        assert record.status in {SeStatus.REVOKED, SeStatus.DELETED}
        assert record.ticket_pending == "t-1"
        assert not found.registry._writing
        await agrees(found)

    run(tmp_path, act)


def test_an_se_is_changed_as_it_stands_when_its_turn_has_come(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        found.store.gate, before = asyncio.Event(), found.store.txns
        hello = asyncio.create_task(found.registry.update_se(se, msgspec.structs.replace(se, ticket_pending="t-1")))
        await turns(lambda: found.store.txns > before)

        def due(record: SeRecord) -> SeRecord:
            return msgspec.structs.replace(record, key_due=True)

        changes = [
            asyncio.create_task(found.registry.change_se(se.se_id, due, actor="a", action="se.key-due"))
            for _ in range(2)
        ]
        await turns(lambda: found.registry._ledger.locked())
        found.store.gate.set()
        await hello
        first, second = await asyncio.gather(*changes)
        assert first == second == msgspec.structs.replace(se, ticket_pending="t-1", key_due=True)
        audited = [entry.action for entry in await found.registry.audit.read(after=0, limit=100)]
        assert audited.count("se.key-due") == 1, "what changes nothing leaves no entry"
        with pytest.raises(NotFoundError):
            await found.registry.change_se("nobody", due, actor="a", action="se.key-due")
        await agrees(found)

    run(tmp_path, act)


def test_what_an_se_told_of_its_image_key_stays_and_overtakes_no_decision(tmp_path: Path) -> None:
    """Its first heartbeat tells it; the hello of its next link may have been read before that was stored."""

    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        found.store.gate = asyncio.Event()
        told = asyncio.create_task(
            found.registry.change_se(
                se.se_id, lambda was: msgspec.structs.replace(was, image_key_gone_at=NOW), actor="se", action="gone"
            )
        )
        await asyncio.sleep(0)
        greeted = asyncio.create_task(found.registry.update_se(se, msgspec.structs.replace(se, ticket_pending="t-1")))
        await asyncio.sleep(0)
        found.store.gate.set()
        await asyncio.gather(told, greeted)
        now = found.registry.se(se.se_id)
        assert now is not None
        assert (now.image_key_gone_at, now.ticket_pending) == (NOW, "t-1")
        with pytest.raises(StoreError, match="changed meanwhile"):
            await found.registry.update_se(se, msgspec.structs.replace(se, ticket="t-0"))
        await agrees(found)

    run(tmp_path, act)


def test_a_revoke_whose_answer_was_lost_is_not_undone(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        found.store.fail = ["after"]
        with pytest.raises(StoreError):
            await found.admission.act(se.se_id, standing.Act.REVOKE, actor="a", reason="r")
        with pytest.raises(StoreError, match="changed meanwhile"):
            await found.registry.update_se(se, msgspec.structs.replace(se, ticket="t-1"))
        now = found.registry.se(se.se_id)
        assert now is not None
        assert (now.status, now.ticket) == (SeStatus.REVOKED, "")

    run(tmp_path, act)


def test_of_two_changes_from_one_record_one_holds(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        tickets = [msgspec.structs.replace(se, ticket=name) for name in ("one", "two")]
        outcomes = await asyncio.gather(
            *(found.registry.update_se(se, changed) for changed in tickets), return_exceptions=True
        )
        assert [type(one) for one in outcomes].count(OvertakenError) == 1
        await found.registry.note(actor="a", action="x", subject="s")
        await agrees(found)

    run(tmp_path, act)


def test_a_deleted_se_stays_deleted(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        registry = found.registry
        _, refused = await asyncio.gather(
            found.admission.act(se.se_id, standing.Act.DELETE, actor="a", reason="gone"),
            found.admission.act(se.se_id, standing.Act.REVOKE, actor="b", reason="bad"),
            return_exceptions=True,
        )
        assert isinstance(refused, UsageError)
        now = registry.se(se.se_id)
        assert now is not None
        assert (now.status, now.status_reason) == (SeStatus.DELETED, "gone")
        actions = [entry.action for entry in await registry.audit.read()]
        assert actions == ["image-key.created", "enroll.granted", "se.deleted"]
        assert registry.ses() == []
        # The tombstone keeps id and key from coming back.
        wish = request(se_id=se.se_id)
        assert (await found.enroll(key, wish)).verdict.refusal is Refusals.DELETED
        wish = request(se_key=se.se_key)
        assert (await found.enroll(key, wish)).verdict.refusal is Refusals.CLONED_KEY
        await agrees(found)

    run(tmp_path, act)


# Decisions the registry adds to the table.


def test_keys_with_another_role_are_refused(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        login = request().se_key
        await found.registry.load(reserved=[ssh_keys.fingerprint(login)])
        for line in (login, key.public_key):
            outcome = await found.enroll(key, request(se_key=line))
            assert (outcome.verdict.refusal, outcome.record) == (Refusals.KEY_IN_USE, None)

    run(tmp_path, act)


def test_a_conflict_is_audited_and_leaves_the_first_alone(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        outcome = await found.enroll(key, request(se_id=se.se_id))
        assert outcome.verdict.refusal is Refusals.CONFLICT
        entry = (await found.registry.audit.read())[-1]
        assert (entry.action, entry.subject, entry.detail) == (
            "enroll.refused",
            se.se_id,
            Refusals.CONFLICT.value.code,
        )
        assert found.registry.se(se.se_id) == se
        # Who asks again and again, with an image key and new keys, doesn't fill the audit.
        door, told = found.admission, []
        for _ in range(5):
            wish = request(se_id=se.se_id)
            again = await door.enroll(
                wish, thumbprint=ssh_keys.fingerprint(wish.se_key), image_key_id=key.image_key_id, source="192.0.2.1"
            )
            told.append(again.is_told)
        assert told == [True, False, False, False, False]
        await agrees(found)

    run(tmp_path, act)


def test_other_refusals_write_nothing(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        found.store.txns = 0
        outcome = await found.enroll(key, source="198.51.100.1")
        assert outcome.verdict.refusal is Refusals.SOURCE
        assert found.store.txns == 0

    run(tmp_path, act, networks=["192.0.2.0/24"])


def test_approval_is_stored_as_pending(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        outcome = await found.enroll(key)
        assert outcome.record is not None
        assert (outcome.verdict.decision, outcome.record.status) == (Decision.PENDING, SeStatus.PENDING)
        await agrees(found)

    run(tmp_path, act, policy=Policy.APPROVE)


# Looking up.


def test_ses_are_found_by_all_their_names(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        one, two, three = [await enrolled(found, key, name) for name in ("", "db", "web")]
        find = found.registry.find
        for record, names in ((one, ["1", "127.1.0.1", "se-1"]), (two, ["2", "0002", "127.1.0.2", "db"])):
            for name in (*names, record.se_id):
                assert find(name) == record, name
        assert found.registry.se_by_key(three.thumbprint) == three
        assert found.registry.ses() == [one, two, three]
        for unknown in ("4", "0", "127.1.0.4", "127.1.0.0", "127.0.0.1", "D B", "", "-1", "9" * 6000, "٣", "1.0"):
            with pytest.raises(NotFoundError):
                find(unknown)

    run(tmp_path, act)


def test_an_ambiguous_name_asks_for_a_number(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        records_ = [await enrolled(found, key, "twin") for _ in range(3)]
        with pytest.raises(UsageError, match="3 SEs are named 'twin'") as caught:
            found.registry.find("twin")
        assert "1, 2, 3" in caught.value.hint
        for record in records_[:2]:
            await found.admission.act(record.se_id, standing.Act.DELETE, actor="a", reason="")
        assert found.registry.find("twin").number == 3
        assert found.registry.find("1").status is SeStatus.DELETED

    run(tmp_path, act)


def test_an_se_can_not_hide_another_by_its_name(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        first = await enrolled(found, key)
        for name in ("1", "127.1.0.1", first.se_id):
            await enrolled(found, key, name)
            assert found.registry.find(name) == first

    run(tmp_path, act)


# Image keys and audit.


def test_revoking_a_key_twice_changes_nothing(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        registry = found.registry
        one = await registry.revoke_image_key(key.image_key_id, actor="a", reason="leaked")
        count = registry.audit.count
        assert await registry.revoke_image_key(key.image_key_id, actor="a", reason="again") == one
        assert registry.audit.count == count
        with pytest.raises(NotFoundError, match="no image key"):
            await registry.revoke_image_key("ik-none", actor="a", reason="")
        assert (await found.enroll(key)).verdict.refusal is Refusals.IMAGE_KEY_REVOKED

    run(tmp_path, act)


def test_the_private_half_is_nowhere_in_the_store(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        for entry in await found.store.range(""):
            assert b"PRIVATE" not in entry.value

    run(tmp_path, act)


def test_the_chain_goes_on_after_a_reload_and_a_change_breaks_it(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        for _ in range(3):
            await enrolled(found, key)
        found.registry = found.another()
        await found.registry.load(reserved=())
        await enrolled(found, key)
        verdict = await found.registry.audit.verify()
        assert (verdict.intact, verdict.entries) == (True, 5)
        (entry,) = await found.store.range("audit/1/", start_after="audit/1/000000000002", limit=1)
        await found.store.txn([], [Put(entry.key, entry.value.replace(b"number 2", b"number 9"))])
        assert not (await found.registry.audit.verify()).intact

    run(tmp_path, act)


def test_records_that_do_not_parse_are_named(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        await found.store.txn([], [Put("se/broken", b"{}")])
        with pytest.raises(StoreError, match="se/broken is no SeRecord") as caught:
            await found.another().load(reserved=())
        assert "backup" in caught.value.hint

    run(tmp_path, act)


def test_many_records_are_read_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.controller.registry.PAGE", 3)

    async def act(found: Book, key: ImageKeyRecord) -> None:
        await asyncio.gather(*(found.enroll(key) for _ in range(10)))
        await agrees(found)

    run(tmp_path, act)


def test_drift_names_what_changed_but_not_the_boot_id(tmp_path: Path) -> None:
    async def act(found: Book, key: ImageKeyRecord) -> None:
        se = await enrolled(found, key)
        assert drift(se) == []
        same = msgspec.structs.replace(se, seen_facts=InstanceFacts(boot_id="b-2"))
        assert drift(same) == []
        moved = msgspec.structs.replace(se, seen_facts=InstanceFacts(boot_id="b-2", macs=["02:00:00:00:00:01"]))
        assert drift(moved) == ["macs was unset, is ['02:00:00:00:00:01']"]

    run(tmp_path, act)
