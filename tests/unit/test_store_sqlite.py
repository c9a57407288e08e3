"""What SQLite's implementation adds to the contract: grouped commits, the file's life, faults of the disk, kills."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import appliance
from appliance.controller.store import schema
from appliance.controller.store.port import CompactedError, Compare, Delete, Put, Store, prefix_end
from appliance.controller.store.sqlite import SLOW_S, SLOW_TOLD_S, SqliteStore
from appliance.errors import DowngradeError, StorageError, StoreError
from appliance.runtime.clock import SystemClock

DEADLINE_S = 60.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(appliance.__file__).parent.parent)}


class StandingClock:
    """Time stands still until it is told to pass."""

    def __init__(self, wall_s: float = 1_700_000_000.0, monotonic_s: float = 5_000.0) -> None:
        self.wall_s = wall_s
        self.monotonic_s = monotonic_s

    def now(self) -> float:
        return self.wall_s

    def monotonic(self) -> float:
        return self.monotonic_s

    def synchronised(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No thread and no descriptor outlives a test."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("store")] == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def play(
    path: Path,
    scene: Callable[[SqliteStore], Awaitable[None]],
    *,
    clock: StandingClock | SystemClock | None = None,
    keep_revisions: int = 10_000,
) -> None:
    async def run() -> None:
        store = SqliteStore.open(path, clock=clock or StandingClock(), keep_revisions=keep_revisions)
        try:
            await asyncio.wait_for(scene(store), DEADLINE_S)
        finally:
            await store.close()

    asyncio.run(run())


async def put(store: Store, key: str, value: bytes = b"", lease: int = 0) -> int:
    return (await store.txn([], [Put(key, value, lease)])).revision


async def nothing(store: Store) -> None:
    """A scene without action: the store is opened and closed."""


@contextlib.contextmanager
def writing_elsewhere(path: Path) -> Iterator[sqlite3.Connection]:
    """Another program holds the write lock."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    finally:
        connection.close()


# A slow disk


def test_a_slow_commit_is_told_for_a_while(tmp_path: Path) -> None:
    clock = StandingClock()
    under_way: list[float] = []

    async def scene(store: SqliteStore) -> None:
        def disk(statement: str) -> None:
            if statement == "COMMIT":
                under_way.append(store.slow_s())
                clock.monotonic_s += 2 * SLOW_S
                under_way.append(store.slow_s())

        store._writing.set_trace_callback(disk)
        await put(store, "a")
        store._writing.set_trace_callback(None)
        assert under_way == [0.0, 2 * SLOW_S]
        assert store.slow_s() == 2 * SLOW_S
        clock.monotonic_s += SLOW_TOLD_S
        assert store.slow_s() == 0.0

    play(tmp_path / "store.sqlite", scene, clock=clock)


# Grouped commits


def test_what_waits_shares_a_commit(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"

    async def scene(store: SqliteStore) -> None:
        await put(store, "a")
        before = store.stats
        with writing_elsewhere(path):
            waiting = [asyncio.ensure_future(put(store, f"a/{number}")) for number in range(500)]
            await store.get("a")  # a turn of the loop: all are in the queue
        await asyncio.gather(*waiting)
        assert store.stats.txns - before.txns == 500
        # One that the writer had in hand, then two of at most 256.
        assert store.stats.commits - before.commits <= 3

    play(path, scene)


def test_a_lone_write_is_committed_at_once(tmp_path: Path) -> None:
    async def scene(store: SqliteStore) -> None:
        for number in range(5):
            await put(store, f"a/{number}")
            assert store.stats.commits == store.stats.txns == number + 1

    play(tmp_path / "store.sqlite", scene)


def test_what_changes_nothing_costs_no_commit(tmp_path: Path) -> None:
    async def scene(store: SqliteStore) -> None:
        await store.txn([], [])
        await store.txn([], [Delete("absent")])
        await store.txn([Compare("a", "version", ">", 0)], [Put("a", b"")])
        assert (store.stats.commits, store.stats.txns) == (0, 3)

    play(tmp_path / "store.sqlite", scene)


def test_one_that_fails_leaves_its_group_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"

    async def scene(store: SqliteStore) -> None:
        with writing_elsewhere(path):
            waiting = [
                asyncio.ensure_future(store.txn([], [Put(f"a/{number}", b""), Put(f"b/{number}", b"", number % 2)]))
                for number in range(10)
            ]
            await store.get("a")
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [isinstance(result, StoreError) for result in results] == [False, True] * 5
        assert [entry.key for entry in await store.range("a/")] == ["a/0", "a/2", "a/4", "a/6", "a/8"]
        assert [entry.mod_revision for entry in await store.range("a/")] == [1, 2, 3, 4, 5]

    play(path, scene)


def test_nobody_is_answered_before_the_commit(tmp_path: Path) -> None:
    answered = threading.Event()
    early: list[bool] = []

    def trace(statement: str) -> None:
        if statement == "COMMIT":
            early.append(answered.is_set())

    async def scene(store: SqliteStore) -> None:
        store._writing.set_trace_callback(trace)
        for number in range(20):
            answered.clear()
            await put(store, f"a/{number}")
            answered.set()

    play(tmp_path / "store.sqlite", scene)
    assert early == [False] * 20


def test_a_caller_that_gave_up_is_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"

    async def scene(store: SqliteStore) -> None:
        with writing_elsewhere(path):
            waiting = [asyncio.ensure_future(put(store, f"a/{number}")) for number in range(3)]
            await store.get("a")
            waiting[1].cancel()
        await asyncio.gather(waiting[0], waiting[2])
        assert waiting[1].cancelled()
        await put(store, "after")

    play(path, scene)


def test_an_event_loop_that_is_gone_does_not_stop_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    store = SqliteStore.open(path, clock=StandingClock())

    async def leave_behind() -> None:
        following = asyncio.ensure_future(anext(store.watch("a")))
        waiting = asyncio.ensure_future(put(store, "a/1"))
        await store.get("a")
        following.cancel()
        waiting.cancel()

    with writing_elsewhere(path):
        asyncio.run(leave_behind())

    async def go_on() -> None:
        await put(store, "a/2")
        assert [entry.key for entry in await store.range("a")] == ["a/1", "a/2"]
        await store.close()

    asyncio.run(go_on())


def test_a_defect_answers_its_callers_and_the_store_goes_on(tmp_path: Path) -> None:
    async def scene(store: SqliteStore) -> None:
        await put(store, "a", b"1")
        with pytest.raises(KeyError):
            await store.txn([Compare("a", "version", "~", 1)], [])  # type: ignore[arg-type]
        assert await put(store, "a", b"3") == 2

    play(tmp_path / "store.sqlite", scene)


# The file


def test_only_its_owner_can_read_the_store(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    modes: dict[str, int] = {}

    def files() -> list[Path]:
        return list(tmp_path.iterdir())

    umask = os.umask(0)
    try:

        async def scene(store: SqliteStore) -> None:
            await put(store, "a")
            modes.update({file.name: file.stat().st_mode & 0o777 for file in files()})

        play(path, scene)
    finally:
        os.umask(umask)
    assert modes == dict.fromkeys(("store.sqlite", "store.sqlite-wal", "store.sqlite-shm"), 0o600)
    assert [file.name for file in files()] == ["store.sqlite"]


def test_the_log_is_synced_at_every_commit(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "store.sqlite", clock=StandingClock())
    assert store._writing.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._writing.execute("PRAGMA synchronous").fetchone() == (2,)
    asyncio.run(store.close())


def test_an_older_file_is_migrated_and_then_refused_by_the_older_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.sqlite"

    async def before(store: SqliteStore) -> None:
        await put(store, "a", b"1")

    async def after(store: SqliteStore) -> None:
        entry = await store.get("a")
        assert entry is not None
        assert entry.value == b"1"
        assert store._reading.execute("SELECT word FROM extra").fetchall() == [("new",)]

    play(path, before)
    newer = (*schema.MIGRATIONS, ("CREATE TABLE extra (word TEXT)",), ("INSERT INTO extra VALUES ('new')",))
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", newer)
        play(path, after)
        play(path, after)  # nothing is done twice
    content = path.read_bytes()
    with pytest.raises(DowngradeError, match="version 3, this program knows up to 1") as caught:
        play(path, nothing)
    assert caught.value.hint
    assert path.read_bytes() == content


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.sqlite"

    async def scene(store: SqliteStore) -> None:
        await put(store, "a", b"1")

    play(path, scene)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, ("DELETE FROM entry", "NO SUCH STATEMENT")))
        with pytest.raises(StoreError):
            play(path, nothing)

    async def after(store: SqliteStore) -> None:
        assert await store.get("a") is not None

    play(path, after)


def test_a_store_that_was_half_made_is_made_anew(tmp_path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f".store.sqlite.new{suffix}").write_bytes(b"left by a kill")
    play(tmp_path / "store.sqlite", nothing)
    assert [file.name for file in tmp_path.iterdir()] == ["store.sqlite"]


def some_pages(path: Path) -> None:
    async def scene(store: SqliteStore) -> None:
        for number in range(200):
            await put(store, f"a/{number}", bytes(1000))

    play(path, scene)


def damaged(path: Path) -> StoreError:
    content = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        play(path, nothing)
    assert not caught.value.retryable
    assert str(path) in caught.value.message
    assert "restore" in caught.value.hint
    assert path.read_bytes() == content, "a damaged file is evidence, and may be repaired by hand"
    return caught.value


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    some_pages(path)
    size = path.stat().st_size
    for length in (size - 4096, size // 2, 4096, 1000, 0):
        os.truncate(path, length)
        damaged(path)


def test_a_file_with_flipped_bits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    some_pages(path)
    for offset in range(8192, path.stat().st_size, 8192):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\xff" * 64)
    damaged(path)


def test_garbage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.write_bytes(b"no database at all" * 1000)
    assert "not a database" in damaged(path).message


def test_damage_that_shows_while_running_is_told(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    some_pages(path)

    async def scene(store: SqliteStore) -> None:
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (path.stat().st_size - 8192))
        with pytest.raises(StoreError) as caught:
            await store.range("a/")
        assert not caught.value.retryable
        assert "restore" in caught.value.hint

    play(path, scene)


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (id)")
    with pytest.raises(StoreError, match="no store of this program"):
        play(path, nothing)


def test_a_log_without_its_file_is_refused(tmp_path: Path) -> None:
    """Else an empty store would be made, and the old log replayed into it."""
    path = tmp_path / "store.sqlite"
    (tmp_path / "store.sqlite-wal").write_bytes(b"log")
    with pytest.raises(StoreError, match="missing, but its log"):
        play(path, nothing)
    assert not path.exists()


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        play(tmp_path / "missing" / "store.sqlite", nothing)
    assert "create" in caught.value.hint


def test_a_file_system_without_shared_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite then keeps a rollback journal and says so."""
    real = sqlite3.connect

    def connect(database: str, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = real(f"{database}&vfs=unix-none", **options)
        return connection

    monkeypatch.setattr(sqlite3, "connect", connect)
    with pytest.raises(StoreError, match="write-ahead log"):
        play(tmp_path / "store.sqlite", nothing)
    assert not (tmp_path / "store.sqlite").exists()


# Faults


def limited(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """Collects the connections that the store opens, so a test can limit them."""
    opened: list[sqlite3.Connection] = []
    real = sqlite3.connect

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        opened.append(real(*args, **options))
        return opened[-1]

    monkeypatch.setattr(sqlite3, "connect", connect)
    return opened


@pytest.mark.parametrize(
    ("limit", "lift", "words"),
    [
        ("max_page_count = 1", "max_page_count = 1000000", "full"),
        ("query_only = ON", "query_only = OFF", "readonly"),
    ],
)
def test_a_full_or_read_only_disk_refuses_writes_loses_nothing_and_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, lift: str, words: str
) -> None:
    path = tmp_path / "store.sqlite"
    some_pages(path)
    opened = limited(monkeypatch)

    async def scene(store: SqliteStore) -> None:
        for connection in opened:
            connection.execute(f"PRAGMA {limit}")
        results = await asyncio.gather(
            *(put(store, f"b/{number}", bytes(100_000)) for number in range(20)), return_exceptions=True
        )
        for result in results:
            assert isinstance(result, StoreError)
            assert result.retryable
            assert words in result.message
            assert result.hint
        assert await store.range("b/") == []
        assert len(await store.range("a/")) == 200
        for connection in opened:
            connection.execute(f"PRAGMA {lift}")
        assert await put(store, "b/1", bytes(100_000)) == 201
        assert [event.entry.key for event in [await anext(store.watch("", from_revision=201))]] == ["b/1"]

    play(path, scene)


FILE_LIMIT = """
import asyncio, resource, sys
from pathlib import Path
from appliance.controller.store.port import Put
from appliance.controller.store.sqlite import SqliteStore
from appliance.errors import StoreError
from appliance.runtime.clock import SystemClock

async def main():
    store = SqliteStore.open(Path(sys.argv[1]), clock=SystemClock())
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, unlimited[1]))
    number = refused = 0
    while refused < 3:
        number += 1
        try:
            await store.txn([], [Put(f"a/{number}", bytes(100_000))])
            print("kept", number, flush=True)
        except StoreError as error:
            assert error.retryable and error.hint, error
            refused += 1
            print("refused", number, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    await store.txn([], [Put("after", b"")])
    print("kept after", flush=True)
    await store.close()

asyncio.run(main())
"""


def test_a_disk_that_takes_no_more_refuses_loses_nothing_and_heals(tmp_path: Path) -> None:
    """The kernel itself refuses the write here, in the middle of a commit."""
    path = tmp_path / "store.sqlite"
    child = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert lines[-1] == "kept after"
    assert sum(line.startswith("refused") for line in lines) == 3
    expected = sorted(f"a/{line.split()[1]}" for line in lines[:-1] if line.startswith("kept"))
    assert expected

    async def scene(store: SqliteStore) -> None:
        assert [entry.key for entry in await store.range("a/")] == expected
        assert await store.get("after") is not None

    play(path, scene)


def test_another_program_that_holds_the_file_is_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.sqlite"
    monkeypatch.setattr(schema, "_BUSY_TIMEOUT_S", 0.05)

    async def scene(store: SqliteStore) -> None:
        with writing_elsewhere(path):
            with pytest.raises(StoreError, match="locked") as caught:
                await put(store, "a")
            assert caught.value.retryable
            assert "fuser" in caught.value.hint
            assert await store.get("a") is None  # reading goes on
        await put(store, "a")

    play(path, scene)

    with writing_elsewhere(path), pytest.raises(StoreError, match="locked"):
        play(path, nothing)


def test_an_error_that_is_none_of_the_disks_is_a_defect_and_says_so(tmp_path: Path) -> None:
    told = schema.explain(sqlite3.ProgrammingError("odd"), tmp_path / "store.sqlite")
    assert not told.retryable
    assert "defect" in told.hint


def test_connections_that_cannot_be_set_up_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    path.mkdir()
    with pytest.raises(StoreError) as caught:
        play(path, nothing)
    assert "owner and mode" in caught.value.hint


def test_a_failed_rename_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "store.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(StorageError) as caught:
            play(path, nothing)
    assert caught.value.retryable
    assert not path.exists()
    play(path, nothing)


# Kills

WRITE_ON = """
import asyncio, sys
from pathlib import Path
from appliance.controller.store.port import Compare, Put
from appliance.controller.store.sqlite import SqliteStore
from appliance.runtime.clock import SystemClock

async def write(store, worker):
    number = 0
    while True:
        number += 1
        key = f"{worker}/{number:06}"
        puts = [Put(key, key.encode() * 20), Put(f"last/{worker}", key.encode())]
        result = await store.txn([Compare(key, "version", "=", 0)], puts)
        assert result.succeeded
        sys.stdout.write(f"{key} {result.revision}\\n")
        sys.stdout.flush()

async def main():
    store = SqliteStore.open(Path(sys.argv[1]), clock=SystemClock())
    await asyncio.gather(*(write(store, worker) for worker in "abcdefgh"))

asyncio.run(main())
"""


@pytest.mark.parametrize("lines", [1, 300, 3000])
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "store.sqlite"
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_ON, str(path)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(lines)]
        child.kill()
        told += [line for line in child.stdout.readlines() if line.endswith("\n")]
    acknowledged = {key: int(revision) for key, revision in (line.split() for line in told)}
    assert len(acknowledged) >= lines

    async def scene(store: SqliteStore) -> None:
        found = {}
        after = ""
        while page := await store.range("", start_after=after):
            found.update({entry.key: entry for entry in page})
            after = page[-1].key
        for key, revision in acknowledged.items():
            assert found[key].value == key.encode() * 20
            assert found[key].mod_revision == revision
        for worker in "abcdefgh":
            # Both puts of a transaction or none: a key that was never acknowledged included.
            keys = [key for key in found if key.startswith(f"{worker}/")]
            assert keys == [f"{worker}/{number:06}" for number in range(1, len(keys) + 1)]
            if keys:
                assert found[f"last/{worker}"].value == keys[-1].encode()
        revisions = {entry.mod_revision for key, entry in found.items() if not key.startswith("last/")}
        assert revisions == set(range(1, len(revisions) + 1))
        assert await put(store, "after") == len(revisions) + 1

    play(path, scene)


# Leases


def test_a_lease_expires_by_itself(tmp_path: Path) -> None:
    async def scene(store: SqliteStore) -> None:
        await put(store, "a", b"", await store.lease(1))
        async with contextlib.aclosing(store.watch("a")) as events:
            assert (await anext(events)).kind == "delete"  # nothing else wakes the writer
        assert await store.get("a") is None

    play(tmp_path / "store.sqlite", scene, clock=SystemClock())


def test_a_wall_clock_that_jumps_does_not_end_leases(tmp_path: Path) -> None:
    clock = StandingClock()

    async def scene(store: SqliteStore) -> None:
        await put(store, "a", b"", await store.lease(10))
        clock.wall_s += 10**9
        clock.monotonic_s += 9
        await put(store, "b")
        assert await store.get("a") is not None
        clock.monotonic_s += 1
        await put(store, "b")
        assert await store.get("a") is None

    play(tmp_path / "store.sqlite", scene, clock=clock)


@pytest.mark.parametrize(
    ("wall_passed_s", "left_s"),
    [(4, 6), (10, 0), (10**9, 0), (-(10**9), 10)],
    ids=["in time", "over", "jumped ahead", "jumped back"],
)
def test_over_a_restart_the_wall_clock_counts_but_never_beyond_the_full_time(
    tmp_path: Path, wall_passed_s: float, left_s: float
) -> None:
    path = tmp_path / "store.sqlite"
    clock = StandingClock()

    async def before(store: SqliteStore) -> None:
        await put(store, "a", b"", await store.lease(10))

    async def after(store: SqliteStore) -> None:
        await put(store, "b")
        assert (await store.get("a") is not None) is (left_s > 0)
        clock.monotonic_s += left_s
        await put(store, "b")
        assert await store.get("a") is None

    play(path, before, clock=clock)
    clock.wall_s += wall_passed_s
    clock.monotonic_s = 3.0  # booted anew
    play(path, after, clock=clock)


def test_leases_that_cannot_end_on_a_full_disk_end_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.sqlite"
    play(path, nothing)
    opened = limited(monkeypatch)

    async def scene(store: SqliteStore) -> None:
        lease = await store.lease(1)
        await store.txn([], [Put("a", b"", lease)])
        async with contextlib.aclosing(store.watch("a")) as events:
            tried = threading.Semaphore(0)
            store._writing.set_trace_callback(lambda text: tried.release() if text == "BEGIN IMMEDIATE" else None)
            for connection in opened:
                connection.execute("PRAGMA query_only = ON")
            # The second try says that the first one was refused, and that it goes on.
            for _ in range(2):
                assert await asyncio.to_thread(tried.acquire, timeout=30)
            assert await store.get("a") is not None
            for connection in opened:
                connection.execute("PRAGMA query_only = OFF")
            assert (await anext(events)).kind == "delete"

    play(path, scene, clock=SystemClock())


# History


def test_history_is_bounded_without_being_asked(tmp_path: Path) -> None:
    async def scene(store: SqliteStore) -> None:
        for number in range(1, 301):
            await put(store, "a", b"%d" % number)
        (kept,) = store._reading.execute("SELECT COUNT(*) FROM history").fetchone()
        assert 100 <= kept <= 112
        async with contextlib.aclosing(store.watch("", from_revision=201)) as events:
            assert (await anext(events)).entry.value == b"201"
        async with contextlib.aclosing(store.watch("", from_revision=150)) as events:
            with pytest.raises(CompactedError):
                await anext(events)

    play(tmp_path / "store.sqlite", scene, keep_revisions=100)


def test_a_quiet_watch_is_not_overtaken_by_the_bound(tmp_path: Path) -> None:
    async def scene(store: SqliteStore) -> None:
        async with contextlib.aclosing(store.watch("quiet")) as events:
            waiting = asyncio.ensure_future(anext(events))
            for number in range(100):
                await put(store, f"busy/{number}")
            await put(store, "quiet")
            assert (await waiting).entry.key == "quiet"

    play(tmp_path / "store.sqlite", scene, keep_revisions=10)


# Prefixes


@pytest.mark.parametrize(
    ("prefix", "end"),
    [
        ("", None),
        ("a", "b"),
        ("a/", "a0"),
        ("\ud7ff", "\ue000"),
        ("a\U0010ffff", "b"),
        ("\U0010ffff\U0010ffff", None),
    ],
)
def test_a_prefix_ends_before_the_next_text_in_byte_order(prefix: str, end: str | None) -> None:
    assert prefix_end(prefix) == end
    if end is not None:
        assert f"{prefix}\U0010ffff".encode() < end.encode()
