"""Copies of a store: of one moment while another writes, checked before they are believed."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from controller_parts import HandClock

from appliance.controller.store import copy as module
from appliance.controller.store.copy import StoreCopy, copy_store
from appliance.controller.store.port import Put
from appliance.controller.store.schema import MIGRATIONS
from appliance.controller.store.sqlite import SqliteStore
from appliance.errors import DowngradeError, StoreError


async def filled(path: Path, count: int = 3) -> SqliteStore:
    store = SqliteStore.open(path, clock=HandClock())
    for number in range(count):
        await store.txn([], [Put(f"k/{number:04d}", b"v%d" % number), Put("other", b"x")])
    return store


def test_a_copy_of_a_store_in_use_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE", 2)

    async def go() -> None:
        store = await filled(tmp_path / "s.sqlite")
        content = copy_store(tmp_path / "s.sqlite")
        await store.txn([], [Put("k/9999", b"later")])
        await store.close()
        with StoreCopy(content, name=tmp_path / "copy") as copy:
            assert [entry.value for entry in copy.entries("k/")] == [b"v0", b"v1", b"v2"]
            assert copy.get("k/9999") is None
            found = copy.get("other")
            assert found is not None
            assert found.version == 3
        # As a file it is a store again.
        (tmp_path / "again.sqlite").write_bytes(content)
        again = SqliteStore.open(tmp_path / "again.sqlite", clock=HandClock())
        await again.txn([], [Put("k/1", b"goes on")])
        await again.close()

    asyncio.run(go())


def test_a_copied_file_is_read_without_its_log(tmp_path: Path) -> None:
    async def go() -> None:
        store = await filled(tmp_path / "s.sqlite")
        await store.close()

    asyncio.run(go())
    raw = (tmp_path / "s.sqlite").read_bytes()
    with StoreCopy(raw, name=tmp_path / "copy") as copy:
        assert len(list(copy.entries(""))) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.sqlite"]


def test_there_must_be_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is missing"):
        copy_store(tmp_path / "none.sqlite")
    (tmp_path / "text").write_text("no store, but long enough " * 200)
    with pytest.raises(StoreError):
        copy_store(tmp_path / "text")


@pytest.mark.parametrize("how", ["empty", "text", "foreign", "truncated", "newer"])
def test_what_is_no_sound_store_is_refused(tmp_path: Path, how: str) -> None:
    async def go() -> None:
        await (await filled(tmp_path / "s.sqlite", 500)).close()

    asyncio.run(go())
    raw = (tmp_path / "s.sqlite").read_bytes()
    if how in {"foreign", "newer"}:
        connection = sqlite3.connect(tmp_path / "s.sqlite")
        pragma = "application_id = 7" if how == "foreign" else f"user_version = {len(MIGRATIONS) + 1}"
        connection.execute(f"PRAGMA {pragma}")
        connection.close()
        raw = copy_store(tmp_path / "s.sqlite")
    content = {"empty": b"", "text": b"x" * 5000, "truncated": raw[: len(raw) // 2]}.get(how, raw)
    with pytest.raises(DowngradeError if how == "newer" else StoreError):
        StoreCopy(content, name=tmp_path / "copy")


def test_damage_that_shows_late_is_told(tmp_path: Path) -> None:
    async def go() -> None:
        await (await filled(tmp_path / "s.sqlite")).close()

    asyncio.run(go())
    copy = StoreCopy(copy_store(tmp_path / "s.sqlite"), name=tmp_path / "copy")
    copy.close()
    with pytest.raises(StoreError):
        list(copy.entries(""))
    with pytest.raises(StoreError):
        copy.get("k")
