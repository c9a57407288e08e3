"""`appliance audit verify --file` on a copied store that somebody changed: what was done to it is found, offline."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from controller_parts import HandClock

from appliance.cli import root
from appliance.controller.audit import Audit
from appliance.controller.registry import Registry
from appliance.controller.store.copy import copy_store
from appliance.controller.store.sqlite import SqliteStore
from appliance.protocol import audit, strict_json
from appliance.protocol.operator import AuditEntry

CLUSTER = "11111111-1111-4111-8111-111111111111"
ENTRIES = 6
Copy = tuple[Path, str]
"""A copied store, and the hash that a witness keeps."""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    path = tmp_path_factory.mktemp("store") / "store.sqlite"

    async def fill() -> str:
        store = SqliteStore.open(path, clock=HandClock())
        try:
            chain = Audit(store, cluster_id=CLUSTER, node=1, epoch=1)
            registry = Registry(store, chain, wall=lambda: 1_790_000_000.0)
            await registry.load(reserved=())
            for number in range(ENTRIES):
                await registry.note(actor="uid 0", action="se.revoked", subject=CLUSTER, detail=f"reason {number}")
            return chain.head
        finally:
            await store.close()

    head = asyncio.run(fill())
    return copy_store(path), head


def entries(database: sqlite3.Connection) -> list[tuple[str, bytes]]:
    return database.execute("SELECT key, value FROM entry WHERE key LIKE 'audit/%' ORDER BY key").fetchall()


def change(database: sqlite3.Connection) -> None:
    key, value = entries(database)[2]
    database.execute("UPDATE entry SET value = ? WHERE key = ?", (value.replace(b"reason 2", b"reason 9"), key))


def change_and_seal(database: sqlite3.Connection) -> None:
    """Whoever does it knows how the hash is made."""
    key, value = entries(database)[2]
    entry = json.loads(value) | {"detail": "nothing happened"}
    sealed = audit.seal(AuditEntry(**{**entry, "hash": ""}))
    database.execute("UPDATE entry SET value = ? WHERE key = ?", (strict_json.encode(sealed), key))


def remove(database: sqlite3.Connection) -> None:
    database.execute("DELETE FROM entry WHERE key = ?", (entries(database)[2][0],))


def insert(database: sqlite3.Connection) -> None:
    """One between two: all behind it move on by a number."""
    found = entries(database)
    forged = audit.seal(AuditEntry(**{**json.loads(found[2][1]), "detail": "forged", "hash": ""}))
    values = [value for _, value in found]
    values.insert(3, strict_json.encode(forged))
    key = found[-1][0]
    database.execute("INSERT INTO entry SELECT ?, value, 1, 1, 1, 0 FROM entry WHERE key = ?", (key + "1", key))
    for (name, _), value in zip(entries(database), values, strict=True):
        database.execute("UPDATE entry SET value = ? WHERE key = ?", (value, name))


def cut_off(database: sqlite3.Connection) -> None:
    for key, _ in entries(database)[-2:]:
        database.execute("DELETE FROM entry WHERE key = ?", (key,))


def truncate(database: sqlite3.Connection) -> None:
    key, value = entries(database)[2]
    database.execute("UPDATE entry SET value = ? WHERE key = ?", (value[:40], key))


def verify(path: Path, head: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    words = ("audit", "verify", "--file", str(path), "--cluster", CLUSTER, "--head", head)
    code = root.main(["--root", str(path.parent / "nowhere"), *words])
    told = capsys.readouterr()
    return code, told.out + told.err


def test_a_true_copy_holds(copied: tuple[bytes, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "copy.sqlite"
    path.write_bytes(copied[0])
    code, told = verify(path, copied[1], capsys)
    assert code == 0, told
    assert f"{ENTRIES} entries hold" in told


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (change, "changed"), (change_and_seal, "inserted or replaced"), (remove, "removed"), (insert, "inserted"),
        (cut_off, "another one than the witness remembers|cut off|remembers"), (truncate, "no audit entry any more"),
    ],
)  # fmt: skip
def test_a_copy_that_was_tampered_with_does_not(
    copied: tuple[bytes, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    tamper: Callable[[sqlite3.Connection], None], words: str,
) -> None:  # fmt: skip
    path = tmp_path / "copy.sqlite"
    path.write_bytes(copied[0])
    with closing(sqlite3.connect(path)) as database:
        tamper(database)
        database.commit()
    code, told = verify(path, copied[1], capsys)
    assert code != 0
    assert "Traceback" not in told
    assert any(word in told for word in words.split("|")), told
