"""Copies of a store: made while another process writes it, read without changing a byte, checked before it is believed.

SQLite's backup API copies all pages under one read transaction, so a copy is of one moment.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from appliance.controller.store import ledger, schema
from appliance.controller.store.port import Entry
from appliance.errors import StoreError

_PAGE = 1000
_HEADER_BYTES = 100
_WAL_MARK = slice(18, 20)
"""File format versions in the header (sqlite.org/fileformat2.html, 1.3): 2 asks for a log that a copy hasn't."""


def copy_store(path: Path) -> bytes:
    """Returns the bytes of a store file as it is at this moment.

    Raises:
        StoreError: there is none, or it can't be read.
    """
    if not path.exists():
        raise StoreError(f"the store {path} is missing", hint="give the root of a controller")
    try:
        with contextlib.closing(schema.connect(path)) as source, contextlib.closing(sqlite3.connect(":memory:")) as to:
            source.backup(to)
            return to.serialize()
    except sqlite3.Error as error:
        raise schema.explain(error, path) from error


class StoreCopy:
    """A copied store, held in memory; a context manager.

    Args:
        content: the file's bytes.
        name: for messages.

    Raises:
        StoreError: damaged, or no store of ours.
        DowngradeError: of a newer version.
    """

    def __init__(self, content: bytes, *, name: Path) -> None:
        self._name = name
        if len(content) < _HEADER_BYTES:
            raise StoreError(f"{name} is no store: {len(content)} bytes", hint="copy it again")
        quiet = bytearray(content)
        quiet[_WAL_MARK] = b"\x01\x01"
        self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        try:
            self._connection.deserialize(bytes(quiet))
            schema.check(self._connection, name)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self.close()
            raise self._explained(error) from error
        except BaseException:
            self.close()
            raise

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yields all entries below `prefix`, in key order. Raises `StoreError`."""
        after = ""
        try:
            while page := ledger.read_range(self._connection, prefix, after, _PAGE):
                yield from page
                after = page[-1].key
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._explained(error) from error

    def get(self, key: str) -> Entry | None:
        """Returns one entry. Raises `StoreError`."""
        try:
            return ledger.read_entry(self._connection, key)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._explained(error) from error

    def _explained(self, error: sqlite3.Error | UnicodeDecodeError) -> StoreError:
        if isinstance(error, UnicodeDecodeError):  # the sqlite3 module makes text of what a damaged file holds
            return StoreError(f"the store {self._name} is damaged: {error}", hint="copy it again")
        return schema.explain(error, self._name)

    def close(self) -> None:
        """Forgets it."""
        self._connection.close()

    def __enter__(self) -> StoreCopy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
