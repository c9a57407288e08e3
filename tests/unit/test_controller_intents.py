"""controller.intents: whatever changes files has an entry in the audit, now or at the next start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from controller_parts import Book, book

from appliance.controller.audit import Note
from appliance.controller.intents import Intents
from appliance.controller.records import INTENT_PREFIX
from appliance.controller.registry import Registry
from appliance.controller.web import ProblemError, simple_problem
from appliance.errors import StorageError, StoreError

WISH = Note("ann (uid 7)", "trust.ca.finish", "ca", "planned")


def run(path: Path, act: Callable[[Book], Coroutine[Any, Any, None]]) -> None:
    async def go() -> None:
        async with book(path) as found:
            await act(found)

    asyncio.run(go())


def intents(found: Book, registry: Registry | None = None) -> Intents:
    return Intents(registry or found.registry, found.store, wall=found.clock.now)


async def started(found: Book) -> Registry:
    """What the next start makes of the store."""
    registry = found.another()
    await registry.load(reserved=())
    await intents(found, registry).settle("version 8")
    assert not registry.audit.count or (await registry.audit.verify()).intact
    return registry


async def entries(registry: Registry) -> list[tuple[str, str, str, str]]:
    return [(entry.actor, entry.action, entry.subject, entry.detail) for entry in await registry.audit.read()]


def test_an_act_that_was_carried_out_has_one_entry(tmp_path: Path) -> None:
    async def act(found: Book) -> None:
        version = 7
        async with intents(found).audited(WISH, lambda: f"version {version}"):
            assert await found.store.range(INTENT_PREFIX)
            version = 8
        done = [("ann (uid 7)", "trust.ca.finish", "ca", "version 8")]
        assert await entries(found.registry) == done
        assert await entries(await started(found)) == done

    run(tmp_path, act)


def test_an_act_that_was_refused_has_none(tmp_path: Path) -> None:
    async def act(found: Book) -> None:
        with pytest.raises(ProblemError):
            async with intents(found).audited(WISH, lambda: "done"):
                raise ProblemError(simple_problem(400, "USAGE-001", "no"))
        assert await entries(await started(found)) == []

    run(tmp_path, act)


def test_an_act_that_was_cut_or_failed_half_way_is_told_by_the_next_start_and_once(tmp_path: Path) -> None:
    async def act(found: Book) -> None:
        async def cut(wish: Note, error: BaseException) -> None:
            with pytest.raises(type(error)):
                async with intents(found).audited(wish, lambda: "done"):
                    raise error

        await cut(WISH, StorageError("the switch failed"))
        assert await entries(found.registry) == []
        begun = f"begun at {int(found.clock.now())} and cut before it was noted; in force is version 8"
        told = [("ann (uid 7)", "trust.ca.finish.cut", "ca", f"{begun}: planned")]
        assert await entries(await started(found)) == told
        found.registry = await started(found)
        assert await entries(found.registry) == told
        await cut(WISH._replace(detail=""), asyncio.CancelledError())
        assert (await entries(await started(found)))[-1][-1] == begun

    run(tmp_path, act)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_entry_that_could_not_be_written_is_written_by_the_next_start(tmp_path: Path, when: str) -> None:
    """Where only the answer of the store was lost, it is there already."""

    async def act(found: Book) -> None:
        found.store.fail = ["", when]
        with pytest.raises(StoreError):
            async with intents(found).audited(WISH, lambda: "done"):
                pass
        (entry,) = await entries(await started(found))
        assert entry[1] == ("trust.ca.finish.cut" if when == "before" else "trust.ca.finish")

    run(tmp_path, act)


def test_where_nothing_can_be_stored_nothing_is_done_and_a_start_goes_on(tmp_path: Path) -> None:
    async def act(found: Book) -> None:
        found.store.fail = ["before"]
        with pytest.raises(StoreError):
            async with intents(found).audited(WISH, lambda: "done"):
                pytest.fail("the act was carried out")
        with pytest.raises(StorageError):
            async with intents(found).audited(WISH, lambda: "done"):
                raise StorageError("the switch failed")
        found.store.fail = ["before"]
        assert await entries(await started(found)) == []
        assert [action for _, action, _, _ in await entries(await started(found))] == ["trust.ca.finish.cut"]

    run(tmp_path, act)
