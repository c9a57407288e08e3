"""Audited changes in groups: few commits for many, and each caller gets an answer of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_parts import Book, book, request, turns

from appliance.controller.changes import GROUP
from appliance.controller.records import SeRecord, encode
from appliance.controller.store.port import OvertakenError, Put
from appliance.errors import StoreError
from appliance.protocol.audit import AuditEntry

Act = Callable[[Book, list[SeRecord]], Coroutine[Any, Any, None]]


def run(path: Path, act: Act, *, ses: int) -> None:
    """Runs `act` on a fresh book with so many SEs; afterwards memory is what a restart reads, and the audit holds."""

    async def go() -> None:
        async with book(path) as found:
            key = await found.image_key()
            enrolled = [(await found.enroll(key, request())).record for _ in range(ses)]
            await act(found, [record for record in enrolled if record is not None])
            assert not found.registry._changes._waiting
            fresh = found.another()
            await fresh.load(reserved=())
            assert found.registry._ses == fresh._ses
            assert (found.registry.audit.head, found.registry.audit.count) == (fresh.audit.head, fresh.audit.count)
            assert (await fresh.audit.verify()).intact

    asyncio.run(go())


def confirm(found: Book, se: SeRecord, **changes: Any) -> asyncio.Task[None]:
    """One SE's confirmation, begun and waiting for its turn."""
    changed = msgspec.structs.replace(se, **(changes or {"confirmed_at": 1.0}))
    return asyncio.create_task(found.registry.update_audited(se, changed, actor="se", action="spent"))


async def spent(found: Book) -> list[AuditEntry]:
    """What the audit tells of confirmations."""
    return [entry for entry in await found.registry.audit.read(after=0, limit=1000) if entry.action == "spent"]


def test_many_that_wait_take_few_commits_and_an_entry_each(tmp_path: Path) -> None:
    async def act(found: Book, ses: list[SeRecord]) -> None:
        before = found.store.txns
        await asyncio.gather(*(confirm(found, se) for se in ses))
        # The first finds nobody waiting; the rest come while it is committed.
        assert found.store.txns - before == 3
        assert [entry.subject for entry in await spent(found)] == [se.se_id for se in ses]
        assert all(now.confirmed_at == 1.0 for se in ses if (now := found.registry.se(se.se_id)))

    run(tmp_path, act, ses=1 + GROUP + 1)


def test_what_can_not_be_changed_fails_alone(tmp_path: Path) -> None:
    async def act(found: Book, ses: list[SeRecord]) -> None:
        first, second, third = ses
        outdated = msgspec.structs.replace(second, ticket="older")

        def broken(_: SeRecord) -> SeRecord:
            raise ZeroDivisionError

        async with found.registry.turn():
            tasks = [confirm(found, se) for se in (first, outdated, third)]
            tasks.append(asyncio.create_task(found.registry.change_se("nobody", broken, actor="a", action="x")))
            tasks.append(asyncio.create_task(found.registry.change_se(second.se_id, broken, actor="a", action="x")))
            await turns(lambda: len(found.registry._changes._waiting) == len(tasks))
            before = found.store.txns
        told = [type(one).__name__ for one in await asyncio.gather(*tasks, return_exceptions=True)]
        assert told == ["NoneType", "OvertakenError", "NoneType", "NotFoundError", "ZeroDivisionError"]
        assert found.store.txns - before == 1
        assert [entry.subject for entry in await spent(found)] == [first.se_id, third.se_id]

    run(tmp_path, act, ses=3)


def test_a_group_that_fails_is_tried_one_by_one(tmp_path: Path) -> None:
    """Another writer was faster with one of them; the other two are stored all the same."""

    async def act(found: Book, ses: list[SeRecord]) -> None:
        overtaken = ses[1]
        async with found.registry.turn():
            tasks = [confirm(found, se) for se in ses]
            await turns(lambda: len(found.registry._changes._waiting) == len(tasks))
            other = msgspec.structs.replace(overtaken, ticket="by another node")
            await found.store.txn([], [Put(overtaken.store_key, encode(other))])
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in outcomes] == [type(None), OvertakenError, type(None)]
        assert [entry.subject for entry in await spent(found)] == [ses[0].se_id, ses[2].se_id]
        now = found.registry.se(overtaken.se_id)
        assert now is not None
        assert (now.ticket, now.confirmed_at) == ("by another node", 0.0)

    run(tmp_path, act, ses=3)


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_full_disk_is_told_to_all_and_none_is_stored_twice(tmp_path: Path, fault: str) -> None:
    """`after`: the commit happened and its answer was lost, so whoever asks again finds its change made."""

    async def act(found: Book, ses: list[SeRecord]) -> None:
        async with found.registry.turn():
            tasks = [confirm(found, se) for se in ses]
            await turns(lambda: len(found.registry._changes._waiting) == len(tasks))
            found.store.fail = [fault] * (1 + len(ses))
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, StoreError) and one.retryable for one in outcomes)
        found.store.fail = []
        await found.registry.note(actor="a", action="x", subject="s")
        stored = [now.confirmed_at > 0 for se in ses if (now := found.registry.se(se.se_id))]
        assert stored == [fault == "after"] * len(ses)
        assert len(await spent(found)) == sum(stored)

    run(tmp_path, act, ses=3)


def test_two_changes_of_one_se_follow_each_other(tmp_path: Path) -> None:
    async def act(found: Book, ses: list[SeRecord]) -> None:
        (se,) = ses

        def more(record: SeRecord) -> SeRecord:
            return msgspec.structs.replace(record, key_at=record.key_at + 1.0)

        async with found.registry.turn():
            tasks = [
                asyncio.create_task(found.registry.change_se(se.se_id, more, actor="a", action="spent"))
                for _ in range(3)
            ]
            await turns(lambda: len(found.registry._changes._waiting) == len(tasks))
        assert [record.key_at for record in await asyncio.gather(*tasks)] == [1.0, 2.0, 3.0]
        assert len(await spent(found)) == 3

    run(tmp_path, act, ses=1)


def test_a_caller_that_is_cancelled_takes_its_change_back(tmp_path: Path) -> None:
    async def act(found: Book, ses: list[SeRecord]) -> None:
        async with found.registry.turn():
            tasks = [confirm(found, se) for se in ses]
            await turns(lambda: len(found.registry._changes._waiting) == len(tasks))
            tasks[1].cancel()
            await turns(tasks[1].done)
        await asyncio.gather(tasks[0], tasks[2])
        assert [entry.subject for entry in await spent(found)] == [ses[0].se_id, ses[2].se_id]

    run(tmp_path, act, ses=3)


def test_who_commits_for_others_and_is_cancelled_leaves_them_their_turn(tmp_path: Path) -> None:
    async def act(found: Book, ses: list[SeRecord]) -> None:
        async with found.registry.turn():
            tasks = [confirm(found, se) for se in ses]
            await turns(lambda: len(found.registry._changes._waiting) == len(tasks))
            found.store.gate, before = asyncio.Event(), found.store.txns
        await turns(lambda: found.store.txns > before)
        tasks[0].cancel()
        await turns(tasks[0].done)
        found.store.gate.set()
        await asyncio.gather(*tasks[1:])
        assert [entry.subject for entry in await spent(found)] == [se.se_id for se in ses[1:]]

    run(tmp_path, act, ses=3)
