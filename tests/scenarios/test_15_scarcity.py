"""15: a disk that turns read-only or slow under the controller, and processes that run out of descriptors."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_rig import NOTICE_S, SLACK_S, RealSe, Resources, Site, site
from rig import refused, until
from rough import controller_pid, few_descriptors, judged

from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.why import Step

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own needs root")


class RealDisk:
    """An ext4 file system in a file, which can fall read-only as one does whose medium fails."""

    def __init__(self, folder: Path, at: Path) -> None:
        self.image, self.path = folder / "disk.img", at
        at.mkdir(parents=True)
        with self.image.open("wb") as file:
            file.truncate(48 << 20)
        self._run("mkfs.ext4", "-q", str(self.image))
        self.mount()

    @staticmethod
    def _run(*command: str, check: bool = True) -> str:
        return subprocess.run(command, check=check, capture_output=True, text=True, timeout=60).stdout

    def mount(self) -> None:
        """Mounts it for reading and writing."""
        self._run("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.path))

    def fail(self) -> None:
        """The kernel finds an error and allows no more writes, whoever has files open."""
        device = Path(self._run("findmnt", "-no", "SOURCE", str(self.path)).strip()).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("1")
        with pytest.raises(OSError, match="Read-only"):
            (self.path / "probe").write_text("")

    def repair(self) -> None:
        """What an operator does: unmount, check, mount."""
        self.close()
        self._run("fsck.ext4", "-fy", str(self.image), check=False)
        self.mount()

    def close(self) -> None:
        """Unmounts it."""
        self._run("umount", str(self.path))


def has_loop_devices() -> bool:
    return Path("/dev/loop-control").exists() and "ext4" in Path("/proc/filesystems").read_text()


@as_root
@pytest.mark.skipif(not has_loop_devices(), reason="no loop devices, or no ext4")
@pytest.mark.slow
def test_the_controllers_disk_falls_read_only(tmp_path: Path) -> None:
    """Live links live on, whoever comes anew is told that nothing can be stored, and after a repair all is back."""
    disk = RealDisk(tmp_path, tmp_path / "site/controller/var/lib/appliance")
    try:
        with site(tmp_path / "site", settings={"disk_reserve_bytes": 1 << 20}) as at:
            se = at.se("se-1").start()
            at.until_up(se)
            # A controller that is started anew has no history: what came before it is gone.
            with judged(at, se, back_s=20.0, restarts=True, samples_apart_s=120.0):
                entries = at.controller.operator.verify_audit().entries
                disk.fail()
                beats = at.controller.operator.se("se-1").last_heartbeat_at
                until(
                    lambda: at.controller.operator.se("se-1").last_heartbeat_at > beats + 2.0, what="the link lives on",
                    deadline_s=NOTICE_S + SLACK_S,
                )  # fmt: skip
                refused = at.controller.command("se", "revoke", "se-1", "--reason", "x", check=False)
                assert refused.returncode != 0
                assert at.controller.operator.se("se-1").status == "enrolled"
                at.ssh.reset()
                until(lambda: "(TUNNEL-026)" in se.failed(Step.LINK), what="the SE is told", deadline_s=5.0)
                told = until(
                    lambda: "not admitted" in (text := at.controller.operator.why("se-1").verdict) and text,
                    what="the controller names its store",
                )
                assert "store" in told
                at.controller.kill()
                disk.repair()
                at.controller.start()
            assert at.controller.operator.verify_audit().intact
            assert at.controller.operator.verify_audit().entries >= entries
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            disk.close()


@contextlib.contextmanager
def slow_disk(pid: int, *, delay_ms: int) -> Iterator[None]:
    """Each fsync of a process takes so long."""
    tracer = subprocess.Popen(
        [
            "strace", "-f", "-qq", "-o", "/dev/null", "-p", str(pid), "-e", "trace=fsync,fdatasync",
            "-e", f"inject=fsync,fdatasync:delay_enter={delay_ms}ms",
        ],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: traced(pid) == tracer.pid, what="it is traced")
        yield
    finally:
        tracer.terminate()
        tracer.wait(20)


def traced(pid: int) -> int:
    """The pid of who traces a process, 0 where nobody does."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("TracerPid:")[2].split()[0])


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace isn't installed")
@pytest.mark.slow
def test_the_controllers_disk_is_slow(tmp_path: Path) -> None:
    """Half a second for each fsync: what is stored waits, heartbeats don't; enrollments and links come, only later."""
    with site(tmp_path) as at:
        se = at.se("se-1").start()
        at.until_up(se)
        links = se.logged().count("linked -> up")
        with judged(at, se, back_s=20.0), slow_disk(controller_pid(at), delay_ms=500):
            began = time.monotonic()
            at.controller.operator.create_image_key(ImageKeyTermsWish(note="slow"))
            assert time.monotonic() - began >= 0.5, "the disk is slow"
            beats = at.controller.operator.se("se-1").last_heartbeat_at
            until(lambda: at.controller.operator.se("se-1").last_heartbeat_at > beats + 3.0, what="it holds")
            assert se.logged().count("linked -> up") == links, "no heartbeat waits for the disk"
            at.ssh.reset()
            told = until(
                lambda: "store is slow" in (text := at.controller.operator.why("se-1").verdict) and text,
                what="`why` names the disk while the link comes up",
            )
            assert told.startswith(("stopped at link", "waiting for hello"))
            assert any("the store is slow: it took" in text for text in at.controller.operator.status().problems)
            until(lambda: se.logged().count("linked -> up") == links + 1, what="the SE is linked anew")
            at.se("late").start()
            at.until_up(at.ses[-1], deadline_s=30.0)
            at.ses[-1].stop()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, RealSe]]:
    """A controller and one SE that is UP."""
    with site(tmp_path_factory.mktemp("scarce")) as found:
        se = found.se("se-1").start()
        found.until_up(se)
        yield found, se


def test_an_se_out_of_descriptors(place: tuple[Site, RealSe]) -> None:
    """Its link lives; a lost one can't be dialled anew, which it says; with descriptors again it comes back."""
    at, se = place
    with judged(at, se, back_s=15.0), few_descriptors(se.pid, spare=0):
        beats = at.controller.operator.se("se-1").last_heartbeat_at
        until(lambda: at.controller.operator.se("se-1").last_heartbeat_at > beats + 2.0, what="the link lives on")
        at.ssh.reset()
        at.until_state(se, "DOWN LINK_LOST", deadline_s=5.0)
        until(lambda: "Too many open files" in se.failed(Step.LINK), what="it says why", deadline_s=10.0)
        # The lost link's descriptor is enough to begin to dial with, now and then.
        until(lambda: "Too many open files" in se.why().verdict, what="its console tells")
        assert se.process is not None
        assert se.process.poll() is None


def test_a_controller_out_of_descriptors(place: tuple[Site, RealSe]) -> None:
    """Who is linked stays linked; who comes anew waits; nothing spins, and with descriptors again all come in."""
    at, se = place
    pid = controller_pid(at)
    with judged(at, se, back_s=20.0), few_descriptors(pid, spare=0):
        links, cpu = se.logged().count("linked -> up"), cpu_s(pid)
        began = time.monotonic()
        until(lambda: heartbeats(se) and time.monotonic() - began > 3.0, what="the link lives on")
        assert se.logged().count("linked -> up") == links
        assert cpu_s(pid) - cpu < 0.5 * (time.monotonic() - began), "it doesn't spin"
        at.ssh.reset()
        until(lambda: se.state == "DOWN", what="the SE notices")
    assert at.controller.process is not None
    assert at.controller.process.poll() is None


def test_the_last_descriptors_are_kept_for_operators(place: tuple[Site, RealSe]) -> None:
    """Silent strangers take nearly all: further ones are turned away, and who asks is told what keeps SEs out."""
    at, se = place
    held, metrics = judged(at, se, back_s=20.0, room=Resources(0, 1)), at.controller.bound["metrics_port"]
    with held, few_descriptors(controller_pid(at), spare=40), contextlib.ExitStack() as strangers:
        for _ in range(80):
            strangers.enter_context(socket.create_connection(("127.0.0.1", at.controller.enroll_port)))
        until(lambda: refused(metrics)["descriptors"] > 20, what="strangers are turned away")
        at.ssh.cut()
        at.until_state(se, "DOWN HEARTBEAT_MISSED", deadline_s=NOTICE_S + SLACK_S)
        told = at.controller.operator.why("se-1").verdict
        assert told.startswith("stopped at link: nothing heard")
        assert "connections are turned away: nearly all of" in told
        assert any("raise LimitNOFILE" in text for text in at.controller.operator.status().problems)
        at.ssh.mend()


def heartbeats(se: RealSe) -> bool:
    """Whether the SE itself says UP."""
    return se.state == "UP"


def cpu_s(pid: int) -> float:
    """Processor time of a process, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
