"""What the port's operations do to the tables: synchronous, one thread, inside the transaction that the caller drives.

`Ledger` writes: `begin`, any number of `apply`, then `commit` or `rollback`. Each `apply` stands or falls for itself (a
savepoint); an error of SQLite's fails the whole transaction. The functions below it read, on any connection, what was
committed. Threads, grouping and waiting are `sqlite`'s concern.
"""

from __future__ import annotations

import contextlib
import operator
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from appliance.controller.store.port import (
    CompactedError,
    Compare,
    Delete,
    Entry,
    Event,
    LeaseError,
    Op,
    Put,
    TxnResult,
    prefix_end,
)
from appliance.errors import StoreError
from appliance.runtime.clock import Clock

T = TypeVar("T")

_EXPIRED_AT_ONCE = 1000
"""Leases that end in one transaction; more of them wait for the next."""
_OPERATORS = {"=": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt}
_ENTRY = "SELECT key, value, create_revision, mod_revision, version FROM entry"


class Page(NamedTuple):
    """Events in order; behind them, nothing was left below `revision` unless the page is full."""

    events: list[Event]
    sequence: int
    """Of the last event; where the next page begins."""
    revision: int


def holds(compare: Compare, entry: Entry | None) -> bool:
    """Decides one condition (etcd: `applyCompare`)."""
    if entry is None and compare.target == "value":
        return False
    got = 0 if entry is None else getattr(entry, compare.target)
    return bool(_OPERATORS[compare.op](got, compare.operand))


class Ledger:
    """The writing side."""

    def __init__(self, connection: sqlite3.Connection, *, clock: Clock, keep_revisions: int) -> None:
        """Takes over a connection from `schema`.

        Args:
            connection: nothing else uses it.
            clock: leases run by its monotonic time, and by its wall time while nobody looks.
            keep_revisions: history of so many is kept at least; older is compacted by and by.
        """
        self._connection = connection
        self._clock = clock
        self._keep_revisions = keep_revisions
        self._compacted = 0
        self.revision = 0
        self.changed: set[str] = set()
        """Keys that this transaction wrote."""
        # A temporary table takes part in transactions and savepoints, and is gone with the process, as monotonic time.
        connection.execute("CREATE TEMP TABLE deadline (lease INTEGER PRIMARY KEY, at REAL NOT NULL)")
        connection.execute("CREATE INDEX temp.deadline_at ON deadline (at)")
        # A wall clock that jumped must not keep a lease for years: never more than its full time.
        connection.execute(
            "INSERT INTO deadline SELECT id, ? + MAX(0, MIN(ttl_s, deadline - ?)) FROM lease",
            (clock.monotonic(), clock.now()),
        )
        self.begin()
        self.rollback()

    def begin(self) -> None:
        """Starts a transaction."""
        self._connection.execute("BEGIN IMMEDIATE")
        self.revision, self._compacted = self._connection.execute("SELECT revision, compacted FROM clock").fetchone()
        self._stored = (self.revision, self._compacted)
        self.changed = set()

    def commit(self) -> None:
        """Makes all of it durable."""
        if self.revision - self._compacted > self._keep_revisions + self._keep_revisions // 10:
            self.compact(self.revision - self._keep_revisions)
        if (self.revision, self._compacted) != self._stored:
            self._connection.execute("UPDATE clock SET revision = ?, compacted = ?", (self.revision, self._compacted))
        self._connection.execute("COMMIT")

    def rollback(self) -> None:
        """Undoes all of it; SQLite may have done so already."""
        if self._connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")

    def apply(self, operation: Callable[[Ledger], T]) -> T:
        """Does one operation; a `StoreError` in it undoes this one alone."""
        self._connection.execute("SAVEPOINT one")
        try:
            return operation(self)
        except StoreError:
            self._connection.execute("ROLLBACK TO one")
            raise
        finally:
            if self._connection.in_transaction:
                self._connection.execute("RELEASE one")

    def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op]) -> TxnResult:
        """Compares and writes; see the port."""
        succeeded = all(holds(compare, read_entry(self._connection, compare.key)) for compare in compares)
        self._write(success if succeeded else failure)
        return TxnResult(succeeded, self.revision)

    def grant(self, ttl_s: int) -> int:
        """Makes a lease and returns its id."""
        lease = secrets.randbelow(2**63 - 1) + 1
        self._connection.execute("INSERT INTO lease VALUES (?, ?, ?)", (lease, ttl_s, self._clock.now() + ttl_s))
        self._connection.execute("INSERT INTO deadline VALUES (?, ?)", (lease, self._clock.monotonic() + ttl_s))
        return lease

    def keep_alive(self, lease: int) -> None:
        """Starts a lease's time again."""
        ttl_s = self._ttl_s(lease)
        self._connection.execute("UPDATE lease SET deadline = ? WHERE id = ?", (self._clock.now() + ttl_s, lease))
        self._connection.execute("UPDATE deadline SET at = ? WHERE lease = ?", (self._clock.monotonic() + ttl_s, lease))

    def revoke(self, lease: int) -> None:
        """Ends a lease with all that is attached to it."""
        self._ttl_s(lease)
        keys = self._connection.execute("SELECT key FROM entry WHERE lease = ? AND lease != 0 ORDER BY key", (lease,))
        self._write([Delete(key) for (key,) in keys.fetchall()])
        self._connection.execute("DELETE FROM lease WHERE id = ?", (lease,))
        self._connection.execute("DELETE FROM deadline WHERE lease = ?", (lease,))

    def expire(self) -> None:
        """Ends the leases whose time is over."""
        due = self._connection.execute(
            "SELECT lease FROM deadline WHERE at <= ? ORDER BY at LIMIT ?", (self._clock.monotonic(), _EXPIRED_AT_ONCE)
        )
        for (lease,) in due.fetchall():
            self.revoke(lease)

    def next_deadline(self) -> float | None:
        """Returns when the next lease ends, in monotonic seconds."""
        (at,) = self._connection.execute("SELECT MIN(at) FROM deadline").fetchone()
        return None if at is None else float(at)

    def compact(self, revision: int) -> None:
        """Forgets history before `revision`."""
        if revision > self.revision:
            raise StoreError(f"revision {revision} can't be compacted, the newest is {self.revision}")
        if revision > self._compacted:
            self._connection.execute("DELETE FROM history WHERE revision < ?", (revision,))
            self._compacted = revision

    def _ttl_s(self, lease: int) -> int:
        row = self._connection.execute("SELECT ttl_s FROM lease WHERE id = ?", (lease,)).fetchone()
        if row is None:
            raise LeaseError(f"lease {lease} isn't known: expired, revoked or never made", hint="make a new one")
        return int(row[0])

    def _write(self, operations: Sequence[Op]) -> None:
        revision = self.revision + 1
        changed = set()
        for operation in operations:
            old = read_entry(self._connection, operation.key)
            if isinstance(operation, Put):
                if operation.lease:
                    self._ttl_s(operation.lease)
                created, version = (old.create_revision, old.version + 1) if old else (revision, 1)
                self._connection.execute(
                    "REPLACE INTO entry (key, value, create_revision, mod_revision, version, lease)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (operation.key, operation.value, created, revision, version, operation.lease),
                )
                self._remember(Event("put", Entry(operation.key, operation.value, created, revision, version)))
            elif old:
                self._connection.execute("DELETE FROM entry WHERE key = ?", (operation.key,))
                self._remember(Event("delete", Entry(operation.key, b"", 0, revision, 0)))
            else:
                continue
            changed.add(operation.key)
        # Only now: a lease that isn't there ends this half-way, and the savepoint doesn't reach our own fields.
        if changed:
            self.revision = revision
            self.changed |= changed

    def _remember(self, event: Event) -> None:
        entry = event.entry
        self._connection.execute(
            "INSERT INTO history (revision, kind, key, value, create_revision, version) VALUES (?, ?, ?, ?, ?, ?)",
            (entry.mod_revision, event.kind, entry.key, entry.value, entry.create_revision, entry.version),
        )


def read_entry(connection: sqlite3.Connection, key: str) -> Entry | None:
    """Returns one entry."""
    row = connection.execute(f"{_ENTRY} WHERE key = ?", (key,)).fetchone()
    return None if row is None else Entry(*row)


def read_range(connection: sqlite3.Connection, prefix: str, start_after: str, limit: int) -> list[Entry]:
    """Returns entries in key order."""
    where, bounds = _below(prefix)
    rows = connection.execute(
        f"{_ENTRY} WHERE {where} AND key > ? ORDER BY key LIMIT ?",
        (*bounds, start_after, limit),
    )
    return [Entry(*row) for row in rows]


def read_events(connection: sqlite3.Connection, prefix: str, *, from_revision: int, after: int, limit: int) -> Page:
    """Returns the next changes below `prefix`, at `from_revision` or later and behind the sequence number `after`.

    Raises:
        CompactedError: some of them are gone.
    """
    connection.execute("BEGIN")  # one snapshot for both questions
    try:
        revision, compacted = connection.execute("SELECT revision, compacted FROM clock").fetchone()
        if from_revision < compacted:
            raise CompactedError(
                f"the changes from revision {from_revision} on are gone, history begins with {compacted}",
                hint="read the range anew, then watch from there",
            )
        where, bounds = _below(prefix)
        rows = connection.execute(
            "SELECT sequence, kind, key, value, create_revision, revision, version FROM history"  # noqa: S608
            f" WHERE revision >= ? AND sequence > ? AND {where} ORDER BY sequence LIMIT ?",
            (from_revision, after, *bounds, limit),
        ).fetchall()
    finally:
        connection.execute("COMMIT")
    return Page([Event(kind, Entry(*rest)) for _, kind, *rest in rows], rows[-1][0] if rows else after, revision)


def _below(prefix: str) -> tuple[str, tuple[str, ...]]:
    end = prefix_end(prefix)
    return ("key >= ?", (prefix,)) if end is None else ("key >= ? AND key < ?", (prefix, end))
