"""The spool: order, bound, survival of kills, cuts and damage."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import appliance
from appliance.errors import StorageError
from appliance.storage.spool import Spool

HEADER = 16


@pytest.fixture(autouse=True)
def _no_descriptor_left() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def items(spool: Spool, count: int = 10_000) -> list[bytes]:
    return [item for _, item in spool.peek(count)]


def fill(spool: Spool, first: int, last: int) -> list[bytes]:
    made = [b"item %06d" % number for number in range(first, last + 1)]
    for item in made:
        spool.append(item)
    return made


def reopened(spool: Spool, directory: Path, max_bytes: int) -> Spool:
    spool.close()
    return Spool(directory, max_bytes=max_bytes)


def test_items_come_out_in_order_until_acknowledged(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=100_000)
    assert (len(spool), spool.size_bytes, spool.dropped, spool.peek(5)) == (0, 0, 0, [])
    made = fill(spool, 1, 10)
    assert spool.peek(3) == [(1, made[0]), (2, made[1]), (3, made[2])]
    assert spool.peek(3) == spool.peek(3)
    spool.acknowledge(3)
    assert spool.peek(2) == [(4, made[3]), (5, made[4])]
    assert len(spool) == 7
    spool.acknowledge(2)  # an old one changes nothing
    assert len(spool) == 7
    spool.acknowledge(10_000)
    assert (len(spool), spool.peek(5), spool.dropped) == (0, [], 0)
    spool.append(b"")
    assert spool.peek(1) == [(11, b"")]
    spool.close()


def test_what_was_appended_and_acknowledged_is_so_after_opening_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=4000)
    made = fill(spool, 1, 60)
    spool.acknowledge(20)
    spool = reopened(spool, tmp_path, 4000)
    assert spool.peek(1) == [(21, made[20])]
    assert items(spool) == made[20:]
    spool.acknowledge(60)
    spool = reopened(spool, tmp_path, 4000)
    assert len(spool) == 0
    spool.append(b"next")
    assert spool.peek(1) == [(61, b"next")]
    spool.close()


def test_the_oldest_make_room_and_are_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2000)
    made = fill(spool, 1, 500)
    assert spool.size_bytes <= 2000
    assert spool.dropped == 500 - len(spool)
    assert len(spool) >= 2000 * 3 // 4 // (HEADER + len(made[0]))
    assert items(spool) == made[-len(spool) :]
    spool.close()


def test_acknowledged_ones_that_make_room_are_not_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2000)
    for first in range(1, 1001, 5):
        fill(spool, first, first + 4)
        spool.acknowledge(first + 3)
    assert spool.dropped == 0
    assert items(spool) == [b"item 001000"]
    spool.close()


@pytest.mark.parametrize("acknowledged", [False, True])
def test_an_item_as_large_as_the_spool_takes_the_place_of_all(tmp_path: Path, *, acknowledged: bool) -> None:
    spool = Spool(tmp_path, max_bytes=1000)
    spool.append(b"small")
    if acknowledged:
        spool.acknowledge(1)
    large = b"x" * (1000 - HEADER)
    spool.append(large)
    assert spool.peek(5) == [(2, large)]
    assert spool.dropped == (0 if acknowledged else 1)
    # No room for a note of the acknowledgement: the item may come again, the bound holds.
    spool.append(large)
    spool.acknowledge(3)
    assert spool.size_bytes <= 1000
    assert len(spool) == 0
    spool.close()


def test_an_item_larger_than_the_spool_is_refused(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=1000)
    spool.append(b"small")
    with pytest.raises(StorageError, match="doesn't fit"):
        spool.append(b"x" * 985)
    assert items(spool) == [b"small"]
    spool.close()


def test_a_tail_cut_anywhere_loses_what_was_cut_and_nothing_else(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "whole", max_bytes=100_000)
    made = fill(spool, 1, 3)
    spool.close()
    (segment,) = (tmp_path / "whole").iterdir()
    record = HEADER + len(made[0])
    for length in range(3 * record + 1):
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        os.truncate(tmp_path / "cut" / segment.name, length)
        spool = Spool(tmp_path / "cut", max_bytes=100_000)
        assert items(spool) == made[: length // record]
        spool.append(b"after")
        spool = reopened(spool, tmp_path / "cut", 100_000)
        assert items(spool) == [*made[: length // record], b"after"]
        spool.close()
        shutil.rmtree(tmp_path / "cut")


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "whole", max_bytes=100_000)
    made = fill(spool, 1, 3)
    spool.close()
    (segment,) = (tmp_path / "whole").iterdir()
    content = segment.read_bytes()
    for position in range(len(content)):
        segment.write_bytes(content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :])
        spool = Spool(tmp_path / "whole", max_bytes=100_000)
        assert items(spool) == made[: position // (HEADER + len(made[0]))]
        spool.close()


def test_zeros_and_foreign_files_are_no_items(tmp_path: Path) -> None:
    (tmp_path / "00000000000000000001.seg").write_bytes(bytes(4096))
    (tmp_path / "notes.seg").write_bytes(b"notes")
    spool = Spool(tmp_path, max_bytes=100_000)
    assert len(spool) == 0
    assert fill(spool, 1, 2) == items(spool)
    spool.close()
    assert (tmp_path / "notes.seg").read_bytes() == b"notes"


def test_records_out_of_order_end_their_segment(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=100_000)
    made = fill(spool, 1, 2)
    spool.close()
    (segment,) = tmp_path.iterdir()
    segment.write_bytes(segment.read_bytes() * 2)
    spool = Spool(tmp_path, max_bytes=100_000)
    assert items(spool) == made
    spool.close()


def test_damage_in_the_middle_is_counted_and_passed_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=4000)
    made = fill(spool, 1, 60)
    segments = sorted(tmp_path.iterdir())
    assert len(segments) > 3
    held = int(segments[2].stem) - int(segments[1].stem)
    spool.close()
    os.truncate(segments[1], HEADER)  # all of its items
    spool = Spool(tmp_path, max_bytes=4000)
    first = int(segments[1].stem)
    assert items(spool) == made[: first - 1] + made[first - 1 + held :]
    assert spool.dropped == held
    spool.acknowledge(first + held)
    assert items(spool) == made[first + held :]
    spool.close()


@pytest.mark.parametrize("which", [0, -1], ids=["oldest", "newest"])
def test_damage_that_comes_while_open_is_counted_and_passed_over(tmp_path: Path, which: int) -> None:
    spool = Spool(tmp_path, max_bytes=4000)
    fill(spool, 1, 60)
    before = len(spool)
    spool.acknowledge(2)
    segment = sorted(tmp_path.iterdir())[which]
    with segment.open("r+b") as file:
        file.seek(2 * (HEADER + 11) + 20)
        file.write(b"#")
    left = items(spool)
    assert len(left) == len(spool) == len(items(spool))
    assert spool.dropped == before - 2 - len(left) > 0
    spool.append(b"after")
    assert items(spool) == [*left, b"after"]
    spool = reopened(spool, tmp_path, 4000)
    # The note of the acknowledgement may have been behind the damage: then those items come again.
    assert items(spool)[-len(left) - 1 :] == [*left, b"after"]
    spool.close()


def test_a_full_disk_refuses_the_item_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, max_bytes=100_000)
    made = fill(spool, 1, 3)
    real = os.write
    calls = 0

    def half(fd: int, content: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls % 2:
            return real(fd, content[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(StorageError) as caught:
            spool.append(b"lost")
        assert caught.value.retryable
        with pytest.raises(StorageError):
            spool.acknowledge(1)
    assert items(spool) == made[1:]
    spool.append(b"after")
    spool = reopened(spool, tmp_path, 100_000)
    assert items(spool)[-3:] == [*made[1:], b"after"]
    spool.close()


def test_a_new_segment_that_cannot_be_made_refuses_the_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, max_bytes=800)
    made = fill(spool, 1, 3)
    real = os.ftruncate

    def fail(fd: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(StorageError, match="append"):
            spool.append(b"x" * 90)
    assert os.ftruncate is real
    assert items(spool) == made
    spool.append(b"x" * 90)
    assert items(spool) == [*made, b"x" * 90]
    spool.close()


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        Spool(tmp_path / "file", max_bytes=1000)
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "00000000000000000001.seg").mkdir()
    with pytest.raises(StorageError, match="open the spool"):
        Spool(tmp_path / "spool", max_bytes=1000)


def test_a_segment_that_went_away_is_told(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=1000)
    spool.append(b"item")
    for segment in tmp_path.iterdir():
        segment.unlink()
    with pytest.raises(StorageError, match="read the spool"):
        spool.peek(1)
    spool.close()


def test_closing_tells_when_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    spool = Spool(tmp_path, max_bytes=1000)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StorageError, match="close the spool"):
        spool.close()


def test_finished_segments_are_synced_records_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, max_bytes=80_000)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    fill(spool, 1, 100)
    assert synced == []
    fill(spool, 101, 500)
    assert min(path.name for path in tmp_path.iterdir()) == synced[0]
    assert len(synced) == 2 * (len(list(tmp_path.iterdir())) - 1)
    spool.close()


def test_killed_while_appending_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from appliance.storage.spool import Spool
spool = Spool(Path(sys.argv[1]), max_bytes=1 << 20)
number = 0
while True:
    number += 1
    spool.append(b"item %06d" % number)
    print(number, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(appliance.__file__).parent.parent)},
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(500)]
        child.kill()
        told += child.stdout.readlines()
    last = max(int(line) for line in told if line.endswith("\n"))
    spool = Spool(tmp_path, max_bytes=1 << 20)
    assert items(spool, last) == [b"item %06d" % number for number in range(1, last + 1)]
    spool.close()


def test_any_order_of_operations_keeps_order_and_bound(tmp_path: Path) -> None:
    dice = random.Random(20)
    for trial in range(40):
        directory = tmp_path / str(trial)
        max_bytes = dice.choice([200, 1000, 5000])
        spool = Spool(directory, max_bytes=max_bytes)
        waiting: list[bytes] = []
        for _ in range(120):
            match dice.choice(["append", "append", "append", "peek", "acknowledge", "reopen"]):
                case "append":
                    item = dice.randbytes(dice.randrange(dice.choice([20, 100, max_bytes - HEADER + 1])))
                    spool.append(item)
                    waiting = [*waiting, item][-len(spool) :]
                case "peek":
                    count = dice.randrange(1, 50)
                    assert items(spool, count) == waiting[:count]
                case "acknowledge" if waiting:
                    found = spool.peek(dice.randrange(1, 50))
                    which = dice.randrange(len(found))
                    spool.acknowledge(found[which][0])
                    waiting = waiting[which + 1 :]
                case "reopen":
                    spool = reopened(spool, directory, max_bytes)
                    again = items(spool)  # where there was no room for a note, acknowledged ones come again
                    assert again[len(again) - len(waiting) :] == waiting
                    waiting = again
            assert len(spool) == len(waiting)
            assert spool.size_bytes == sum(path.stat().st_size for path in directory.iterdir()) <= max_bytes
        spool.close()


def test_threads_share_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=1 << 20)
    got: list[bytes] = []
    done = threading.Event()

    def drain() -> None:
        while not (done.is_set() and len(spool) == 0):
            for number, item in spool.peek(7):
                got.append(item)
                spool.acknowledge(number)

    writers = [threading.Thread(target=fill, args=(spool, first, first + 199)) for first in (1, 1001, 2001)]
    reader = threading.Thread(target=drain)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert len(got) == len(set(got)) == 600
    for first in (b"item 000", b"item 001", b"item 002"):
        part = [item for item in got if item.startswith(first)]
        assert part == sorted(part)
    spool.close()
