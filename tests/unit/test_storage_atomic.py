"""Atomic files: old content or new, whatever is cut when, and errors that say what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import appliance
from appliance.errors import StorageError
from appliance.storage import atomic
from appliance.storage.atomic import (
    TooLargeError,
    make_dir,
    read_limited,
    remove_durably,
    set_aside,
    write_atomic,
)

OLD = b"old" * 1000
NEW = b"new" * 5000

# Ends the process at the n-th system call that `write_atomic` makes: before it, after it, or half-way through a write.
CUT = """
import fcntl, os, sys
from pathlib import Path
from appliance.storage.atomic import write_atomic

path, number, moment = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = 0

def cut(module, name):
    real = getattr(module, name)
    def replaced(*args, **kwargs):
        global calls
        calls += 1
        if calls == number:
            if moment == "before":
                os._exit(9)
            if moment == "half" and name == "write":
                args = (args[0], bytes(args[1])[: len(args[1]) // 2])
            real(*args, **kwargs)
            print(name, flush=True)
            os._exit(9)
        return real(*args, **kwargs)
    setattr(module, name, replaced)

for name in ("open", "fchmod", "ftruncate", "write", "fsync", "rename", "close"):
    cut(os, name)
cut(fcntl, "flock")
write_atomic(path, b"new" * 5000)
"""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(autouse=True)
def _no_descriptor_left() -> Iterator[None]:
    before = len(names(Path("/proc/self/fd")))
    yield
    assert len(names(Path("/proc/self/fd"))) <= before


def fail(monkeypatch: pytest.MonkeyPatch, name: str, number: int, *, at: int = 1) -> None:
    """Lets the `at`-th call of `os.<name>` from now on fail with errno `number`."""
    real = getattr(os, name)
    calls = 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, replaced)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_written_bytes_come_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, OLD)
    write_atomic(path, NEW)
    assert path.read_bytes() == NEW
    assert read_limited(path, max_bytes=len(NEW)) == NEW
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
def test_the_mode_is_the_one_asked_for_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    umask = os.umask(0o077)
    try:
        write_atomic(tmp_path / "file", NEW, mode=mode)
    finally:
        os.umask(umask)
    assert mode_of(tmp_path / "file") == mode


def test_a_symbolic_link_is_replaced_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(OLD)
    (tmp_path / "file").symlink_to(other)
    write_atomic(tmp_path / "file", NEW)
    assert other.read_bytes() == OLD
    assert not (tmp_path / "file").is_symlink()


def test_a_symbolic_link_in_place_of_the_temporary_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(OLD)
    (tmp_path / ".file.tmp").symlink_to(other)
    with pytest.raises(StorageError, match="symbolic") as caught:
        write_atomic(tmp_path / "file", NEW)
    assert "symbolic link" in caught.value.hint
    assert other.read_bytes() == OLD


def test_what_an_interrupted_writer_left_is_used_up(tmp_path: Path) -> None:
    left = tmp_path / ".file.tmp"
    left.write_bytes(b"longer than what comes next" * 100)
    left.chmod(0o644)
    write_atomic(tmp_path / "file", b"short")
    assert (tmp_path / "file").read_bytes() == b"short"
    assert mode_of(tmp_path / "file") == 0o600
    assert names(tmp_path) == ["file"]


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: real(fd, bytes(content)[:7]))
    write_atomic(tmp_path / "file", b"some more than seven bytes")
    assert (tmp_path / "file").read_bytes() == b"some more than seven bytes"


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_write_cut_at_any_step_leaves_old_or_new_and_the_next_one_works(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "file"
    environment = {**os.environ, "PYTHONPATH": str(Path(appliance.__file__).parent.parent)}
    steps: list[str] = []
    for number in range(1, 40):
        write_atomic(path, OLD)
        child = subprocess.run(
            [sys.executable, "-c", CUT, str(path), str(number), moment],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert child.returncode in {0, 9}, child.stderr
        assert path.read_bytes() in {OLD, NEW}
        if child.returncode == 0:
            break
        if moment != "before":
            steps.append(child.stdout.strip())
            assert path.read_bytes() == (NEW if "rename" in steps else OLD), steps
        write_atomic(path, NEW)
        assert path.read_bytes() == NEW
        assert names(tmp_path) == ["file"]
    else:
        pytest.fail("the child never got through")
    if moment != "before":
        # The order is the guarantee: content on disk before the name, the name on disk before we return.
        assert [step for step in steps if step in {"write", "fsync", "rename"}] == ["write", "fsync", "rename", "fsync"]


@pytest.mark.parametrize(
    ("name", "at"),
    [("open", 1), ("fchmod", 1), ("ftruncate", 1), ("write", 1), ("fchmod", 2), ("fsync", 1), ("rename", 1)],
)
def test_a_failed_step_keeps_the_old_content_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    path = tmp_path / "file"
    write_atomic(path, OLD)
    with monkeypatch.context() as patch:
        fail(patch, name, errno.ENOSPC, at=at)
        with pytest.raises(StorageError, match="No space left") as caught:
            write_atomic(path, NEW)
    assert caught.value.retryable
    assert "disk is full" in caught.value.hint
    assert str(tmp_path) in caught.value.hint
    assert path.read_bytes() == OLD
    assert names(tmp_path) == ["file"]


def test_a_failed_sync_of_the_directory_is_told_though_the_new_content_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, "fsync", errno.EIO, at=2)
        with pytest.raises(StorageError) as caught:
            write_atomic(tmp_path / "file", NEW)
    assert not caught.value.retryable
    assert "dmesg" in caught.value.hint
    assert (tmp_path / "file").read_bytes() == NEW


def test_an_interrupt_cleans_up_and_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", NEW)
    assert names(tmp_path) == []


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        write_atomic(tmp_path / "missing" / "file", NEW)
    assert f"create {tmp_path / 'missing'}" in caught.value.hint


def test_a_lock_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StorageError, match="No locks available"):
        write_atomic(tmp_path / "file", NEW)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_temporary_file_that_another_writer_renamed_away_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, replaced: bool
) -> None:
    """What the loser of a race for the lock sees: its descriptor is the winner's finished file by now."""
    real: Callable[[int, int], None] = fcntl.flock
    calls = 0

    def flock(fd: int, kind: int) -> None:
        nonlocal calls
        calls += 1
        real(fd, kind)
        if calls == 1:
            (tmp_path / ".file.tmp").rename(tmp_path / "file")
            if replaced:
                (tmp_path / ".file.tmp").write_bytes(b"a third one's")

    monkeypatch.setattr(fcntl, "flock", flock)
    write_atomic(tmp_path / "file", NEW)
    assert calls == 2
    assert (tmp_path / "file").read_bytes() == NEW
    assert names(tmp_path) == ["file"]


def test_writers_in_many_threads_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([letter]) * (letter * 37) for letter in b"abcd"]
    write_atomic(path, contents[0])
    seen: list[bytes] = []

    def write(content: bytes) -> None:
        for _ in range(40):
            write_atomic(path, content)
            seen.append(path.read_bytes())

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 160
    assert set(seen) <= set(contents)
    assert names(tmp_path) == ["file"]


def test_read_limited_lets_missing_files_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_limited(tmp_path / "missing", max_bytes=10)


def test_read_limited_refuses_what_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345678901")
    with pytest.raises(TooLargeError, match="more than 10 bytes"):
        read_limited(tmp_path / "file", max_bytes=10)


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_read_limited_reads_regular_files_only(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(StorageError, match="no regular file"):
        read_limited(path, max_bytes=10)


def test_read_limited_tells_why_it_cannot_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "open", errno.EACCES)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        read_limited(tmp_path / "file", max_bytes=10)
    assert "repeat as root" in caught.value.hint


def test_an_error_without_a_number_still_reads(tmp_path: Path) -> None:
    told = atomic.explain(OSError("odd"), "write", tmp_path / "file")
    assert "odd" in told.message
    assert "dmesg" in told.hint


def test_make_dir_makes_all_that_is_missing_with_the_mode(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        make_dir(tmp_path / "a" / "b" / "c", mode=0o755)
    finally:
        os.umask(umask)
    assert [mode_of(tmp_path / name) for name in ("a", "a/b", "a/b/c")] == [0o755] * 3


def test_make_dir_leaves_an_existing_one_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(0o750)
    make_dir(tmp_path / "a")
    assert mode_of(tmp_path / "a") == 0o750


def test_make_dir_syncs_the_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()))
    make_dir(tmp_path / "a" / "b")
    assert tmp_path in synced
    assert tmp_path / "a" in synced


def test_make_dir_refuses_a_file_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        make_dir(tmp_path / "a" / "b")
    assert "no directory" in caught.value.hint
    with pytest.raises(StorageError):
        make_dir(tmp_path / "a")


def test_remove_durably_takes_the_file_and_what_a_cut_write_left(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"secret")
    (tmp_path / ".key.tmp").write_bytes(b"secret too")
    remove_durably(tmp_path / "key")
    assert names(tmp_path) == []
    remove_durably(tmp_path / "key", scrub=True)
    remove_durably(tmp_path / "no" / "such" / "directory")


def test_scrubbing_overwrites_the_bytes_before_the_name_goes(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"secret" * 50_000)
    second_name = tmp_path / "second"
    os.link(key, second_name)
    remove_durably(key, scrub=True)
    assert not key.exists()
    assert second_name.read_bytes() == bytes(300_000)


def test_scrubbing_does_not_follow_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(OLD)
    (tmp_path / "key").symlink_to(tmp_path / "other")
    with pytest.raises(StorageError):
        remove_durably(tmp_path / "key", scrub=True)
    assert (tmp_path / "other").read_bytes() == OLD


def test_a_failed_removal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_bytes(b"secret")
    with monkeypatch.context() as patch:
        fail(patch, "fsync", errno.EROFS)
        with pytest.raises(StorageError, match="cannot remove") as caught:
            remove_durably(tmp_path / "key", scrub=True)
    assert "read-only" in caught.value.hint
    assert (tmp_path / "key").exists()


def test_set_aside_keeps_every_broken_file(tmp_path: Path) -> None:
    for n in (1, 2):
        (tmp_path / "state.json").write_bytes(b"%d" % n)
        assert set_aside(tmp_path / "state.json") == tmp_path / f"state.json.broken-{n}"
    assert (tmp_path / "state.json.broken-1").read_bytes() == b"1"
    assert (tmp_path / "state.json.broken-2").read_bytes() == b"2"
    with pytest.raises(StorageError, match="cannot set aside"):
        set_aside(tmp_path / "state.json")
