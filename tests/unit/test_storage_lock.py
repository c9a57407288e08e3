"""The root lock: one process at a time, and whose turn it is."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import appliance
from appliance.errors import LockedError, StorageError
from appliance.storage.lock import RootLock, holder

HOLD = """
import sys
from pathlib import Path
from appliance.storage.lock import RootLock
RootLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_child(path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(appliance.__file__).parent.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        try:
            yield child
        finally:
            child.kill()


def test_the_lock_is_taken_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "state" / "lock"
    lock = RootLock(path)
    assert holder(path) is None
    with lock:
        assert holder(path) == os.getpid()
        assert path.stat().st_mode & 0o777 == 0o600
    assert holder(path) is None
    lock.release()  # once more is fine
    with lock:
        assert holder(path) == os.getpid()


def test_a_second_daemon_is_told_which_process_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_by_child(path) as child:
        assert holder(path) == child.pid
        with pytest.raises(LockedError, match=f"process {child.pid}:") as caught:
            RootLock(path).acquire()
        assert caught.value.hint
        assert holder(path) == child.pid


def test_killing_the_holder_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_by_child(path) as child:
        child.kill()
        child.wait(timeout=10)
        assert str(child.pid) in path.read_text()
        assert holder(path) is None
        with RootLock(path):
            assert holder(path) == os.getpid()


def test_two_locks_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with RootLock(tmp_path / "lock"), pytest.raises(LockedError, match=f"process {os.getpid()}:"):
        RootLock(tmp_path / "lock").acquire()


def test_an_onlooker_does_not_keep_a_daemon_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`holder` takes the lock for an instant to learn that a killed holder's pid is stale."""
    path = tmp_path / "lock"
    path.write_text("12345\n")
    onlooker = os.open(path, os.O_RDONLY)
    fcntl.flock(onlooker, fcntl.LOCK_SH)
    refused = threading.Event()
    real = fcntl.flock

    def flock(fd: int, kind: int) -> None:
        try:
            real(fd, kind)
        except BlockingIOError:
            refused.set()
            raise

    monkeypatch.setattr(fcntl, "flock", flock)

    def look_away() -> None:
        refused.wait(timeout=10)
        os.close(onlooker)

    thread = threading.Thread(target=look_away)
    thread.start()
    with RootLock(path):
        assert refused.is_set()
    thread.join()


def test_a_holder_that_could_not_write_its_pid_still_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, content: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "lock"
    monkeypatch.setattr(os, "pwrite", full)
    with RootLock(path):
        with pytest.raises(LockedError, match="held by a process"):
            RootLock(path).acquire()
        assert holder(path) is None


def test_garbage_in_the_file_is_no_pid(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"\xff\xfe garbage, and more of it than a pid takes")
    assert holder(tmp_path / "lock") is None
    with RootLock(tmp_path / "lock"):
        assert holder(tmp_path / "lock") == os.getpid()


def test_a_lock_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="cannot lock"):
        RootLock(tmp_path / "lock").acquire()
    with pytest.raises(StorageError, match="cannot read"):
        holder(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_that_fails_leaves_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = sorted(Path("/proc/self/fd").iterdir())
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StorageError, match="No locks"):
        RootLock(tmp_path / "lock").acquire()
    assert sorted(Path("/proc/self/fd").iterdir()) == before
