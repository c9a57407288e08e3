"""The store's file: how it is made, recognised, brought forward and refused. What is in it, `ledger` says.

A new file is made under another name and renamed when it is complete, so an empty or half-made file is never taken for
a new store: it is a damaged one, and forgetting every SE without a word would be the worst answer to that.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from appliance.errors import DowngradeError, StoreError
from appliance.storage.atomic import explain as explain_os
from appliance.storage.atomic import sync_directory

APPLICATION_ID = 0x4150_4C53
"""In the file's header ("APLS"): other people's databases are refused."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE clock (id INTEGER PRIMARY KEY CHECK (id = 1), revision INTEGER NOT NULL,"
        " compacted INTEGER NOT NULL) STRICT",
        "INSERT INTO clock VALUES (1, 0, 0)",
        "CREATE TABLE entry (key TEXT NOT NULL PRIMARY KEY, value BLOB NOT NULL, create_revision INTEGER NOT NULL,"
        " mod_revision INTEGER NOT NULL, version INTEGER NOT NULL, lease INTEGER NOT NULL) STRICT",
        "CREATE INDEX entry_lease ON entry (lease) WHERE lease != 0",
        "CREATE TABLE history (sequence INTEGER PRIMARY KEY, revision INTEGER NOT NULL, kind TEXT NOT NULL,"
        " key TEXT NOT NULL, value BLOB NOT NULL, create_revision INTEGER NOT NULL, version INTEGER NOT NULL) STRICT",
        "CREATE INDEX history_revision ON history (revision)",
        "CREATE TABLE lease (id INTEGER PRIMARY KEY, ttl_s INTEGER NOT NULL, deadline REAL NOT NULL) STRICT",
    ),
)
"""What makes version n + 1 of version n, statement by statement. Released ones never change; new ones come behind."""

_BUSY_TIMEOUT_S = 5.0
_SIDE_FILES = ("", "-wal", "-shm", "-journal")

_FULL = "free space on the file system of {path} (`df -h {path}`); the store works again by itself then"
_RESTORE = "stop the controller and restore {path} from a backup; the file was left as it is"
_ADVICE: dict[int, tuple[bool, str]] = {
    sqlite3.SQLITE_FULL: (True, _FULL),
    sqlite3.SQLITE_IOERR: (True, "see `dmesg`, and `df -h {path}`; the store works again by itself when the disk does"),
    sqlite3.SQLITE_READONLY: (True, "make {path}, the files beside it and their directory writable"),
    sqlite3.SQLITE_CANTOPEN: (True, "check that {path} is there, and owner and mode of it and of its directory"),
    sqlite3.SQLITE_PERM: (True, "check owner and mode of {path} and of its directory"),
    sqlite3.SQLITE_BUSY: (True, "another program holds {path} (`fuser -v {path}`): end it"),
    sqlite3.SQLITE_LOCKED: (True, "another program holds {path} (`fuser -v {path}`): end it"),
    sqlite3.SQLITE_CORRUPT: (False, _RESTORE),
    sqlite3.SQLITE_NOTADB: (False, _RESTORE),
}


def explain(error: sqlite3.Error, path: Path) -> StoreError:
    """Returns the `StoreError` for what SQLite says about the file at `path`."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    retryable, hint = _ADVICE.get(code, (False, "this is a defect of the program, please report it"))
    return StoreError(f"the store {path} failed: {error}", hint=hint.format(path=path), retryable=retryable)


def open_database(path: Path) -> sqlite3.Connection:
    """Opens the file for writing, makes it where it is missing, and brings it to the newest version.

    Raises:
        DowngradeError: a newer version of this program wrote it; left alone.
        StoreError: it is damaged, not a store of ours, or can't be opened.
    """
    try:
        if not path.exists():
            _create(path)
        if path.stat().st_size == 0:
            raise StoreError(f"the store {path} is empty: it was truncated", hint=_RESTORE.format(path=path))
        connection = connect(path)
        try:
            check(connection, path)
            _migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection
    except OSError as error:
        raise explain_os(error, "open the store", path) from error
    except sqlite3.Error as error:
        raise explain(error, path) from error


def connect(path: Path) -> sqlite3.Connection:
    """Opens an existing file; each connection is used by one thread at a time."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        # FULL: a commit returns when the log is on the disk; NORMAL would lose acknowledged commits in a power cut.
        for pragma in ("synchronous = FULL", "temp_store = MEMORY", "trusted_schema = OFF", "cell_size_check = ON"):
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def _create(path: Path) -> None:
    if Path(f"{path}-wal").exists():
        raise StoreError(
            f"the store {path} is missing, but its log {path}-wal is there",
            hint=f"put {path} back beside it, or move {path}-wal away to begin an empty store",
        )
    new = path.with_name(f".{path.name}.new")
    for suffix in _SIDE_FILES:
        Path(f"{new}{suffix}").unlink(missing_ok=True)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = connect(new)
    try:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreError(
                f"the file system of {path} can't hold a write-ahead log",
                hint="put the controller's state on a local file system",
            )
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        _migrate(connection)
    finally:
        connection.close()  # carries the log over into the file and syncs it
    new.rename(path)
    sync_directory(path.parent)


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Raises `StoreError` or `DowngradeError` for what is no undamaged store of this version."""
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    if application_id != APPLICATION_ID:
        raise StoreError(
            f"{path} is no store of this program: application id {application_id:#x}, expected {APPLICATION_ID:#x}",
            hint=f"move {path} away, and put the right file there",
        )
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise DowngradeError(
            f"the store {path} has version {version}, this program knows up to {len(MIGRATIONS)}",
            hint="a newer version of this program wrote it: run that version; the file was left alone",
        )
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise StoreError(f"the store {path} is damaged: {verdict}", hint=_RESTORE.format(path=path))


def _migrate(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for number, statements in enumerate(MIGRATIONS[version:], version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
