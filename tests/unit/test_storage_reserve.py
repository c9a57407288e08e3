"""storage.reserve: disk space held back, given up when it is needed, taken again."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.errors import StorageError
from appliance.storage.reserve import Reserve

SIZE = 1 << 20


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_space_is_held_and_given_up(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve", size_bytes=SIZE)
    assert not reserve.is_held
    assert reserve.fill()
    assert reserve.is_held
    assert reserve.fill()
    status = (tmp_path / "reserve").stat()
    assert status.st_blocks * 512 >= SIZE, "a sparse file would hold nothing"
    assert status.st_mode & 0o777 == 0o600
    assert reserve.release()
    assert not reserve.is_held
    assert not reserve.release()


def test_nothing_is_taken_from_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = Reserve(tmp_path / "reserve", size_bytes=SIZE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2 * SIZE - 1))
    assert not reserve.fill()
    assert not reserve.is_needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, SIZE - 1))
    assert reserve.is_needed
    assert not (tmp_path / "reserve").exists()


def test_a_reserve_of_nothing_is_always_held(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve", size_bytes=0)
    assert reserve.is_held
    assert reserve.fill()
    assert not (tmp_path / "reserve").exists()


def test_what_can_not_be_held_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="hold space"):
        Reserve(tmp_path / "reserve", size_bytes=SIZE).fill()
    assert not (tmp_path / "reserve").exists()
