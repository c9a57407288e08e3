"""What every implementation of the store port must do. SQLite does; etcd's joins by a `Place` of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from appliance.controller.store.port import (
    MAX_KEY_BYTES,
    MAX_OPERATIONS,
    MAX_TTL_S,
    MAX_TXN_BYTES,
    MAX_VALUE_BYTES,
    CompactedError,
    Compare,
    Comparison,
    Delete,
    Entry,
    Event,
    LeaseError,
    Op,
    Put,
    Store,
    Target,
)
from appliance.controller.store.sqlite import SqliteStore
from appliance.errors import StoreError

DEADLINE_S = 60.0


class Place(Protocol):
    """Where stores of one implementation live, and how time passes there."""

    def open(self) -> Store:
        """Opens the one store of this place; what is in it stays from one opening to the next."""
        ...

    async def pass_time(self, store: Store, seconds: float) -> None:
        """Lets the time of leases pass, and what is due happen."""
        ...


class StandingClock:
    """Time stands still until it is told to pass."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def now(self) -> float:
        return 1_700_000_000.0 + self.passed_s

    def monotonic(self) -> float:
        return 5_000.0 + self.passed_s

    def synchronised(self) -> bool:
        return True


class SqlitePlace:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "store.sqlite"
        self.clock = StandingClock()

    def open(self) -> Store:
        return SqliteStore.open(self.path, clock=self.clock)

    async def pass_time(self, store: Store, seconds: float) -> None:
        self.clock.passed_s += seconds
        await store.txn([], [])  # the writer looks at the clock whenever it works


@pytest.fixture(params=[SqlitePlace], ids=["sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    made: Place = request.param(tmp_path)
    return made


def play(place: Place, *scenes: Callable[[Store], Awaitable[None]]) -> None:
    """Runs each scene on the same data, with the store opened anew."""

    async def run() -> None:
        for scene in scenes:
            store = place.open()
            try:
                await asyncio.wait_for(scene(store), DEADLINE_S)
            finally:
                await store.close()

    asyncio.run(run())


async def put(store: Store, key: str, value: bytes = b"", lease: int = 0) -> int:
    result = await store.txn([], [Put(key, value, lease)])
    assert result.succeeded
    return result.revision


async def revision_of(store: Store) -> int:
    return (await store.txn([], [])).revision


async def gather_events(store: Store, prefix: str, from_revision: int, count: int) -> list[Event]:
    found: list[Event] = []
    async with contextlib.aclosing(store.watch(prefix, from_revision=from_revision)) as events:
        while len(found) < count:
            found.append(await anext(events))
    return found


# Revisions and versions


def test_an_absent_key_is_none(place: Place) -> None:
    async def scene(store: Store) -> None:
        assert await store.get("se/1") is None
        assert await store.range("") == []

    play(place, scene)


def test_revisions_and_versions_follow_each_key(place: Place) -> None:
    async def scene(store: Store) -> None:
        start = await revision_of(store)
        assert await put(store, "a", b"1") == start + 1
        assert await put(store, "b", b"2") == start + 2
        assert await put(store, "a", b"3") == start + 3
        assert await store.get("a") == Entry("a", b"3", start + 1, start + 3, 2)
        assert await store.get("b") == Entry("b", b"2", start + 2, start + 2, 1)

    play(place, scene)


def test_putting_the_same_value_is_a_change(place: Place) -> None:
    async def scene(store: Store) -> None:
        first = await put(store, "a", b"1")
        assert await put(store, "a", b"1") == first + 1
        assert await store.get("a") == Entry("a", b"1", first, first + 1, 2)

    play(place, scene)


def test_all_changes_of_a_transaction_share_one_revision(place: Place) -> None:
    async def scene(store: Store) -> None:
        await put(store, "gone")
        before = await revision_of(store)
        result = await store.txn([], [Put("a", b"1"), Put("b", b"2"), Delete("gone")])
        assert result.revision == before + 1
        assert [entry.mod_revision for entry in await store.range("")] == [before + 1] * 2

    play(place, scene)


def test_a_transaction_that_changes_nothing_makes_no_revision(place: Place) -> None:
    async def scene(store: Store) -> None:
        before = await put(store, "a")
        for result in (
            await store.txn([], []),
            await store.txn([], [Delete("absent")]),
            await store.txn([Compare("a", "version", "=", 1)], []),
        ):
            assert result.succeeded
            assert result.revision == before
        result = await store.txn([Compare("a", "version", "=", 7)], [Put("a", b"x")])
        assert (result.succeeded, result.revision) == (False, before)

    play(place, scene)


def test_a_deleted_key_begins_again(place: Place) -> None:
    async def scene(store: Store) -> None:
        await put(store, "a", b"1")
        await put(store, "a", b"2")
        deleted = (await store.txn([], [Delete("a")])).revision
        assert await store.get("a") is None
        assert await put(store, "a", b"3") == deleted + 1
        assert await store.get("a") == Entry("a", b"3", deleted + 1, deleted + 1, 1)

    play(place, scene)


def test_values_are_any_bytes_and_keys_any_text(place: Place) -> None:
    keys = ["a b", "ä/ö", "\U0001f600", "x\n", "'; DROP TABLE entry; --", "%", "_", "\U0010ffff", "\ud7ff", "\ue000"]

    async def scene(store: Store) -> None:
        value = bytes(range(256))
        for key in keys:
            await put(store, key, value)
        for key in keys:
            entry = await store.get(key)
            assert entry is not None
            assert (entry.key, entry.value) == (key, value)
            assert [entry.key for entry in await store.range(key)] == [key]

    play(place, scene)


def test_what_was_acknowledged_is_there_after_opening_again(place: Place) -> None:
    entries: list[Entry] = []

    async def before(store: Store) -> None:
        for number in range(5):
            await put(store, f"a/{number}", b"%d" % number)
        await store.txn([], [Delete("a/2"), Put("a/3", b"again")])
        entries.extend(await store.range(""))

    async def after(store: Store) -> None:
        assert await store.range("") == entries
        assert await revision_of(store) == max(entry.mod_revision for entry in entries)
        last = await put(store, "a/3")
        entry = await store.get("a/3")
        assert entry is not None
        assert (entry.version, entry.mod_revision) == (3, last)

    play(place, before, after)


# Compare-and-swap

# The key "there" was created at revision r, put again at r + 2, so version 2; its value is b"m".
COMPARES: list[tuple[str, Target, Comparison, int | bytes, bool]] = [
    ("there", "version", "=", 2, True),
    ("there", "version", "=", 1, False),
    ("there", "version", "!=", 1, True),
    ("there", "version", "!=", 2, False),
    ("there", "version", ">", 1, True),
    ("there", "version", ">", 2, False),
    ("there", "version", "<", 3, True),
    ("there", "version", "<", 2, False),
    ("there", "create_revision", "=", 0, True),
    ("there", "create_revision", "=", 2, False),
    ("there", "create_revision", "!=", 1, True),
    ("there", "create_revision", "!=", 0, False),
    ("there", "create_revision", ">", -1, True),
    ("there", "create_revision", ">", 0, False),
    ("there", "create_revision", "<", 1, True),
    ("there", "create_revision", "<", 0, False),
    ("there", "mod_revision", "=", 2, True),
    ("there", "mod_revision", "=", 0, False),
    ("there", "mod_revision", "!=", 0, True),
    ("there", "mod_revision", "!=", 2, False),
    ("there", "mod_revision", ">", 1, True),
    ("there", "mod_revision", ">", 2, False),
    ("there", "mod_revision", "<", 3, True),
    ("there", "mod_revision", "<", 2, False),
    ("there", "value", "=", b"m", True),
    ("there", "value", "=", b"n", False),
    ("there", "value", "!=", b"n", True),
    ("there", "value", "!=", b"m", False),
    ("there", "value", ">", b"lz", True),
    ("there", "value", ">", b"m", False),
    ("there", "value", "<", b"m\0", True),
    ("there", "value", "<", b"\xff", True),
    ("there", "value", "<", b"m", False),
    ("absent", "version", "=", 0, True),
    ("absent", "version", "!=", 0, False),
    ("absent", "version", ">", 0, False),
    ("absent", "version", "<", 1, True),
    ("absent", "value", "=", b"", False),
    ("absent", "value", "!=", b"m", False),
    ("absent", "value", "<", b"m", False),
    ("absent", "value", ">", b"", False),
]


@pytest.mark.parametrize(("key", "target", "op", "operand", "expected"), COMPARES)
def test_a_compare_decides_which_list_is_done(
    place: Place, key: str, target: Target, op: Comparison, operand: int | bytes, *, expected: bool
) -> None:
    async def scene(store: Store) -> None:
        created = await put(store, "there", b"first")
        await put(store, "other")
        await put(store, "there", b"m")
        relative = key == "there" and target in {"create_revision", "mod_revision"}
        shifted = operand + created if relative and isinstance(operand, int) else operand
        result = await store.txn([Compare(key, target, op, shifted)], [Put("then", b"")], [Put("else", b"")])
        assert result.succeeded is expected
        assert result.revision == created + 3
        assert (await store.get("then") is not None) is expected
        assert (await store.get("else") is not None) is not expected

    play(place, scene)


@pytest.mark.parametrize("target", ["create_revision", "mod_revision"])
def test_an_absent_key_has_revision_0(place: Place, target: Target) -> None:
    async def scene(store: Store) -> None:
        await store.txn([], [Put("a", b"")])
        await store.txn([], [Delete("a")])
        assert (await store.txn([Compare("a", target, "=", 0)], [])).succeeded

    play(place, scene)


def test_all_compares_must_hold(place: Place) -> None:
    async def scene(store: Store) -> None:
        await put(store, "a", b"1")
        await put(store, "b", b"2")
        both = [Compare("a", "value", "=", b"1"), Compare("b", "value", "=", b"2")]
        assert (await store.txn(both, [Put("a", b"3")])).succeeded
        assert not (await store.txn(both, [Put("b", b"4")])).succeeded
        assert [entry.value for entry in await store.range("")] == [b"3", b"2"]

    play(place, scene)


def test_of_many_that_create_the_same_key_exactly_one_wins(place: Place) -> None:
    async def scene(store: Store) -> None:
        results = await asyncio.gather(
            *(
                store.txn([Compare("number/1", "version", "=", 0)], [Put("number/1", b"%d" % n), Put(f"won/{n}", b"")])
                for n in range(100)
            )
        )
        (winner,) = [n for n, result in enumerate(results) if result.succeeded]
        entry = await store.get("number/1")
        assert entry is not None
        assert entry.value == b"%d" % winner
        assert [won.key for won in await store.range("won/")] == [f"won/{winner}"]

    play(place, scene)


def test_concurrent_increments_with_compare_and_swap_lose_none(place: Place) -> None:
    async def scene(store: Store) -> None:
        await put(store, "next", b"0")

        async def allocate() -> int:
            while True:
                entry = await store.get("next")
                assert entry is not None
                result = await store.txn(
                    [Compare("next", "mod_revision", "=", entry.mod_revision)],
                    [Put("next", b"%d" % (int(entry.value) + 1))],
                )
                if result.succeeded:
                    return int(entry.value)

        assert sorted(await asyncio.gather(*(allocate() for _ in range(30)))) == list(range(30))

    play(place, scene)


def test_transactions_asked_for_in_order_are_done_in_order(place: Place) -> None:
    async def scene(store: Store) -> None:
        results = await asyncio.gather(*(store.txn([], [Put("a", b"%d" % n)]) for n in range(300)))
        revisions = [result.revision for result in results]
        assert revisions == list(range(revisions[0], revisions[0] + 300))
        entry = await store.get("a")
        assert entry is not None
        assert entry.value == b"299"

    play(place, scene)


# Ranges


def test_a_range_is_what_begins_with_the_prefix_in_byte_order(place: Place) -> None:
    keys = ["se/10", "se/2", "se/é", "se", "se/", "sf", "seal", "se/\U0001f600", "se/\uffff", "s", "A", "se/Z"]

    async def scene(store: Store) -> None:
        for key in keys:
            await put(store, key)
        for prefix in ("", "s", "se", "se/", "se/1", "se/\uffff", "nothing"):
            expected = sorted((key for key in keys if key.startswith(prefix)), key=str.encode)
            assert [entry.key for entry in await store.range(prefix)] == expected

    play(place, scene)


def test_pages_join_to_the_whole(place: Place) -> None:
    async def scene(store: Store) -> None:
        for first in range(0, 250, 50):
            await store.txn([], [Put(f"se/{number:04}", b"") for number in range(first, first + 50)])
        await put(store, "sf")
        found: list[str] = []
        while page := await store.range("se/", start_after=found[-1] if found else "", limit=70):
            assert len(page) <= 70
            found += [entry.key for entry in page]
        assert found == [f"se/{number:04}" for number in range(250)]
        assert len(await store.range("se/")) == 250
        assert [entry.key for entry in await store.range("se/", start_after="se/02485")] == ["se/0249"]
        assert await store.range("se/", start_after="se/0249") == []

    play(place, scene)


def test_a_range_of_nothing_is_refused(place: Place) -> None:
    async def scene(store: Store) -> None:
        with pytest.raises(StoreError):
            await store.range("", limit=0)

    play(place, scene)


# Watches


def test_a_watch_tells_every_change_below_its_prefix_in_order(place: Place) -> None:
    async def scene(store: Store) -> None:
        first = await put(store, "se/1", b"a")
        await put(store, "other/1")
        second = await put(store, "se/1", b"b")
        third = (await store.txn([], [Put("se/2", b"c"), Delete("se/1"), Put("other/2", b"")])).revision
        last = await put(store, "se/3", b"d")
        assert await gather_events(store, "se/", first, 5) == [
            Event("put", Entry("se/1", b"a", first, first, 1)),
            Event("put", Entry("se/1", b"b", first, second, 2)),
            Event("put", Entry("se/2", b"c", third, third, 1)),
            Event("delete", Entry("se/1", b"", 0, third, 0)),
            Event("put", Entry("se/3", b"d", last, last, 1)),
        ]

    play(place, scene)


def test_a_watch_from_an_old_revision_begins_there(place: Place) -> None:
    async def before(store: Store) -> None:
        for number in range(10):
            await put(store, "a", b"%d" % number)

    async def after(store: Store) -> None:
        last = await revision_of(store)
        events = await gather_events(store, "", last - 3, 4)
        assert [event.entry.value for event in events] == [b"6", b"7", b"8", b"9"]

    play(place, before, after)


def test_a_watch_without_a_revision_begins_with_the_call(place: Place) -> None:
    async def scene(store: Store) -> None:
        await put(store, "a", b"before")
        async with contextlib.aclosing(store.watch("a")) as events:
            await put(store, "a", b"after")  # before the iterator was asked for anything
            assert (await anext(events)).entry.value == b"after"

    play(place, scene)


def test_a_waiting_watch_hears_of_changes_as_they_come(place: Place) -> None:
    async def scene(store: Store) -> None:
        async with contextlib.aclosing(store.watch("a/")) as events:
            for number in range(5):
                waiting = asyncio.ensure_future(anext(events))
                await put(store, f"b/{number}")
                assert not waiting.done()
                await put(store, f"a/{number}")
                assert (await waiting).entry.key == f"a/{number}"

    play(place, scene)


def test_a_watch_from_the_future_waits_for_it(place: Place) -> None:
    async def scene(store: Store) -> None:
        now = await revision_of(store)
        async with contextlib.aclosing(store.watch("", from_revision=now + 3)) as events:
            for number in range(1, 5):
                await put(store, f"a/{number}")
            assert (await anext(events)).entry.key == "a/3"

    play(place, scene)


def test_several_watches_each_hear_all_even_a_slow_one(place: Place) -> None:
    async def scene(store: Store) -> None:
        start = await revision_of(store) + 1

        async def follow(prefix: str, count: int) -> list[str]:
            return [event.entry.key for event in await gather_events(store, prefix, start, count)]

        async with contextlib.aclosing(store.watch("", from_revision=start)) as slow:
            followers = [asyncio.ensure_future(follow("a/", 400)), asyncio.ensure_future(follow("", 800))]
            for number in range(400):
                await store.txn([], [Put(f"a/{number}", b""), Put(f"b/{number}", b"")])
            a, everything = await asyncio.gather(*followers)
            assert a == [f"a/{number}" for number in range(400)]
            assert everything == [f"{letter}/{number}" for number in range(400) for letter in "ab"]
            assert [(await anext(slow)).entry.key for _ in range(800)] == everything

    play(place, scene)


def test_reading_then_following_leaves_no_gap(place: Place) -> None:
    """The way the port's documentation tells."""

    async def scene(store: Store) -> None:
        async def write() -> None:
            for number in range(100):
                await put(store, f"a/{number:03}")

        writing = asyncio.ensure_future(write())
        while await revision_of(store) < 20:
            pass
        revision = await revision_of(store)
        seen = {entry.key for entry in await store.range("a/")}
        async with contextlib.aclosing(store.watch("a/", from_revision=revision + 1)) as events:
            while len(seen) < 100:
                seen.add((await anext(events)).entry.key)
        await writing

    play(place, scene)


def test_closing_the_store_ends_its_watches(place: Place) -> None:
    async def run() -> None:
        store = place.open()
        heard = asyncio.Event()

        async def follow() -> None:
            async for _ in store.watch("a"):
                heard.set()

        following = asyncio.ensure_future(follow())
        while not heard.is_set():
            await put(store, "a")
        await store.close()
        await asyncio.wait_for(following, DEADLINE_S)
        await store.close()  # once more is fine
        with pytest.raises(StoreError):
            await store.get("a")
        with pytest.raises(StoreError):
            await put(store, "a")
        with pytest.raises(StoreError):
            store.watch("a")

    asyncio.run(run())


# Compaction


def test_history_before_the_compacted_revision_is_gone_and_told(place: Place) -> None:
    async def scene(store: Store) -> None:
        revisions = [await put(store, "a", b"%d" % number) for number in range(10)]
        await store.compact(revisions[5])
        async with contextlib.aclosing(store.watch("a", from_revision=revisions[2])) as events:
            with pytest.raises(CompactedError) as caught:
                await anext(events)
        assert "read the range anew" in caught.value.hint
        events_left = await gather_events(store, "a", revisions[6], 4)
        assert [event.entry.value for event in events_left] == [b"6", b"7", b"8", b"9"]
        entry = await store.get("a")
        assert entry is not None
        assert (entry.value, entry.version) == (b"9", 10)
        await store.compact(revisions[3])  # done already
        await store.compact(revisions[9])

    async def after(store: Store) -> None:
        async with contextlib.aclosing(store.watch("a", from_revision=1)) as events:
            with pytest.raises(CompactedError):
                await anext(events)

    play(place, scene, after)


def test_the_future_cannot_be_compacted(place: Place) -> None:
    async def scene(store: Store) -> None:
        with pytest.raises(StoreError):
            await store.compact(await revision_of(store) + 1)

    play(place, scene)


def test_compaction_does_not_overtake_a_watch_that_waits(place: Place) -> None:
    async def scene(store: Store) -> None:
        async with contextlib.aclosing(store.watch("a/")) as events:
            waiting = asyncio.ensure_future(anext(events))
            for number in range(20):
                await put(store, f"b/{number}")
            await store.compact(await revision_of(store))
            await put(store, "a/1")
            assert (await waiting).entry.key == "a/1"

    play(place, scene)


# Leases


def test_a_lease_takes_its_keys_with_it(place: Place) -> None:
    async def scene(store: Store) -> None:
        lease = await store.lease(10)
        start = await put(store, "a/1", b"", lease)
        await store.txn([], [Put("a/2", b"", lease), Put("b", b"")])
        await place.pass_time(store, 9)
        assert len(await store.range("")) == 3
        await place.pass_time(store, 2)
        events = await gather_events(store, "a/", start, 4)
        assert [(event.kind, event.entry.key) for event in events[2:]] == [("delete", "a/1"), ("delete", "a/2")]
        assert [entry.key for entry in await store.range("")] == ["b"]
        for use in (store.keep_alive(lease), store.revoke_lease(lease), put(store, "a/3", b"", lease)):
            with pytest.raises(LeaseError):
                await use
        assert await store.get("a/3") is None

    play(place, scene)


def test_a_lease_that_is_kept_alive_stays(place: Place) -> None:
    async def scene(store: Store) -> None:
        lease = await store.lease(10)
        await put(store, "a", b"", lease)
        for _ in range(5):
            await place.pass_time(store, 8)
            await store.keep_alive(lease)
        assert await store.get("a") is not None
        await place.pass_time(store, 11)
        assert await store.get("a") is None

    play(place, scene)


def test_revoking_a_lease_deletes_its_keys_at_once(place: Place) -> None:
    async def scene(store: Store) -> None:
        lease, other = await store.lease(10), await store.lease(10)
        assert lease != other
        await store.txn([], [Put("a", b"", lease), Put("b", b"", other)])
        before = await put(store, "c", b"", lease)
        await store.revoke_lease(lease)
        assert [entry.key for entry in await store.range("")] == ["b"]
        assert await revision_of(store) == before + 1
        await store.keep_alive(other)
        with pytest.raises(LeaseError):
            await store.revoke_lease(lease)

    play(place, scene)


def test_a_put_moves_a_key_to_another_lease_or_to_none(place: Place) -> None:
    async def scene(store: Store) -> None:
        lease, other = await store.lease(10), await store.lease(100)
        for key in ("freed", "moved", "deleted"):
            await put(store, key, b"", lease)
        await put(store, "freed")
        await put(store, "moved", b"", other)
        await store.txn([], [Delete("deleted")])
        await put(store, "deleted", b"again")
        await place.pass_time(store, 11)
        assert [entry.key for entry in await store.range("")] == ["deleted", "freed", "moved"]

    play(place, scene)


def test_a_put_with_an_unknown_lease_changes_nothing(place: Place) -> None:
    async def scene(store: Store) -> None:
        before = await put(store, "a", b"1")
        with pytest.raises(LeaseError):
            await store.txn([], [Put("a", b"2"), Put("b", b"", 4711), Put("c", b"")])
        assert await revision_of(store) == before
        assert [(entry.key, entry.value) for entry in await store.range("")] == [("a", b"1")]
        assert await put(store, "d") == before + 1

    play(place, scene)


def test_a_lease_outlives_the_process_but_not_its_time(place: Place) -> None:
    leases: list[int] = []

    async def before(store: Store) -> None:
        leases.append(await store.lease(10))
        leases.append(await store.lease(1000))
        await store.txn([], [Put("short", b"", leases[0]), Put("long", b"", leases[1])])

    async def after(store: Store) -> None:
        await place.pass_time(store, 11)
        assert [entry.key for entry in await store.range("")] == ["long"]
        await store.keep_alive(leases[1])

    play(place, before, after)


# Limits and refusals


def puts(count: int) -> list[Op]:
    return [Put(f"key/{number}", b"") for number in range(count)]


def test_the_largest_transaction_and_value_are_taken(place: Place) -> None:
    async def scene(store: Store) -> None:
        full: Sequence[Op] = puts(MAX_OPERATIONS)
        compares = [Compare(operation.key, "version", "=", 0) for operation in full]
        assert (await store.txn(compares, full, full)).succeeded
        await put(store, "k" * MAX_KEY_BYTES, b"v" * MAX_VALUE_BYTES)
        entry = await store.get("k" * MAX_KEY_BYTES)
        assert entry is not None
        assert len(entry.value) == MAX_VALUE_BYTES

    play(place, scene)


WHOLE = [Put(f"key/{number}", bytes(MAX_VALUE_BYTES)) for number in range(MAX_TXN_BYTES // MAX_VALUE_BYTES)]


@pytest.mark.parametrize(
    ("compares", "success", "failure"),
    [
        ([], puts(MAX_OPERATIONS + 1), []),
        ([], [], puts(MAX_OPERATIONS + 1)),
        ([Compare(f"{n}", "version", "=", 0) for n in range(MAX_OPERATIONS + 1)], [], []),
        ([], [Put("a", bytes(MAX_VALUE_BYTES + 1))], []),
        ([], [], [Put("a", bytes(MAX_VALUE_BYTES + 1))]),
        ([], WHOLE, []),
        ([Compare("a", "value", "=", bytes(MAX_TXN_BYTES))], [], []),
        ([], [Put("a", b""), Put("a", b"")], []),
        ([], [Put("a", b""), Delete("a")], []),
        ([], [], [Delete("a"), Delete("a")]),
        ([], [Put("", b"")], []),
        ([], [Delete("")], []),
        ([Compare("", "version", "=", 0)], [], []),
        ([], [Put("k" * (MAX_KEY_BYTES + 1), b"")], []),
        ([], [Put("é" * (MAX_KEY_BYTES // 2 + 1), b"")], []),
        ([], [Put("a\0b", b"")], []),
        ([], [Put("\ud800", b"")], []),
        ([], [Put("a", b"", -1)], []),
        ([], [Put("a", b"", 2**63)], []),
        ([], [Put("a", "text")], []),  # type: ignore[arg-type]
        ([Compare("a", "value", "=", 1)], [], []),
        ([Compare("a", "version", "=", b"1")], [], []),
    ],
)
def test_what_is_over_a_limit_or_ambiguous_is_refused_and_changes_nothing(
    place: Place, compares: list[Compare], success: list[Op], failure: list[Op]
) -> None:
    async def scene(store: Store) -> None:
        before = await put(store, "there")
        with pytest.raises(StoreError) as caught:
            await store.txn(compares, success, failure)
        assert not caught.value.retryable
        assert await revision_of(store) == before
        assert [entry.key for entry in await store.range("")] == ["there"]

    play(place, scene)


@pytest.mark.parametrize("ttl_s", [0, -1, MAX_TTL_S + 1])
def test_leases_without_a_sensible_time_are_refused(place: Place, ttl_s: int) -> None:
    async def scene(store: Store) -> None:
        with pytest.raises(StoreError):
            await store.lease(ttl_s)

    play(place, scene)


@pytest.mark.parametrize("lease", [0, -1, 2**63, 4711])
def test_what_is_no_lease_cannot_be_kept_or_revoked(place: Place, lease: int) -> None:
    async def scene(store: Store) -> None:
        await put(store, "a")
        with pytest.raises(LeaseError):
            await store.keep_alive(lease)
        with pytest.raises(LeaseError):
            await store.revoke_lease(lease)
        assert await store.get("a") is not None

    play(place, scene)


def test_reading_what_can_be_no_key_is_refused(place: Place) -> None:
    async def scene(store: Store) -> None:
        for key in ("", "\ud800", "a\0"):
            with pytest.raises(StoreError):
                await store.get(key)
        for text in ("\ud800", "a\0"):
            with pytest.raises(StoreError):
                await store.range(text)
            with pytest.raises(StoreError):
                await store.range("", start_after=text)
            with pytest.raises(StoreError):
                store.watch(text)

    play(place, scene)
