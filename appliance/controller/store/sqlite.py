"""The store of a single controller node: one SQLite file, one thread that writes, one that reads.

Writes queue up, and all that wait go into one SQLite transaction: under load a commit (an fsync) serves many callers.
A caller is answered after the commit that holds its write, and the whole group fails with it. Reads come from a second
connection and see what was committed. Watchers read the history table, so a slow one costs no memory; they are woken
when a key below their prefix changed. What operations mean, `ledger` knows; what the file is, `schema`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import queue
import sqlite3
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from appliance.controller.store import ledger, schema
from appliance.controller.store.port import (
    Compare,
    Entry,
    Event,
    Op,
    TxnResult,
    check_key,
    check_lease,
    check_text,
    check_ttl,
    check_txn,
)
from appliance.errors import StoreError
from appliance.runtime.clock import Clock

T = TypeVar("T")
P = ParamSpec("P")

_GROUP_SIZE = 256
"""Operations in one commit at most: a bound on what one failure takes with it."""
_GATHER_S = 0.01
"""Least time between two commits while several callers write. A commit costs as much processor time as six of the
operations in it, so that under load waiting a moment for more of them is the shorter way for all."""
_EVENTS_AT_ONCE = 64
SLOW_S = 0.25
"""A commit that takes longer is told: a disk needs some milliseconds."""
SLOW_TOLD_S = 60.0
_PAUSE_AFTER_FAILURE_S = 1.0
"""Before leases that could not be ended (disk full) are tried again."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts since the store was opened."""

    commits: int = 0
    """SQLite transactions that changed something: each is one fsync of the log."""
    txns: int = 0
    """Operations that were asked for and committed."""


class _Work(NamedTuple):
    operation: Callable[[ledger.Ledger], Any]
    future: asyncio.Future[Any]


@dataclass(eq=False, slots=True)
class _Watcher:
    """Where a watch stands. Touched in its event loop only."""

    prefix: str
    revision: int
    """The next to be read."""
    loop: asyncio.AbstractEventLoop
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: bool = False

    def announce(self, revision: int, keys: Iterable[str]) -> None:
        """Wakes the watcher for its own keys; others only move it on, so that compaction doesn't overtake it."""
        if any(key.startswith(self.prefix) for key in keys):
            self.woken.set()
        elif self.waiting and not self.woken.is_set():
            self.revision = max(self.revision, revision + 1)


class SqliteStore:
    """Implements `port.Store`. Use it from event loops; `open` it anywhere."""

    def __init__(
        self, path: Path, *, writing: sqlite3.Connection, reading: sqlite3.Connection, clock: Clock, keep_revisions: int
    ) -> None:
        """Use `open`."""
        self._path = path
        self._writing = writing
        self._reading = reading
        self._clock = clock
        self._ledger = ledger.Ledger(writing, clock=clock, keep_revisions=keep_revisions)
        self._revision = self._ledger.revision
        self._stats = Stats()
        self._slow = (-math.inf, 0.0)
        """When the last slow commit ended, by the monotonic clock, and how long it took."""
        self._began_at: float | None = None
        """The commit under way."""
        self._closed = False
        self._watchers: set[_Watcher] = set()
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._ends = threading.Event()
        self._may_commit_at = 0.0
        self._several = False
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-read")
        self._writer = threading.Thread(target=self._write, name="store-write", daemon=True)
        self._writer.start()

    @classmethod
    def open(cls, path: Path, *, clock: Clock, keep_revisions: int = 10_000) -> SqliteStore:
        """Opens the store, makes it where it is missing. Blocks for some milliseconds.

        Args:
            path: the file; SQLite's log and index lie beside it.
            clock: for leases.
            keep_revisions: how much history watchers can count on.

        Raises:
            DowngradeError: a newer version of this program wrote it; left alone.
            StoreError: it is damaged, not a store of ours, or can't be opened.
        """
        with contextlib.ExitStack() as undo:
            writing = schema.open_database(path)
            undo.callback(writing.close)
            try:
                reading = schema.connect(path)
                undo.callback(reading.close)
                store = cls(path, writing=writing, reading=reading, clock=clock, keep_revisions=keep_revisions)
            except sqlite3.Error as error:
                raise schema.explain(error, path) from error
            undo.pop_all()
        return store

    @property
    def stats(self) -> Stats:
        """Counts so far."""
        return self._stats

    def slow_s(self) -> float:
        """How long the last slow commit took, or the one under way takes so far; 0 where none was slow of late."""
        now, began = self._clock.monotonic(), self._began_at
        so_far_s = now - began if began is not None else 0.0
        ended, took_s = self._slow
        return max(so_far_s if so_far_s > SLOW_S else 0.0, took_s if now - ended < SLOW_TOLD_S else 0.0)

    async def get(self, key: str) -> Entry | None:
        """See `port.Store`."""
        check_key(key)
        return await self._read(ledger.read_entry, key)

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 1000) -> list[Entry]:
        """See `port.Store`."""
        check_text(prefix, "prefix")
        check_text(start_after, "start")
        if limit < 1:
            raise StoreError(f"a range of {limit} entries, at least 1 expected")
        return await self._read(ledger.read_range, prefix, start_after, limit)

    async def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """See `port.Store`."""
        check_txn(compares, success, failure)
        return await self._submit(lambda to: to.txn(compares, success, failure))

    def watch(self, prefix: str, *, from_revision: int = 0) -> AsyncGenerator[Event, None]:
        """See `port.Store`."""
        check_text(prefix, "prefix")
        self._check_open()
        # The beginning is fixed here: a generator's body doesn't run before it is first asked.
        return self._follow(prefix, from_revision or self._revision + 1)

    async def lease(self, ttl_s: int) -> int:
        """See `port.Store`."""
        check_ttl(ttl_s)
        return await self._submit(lambda to: to.grant(ttl_s))

    async def keep_alive(self, lease: int) -> None:
        """See `port.Store`."""
        check_lease(lease)
        await self._submit(lambda to: to.keep_alive(lease))

    async def revoke_lease(self, lease: int) -> None:
        """See `port.Store`."""
        check_lease(lease)
        await self._submit(lambda to: to.revoke(lease))

    async def compact(self, revision: int) -> None:
        """See `port.Store`."""
        await self._submit(lambda to: to.compact(revision))

    async def close(self) -> None:
        """See `port.Store`."""
        if self._closed:
            return
        self._closed = True
        self._ends.set()
        self._queue.put(None)
        await asyncio.get_running_loop().run_in_executor(self._reader, self._finish)
        self._reader.shutdown()
        for watcher in list(self._watchers):
            _post(watcher.loop, watcher.woken.set)

    def _finish(self) -> None:
        self._writer.join()
        self._reading.close()
        self._writing.close()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the store {self._path} is closed", hint="the controller is stopping")

    async def _read(
        self, question: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        self._check_open()
        ask = functools.partial(question, self._reading, *args, **kwargs)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, ask)
        except sqlite3.Error as error:
            raise schema.explain(error, self._path) from error

    async def _submit(self, operation: Callable[[ledger.Ledger], T]) -> T:
        self._check_open()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put(_Work(operation, future))
        return await future

    async def _follow(self, prefix: str, revision: int) -> AsyncGenerator[Event, None]:
        watcher = _Watcher(prefix, revision, asyncio.get_running_loop())
        self._watchers.add(watcher)
        sequence = 0
        try:
            while not self._closed:
                watcher.woken.clear()
                page = await self._read(
                    ledger.read_events, prefix, from_revision=watcher.revision, after=sequence, limit=_EVENTS_AT_ONCE
                )
                sequence = page.sequence
                for event in page.events:
                    yield event
                if len(page.events) == _EVENTS_AT_ONCE:
                    watcher.revision = page.events[-1].entry.mod_revision
                    continue
                watcher.revision = max(watcher.revision, page.revision + 1)
                watcher.waiting = True
                await watcher.woken.wait()
                watcher.waiting = False
        finally:
            self._watchers.discard(watcher)

    def _write(self) -> None:
        """The writing thread: groups what waits, until `close` was asked for."""
        pause_s = 0.0
        closing = False
        while not closing:
            group = self._next_group(pause_s)
            works = [work for work in group if work]
            closing = len(works) < len(group)
            if works or not closing:
                pause_s = 0.0 if self._commit(works) else _PAUSE_AFTER_FAILURE_S
                self._several = len(works) > 1
                self._may_commit_at = self._clock.monotonic() + _GATHER_S

    def _next_group(self, pause_s: float) -> list[_Work | None]:
        deadline = self._ledger.next_deadline()
        timeout_s = None if deadline is None else max(pause_s, deadline - self._clock.monotonic())
        group: list[_Work | None] = []
        with contextlib.suppress(queue.Empty):
            group.append(self._queue.get(timeout=timeout_s))
            if self._several or not self._queue.empty():
                self._ends.wait(min(_GATHER_S, self._may_commit_at - self._clock.monotonic()))
            while len(group) < _GROUP_SIZE and group[-1] is not None:
                group.append(self._queue.get_nowait())
        return group

    def _commit(self, group: Sequence[_Work]) -> bool:
        outcomes: list[Any] = []
        book = self._ledger
        began = self._began_at = self._clock.monotonic()
        try:
            book.begin()
            before = self._writing.total_changes
            book.expire()
            for work in group:
                try:
                    outcomes.append(book.apply(work.operation))
                except StoreError as error:
                    outcomes.append(error)
            book.commit()
            self._ended(began)
        except sqlite3.Error as error:
            outcomes = [schema.explain(error, self._path) for _ in group]
        except Exception as error:  # noqa: BLE001 - a worker's top: a defect must answer its callers, not hang them
            outcomes = [error for _ in group]
        else:
            wrote = self._writing.total_changes > before
            self._stats = Stats(self._stats.commits + wrote, self._stats.txns + len(group))
            self._revision = book.revision
            self._announce(book.revision, frozenset(book.changed))
            _answer(group, outcomes)
            return True
        book.rollback()
        self._ended(began)
        _answer(group, outcomes)
        return False

    def _ended(self, began: float) -> None:
        now, self._began_at = self._clock.monotonic(), None
        if now - began > SLOW_S:
            self._slow = (now, now - began)

    def _announce(self, revision: int, keys: frozenset[str]) -> None:
        if keys:
            for watcher in list(self._watchers):
                _post(watcher.loop, functools.partial(watcher.announce, revision, keys))


def _answer(group: Sequence[_Work], outcomes: Sequence[Any]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = defaultdict(list)
    for work, outcome in zip(group, outcomes, strict=True):
        by_loop[work.future.get_loop()].append((work.future, outcome))
    for loop, answers in by_loop.items():
        _post(loop, functools.partial(_resolve, answers))


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
        loop.call_soon_threadsafe(call)


def _resolve(answers: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, outcome in answers:
        if future.done():
            continue  # its caller was cancelled
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
