"""What benches stand on: the executables that are measured, a place for their state, a controller, a lab of one SE."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from appliance.cli.operator import Operator
from appliance.lab.layout import LOOPBACK, LabStatus, to_toml
from appliance.lab.ports import free_ports
from appliance.paths import Paths
from appliance.pki import ssh_keys
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.runtime import child
from appliance.runtime.health import read_health
from bench.processes import BenchError, until
from bench.report import Progress
from image_builder import output
from image_builder import seed as baking

PROJECT = Path(__file__).resolve().parents[2]
START_S = 60.0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line may change."""

    ses: int = 1000
    seconds: float = 60.0
    settle_s: float = 60.0
    count: int = 1000
    storm: bool = False
    keep: bool = False


class Stand:
    """One run of one or more benches."""

    def __init__(self, *, frozen: bool, say: Progress, keep: bool) -> None:
        self.frozen = frozen
        self.say = say
        self._keep = keep

    @property
    def program(self) -> list[str]:
        """How the measured `appliance` is started."""
        return [str(self.directory_form)] if self.frozen else [sys.executable, "-m", "appliance"]

    @property
    def directory_form(self) -> Path:
        """The frozen executable, directory form."""
        return PROJECT / "dist/appliance/appliance"

    @property
    def one_file(self) -> Path:
        """The frozen executable, one file."""
        return PROJECT / "dist/one-file/appliance"

    @property
    def what(self) -> str:
        """What is measured, for the notes."""
        if self.frozen:
            return "the frozen executable, directory form"
        return f"the sources under Python {sys.version.split()[0]}"

    def command(self, *args: str, timeout_s: float = START_S) -> str:
        """Runs the measured program to its end. Returns its stdout."""
        return child.run([*self.program, *args], timeout_s=timeout_s).stdout

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """A directory for state; removed where all went well, else kept for its logs."""
        # a short path: sockets lie below it, and a unix socket's name has room for 107 bytes
        place = Path(tempfile.mkdtemp(prefix="appliance-bench-"))
        try:
            yield place
        except BaseException:
            self.say(f"what was left is in {place}")
            raise
        if self._keep:
            self.say(f"kept {place}")
        else:
            shutil.rmtree(place)

    @contextlib.contextmanager
    def lab(self, place: Path) -> Iterator[LabStatus]:
        """A controller and one SE, UP."""
        root = place / "lab"
        self.say("bringing up a controller and an SE")
        try:
            self.command("lab", "up", "--ses", "1", "--root", str(root), timeout_s=120)
            told = self.command("lab", "status", "--root", str(root), "--json")
            yield msgspec.json.decode(told.encode(), type=LabStatus)
        finally:
            if root.exists():
                self.command("lab", "down", "--root", str(root))

    @contextlib.contextmanager
    def controller(
        self, root: Path, *, settings: Mapping[str, object], services: Mapping[str, str] | None = None,
        ports: tuple[int, int] | None = None, seen_ssh: int = 0, tracer: Sequence[str] = (),
    ) -> Iterator[Controller]:  # fmt: skip
        """A controller alone.

        Args:
            root: of its state.
            settings: of its section.
            services: what SEs may reach over their links.
            ports: for enrolling and SSH, free ones unless given.
            seen_ssh: the port by which SEs reach the one for SSH, the same unless given.
            tracer: is put before its command.
        """
        enroll, ssh = ports or free_ports(2)
        terms = {
            "enroll_listen": f"{LOOPBACK}:{enroll}",
            "ssh_listen": f"{LOOPBACK}:{ssh}",
            "reverse_port": 0,
            "metrics_listen": f"{LOOPBACK}:0",
            **settings,
        }
        paths = Paths(root)
        paths.settings_file.parent.mkdir(parents=True)
        sections: dict[str, dict[str, object]] = {"controller": terms} | (
            {"controller.services": dict(services)} if services else {}
        )
        paths.settings_file.write_text(to_toml(sections), encoding="utf-8")
        on = ["--root", str(root)]
        seen = ["--ssh-port", str(seen_ssh or ssh)]
        self.command(*on, "controller", "init", "--address", LOOPBACK, *seen, "--date", "now")
        self.command(*on, "mode", "set", "controller")
        with self.running(root, tracer=tracer) as running:
            yield running

    @contextlib.contextmanager
    def running(self, root: Path, *, tracer: Sequence[str] = ()) -> Iterator[Controller]:
        """The controller of a root that was initialised, once more."""
        paths, on = Paths(root), ["--root", str(root)]
        paths.controller_file.unlink(missing_ok=True)
        log = root / "controller.log"
        with child.Daemon([*tracer, *self.program, *on, "run"], log_path=log) as daemon:

            def is_there() -> bool:
                if daemon.poll() is not None:
                    raise BenchError(f"the controller ended; the end of {log}:\n{log.read_text()[-2000:]}")
                return paths.controller_file.exists()

            until(is_there, what="the controller listens", deadline_s=START_S)
            running = Controller(paths)
            try:
                yield running
            finally:
                # by its own pid: a tracer before it doesn't hand signals on
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running.pid, signal.SIGTERM)
                daemon.wait(20)

    @contextlib.contextmanager
    def se(
        self, place: Path, bundle: Path, *, settings: Mapping[str, object], forwards: Mapping[str, str]
    ) -> Iterator[Se]:
        """An SE that enrolled with `bundle` and is UP."""
        root, seed = place / "se", place / "seed"
        now = int(time.time())
        baked = baking.bake(bundle.read_bytes(), baking.Wishes(name="se-1"), baked_at=now, now=now)
        output.place(baked.files, directory=seed, iso=None, iso_content=b"")
        paths = Paths(root)
        paths.settings_file.parent.mkdir(parents=True)
        host_key = root / "etc/ssh/ssh_host_ed25519_key.pub"
        host_key.parent.mkdir(parents=True)
        host_key.write_text(ssh_keys.generate()[1] + "\n")  # nobody logs in here
        sections: dict[str, Mapping[str, object]] = {
            "log": {"level": "debug"}, "se": {"seed": str(seed), **settings}, "se.forwards": forwards,
        }  # fmt: skip
        paths.settings_file.write_text(to_toml(sections), encoding="utf-8")
        on = ["--root", str(root)]
        self.command(*on, "mode", "set", "se")
        log = place / "se.log"
        with child.Daemon([*self.program, *on, "run"], log_path=log) as daemon:

            def is_up() -> bool:
                if daemon.poll() is not None:
                    raise BenchError(f"the SE ended; the end of {log}:\n{log.read_text()[-2000:]}")
                health = read_health(paths.health_file)
                return health is not None and health.state == "UP"

            until(is_up, what="the SE is up", deadline_s=START_S)
            try:
                yield Se(paths, daemon.pid, log)
            finally:
                daemon.terminate(20.0)


class Controller:
    """A running controller."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.bound: dict[str, Any] = json.loads(paths.controller_file.read_text())
        self.pid = int(self.bound["pid"])
        self.operator = Operator(paths)

    def bundle(self, *, uses: int) -> Path:
        """Makes an image key for `uses` enrollments. Returns the path of its bundle."""
        created = self.operator.create_image_key(ImageKeyTermsWish(max_uses=uses, expires_in_s=86400, note="bench"))
        path = self.paths.root / "bench.bundle.json"
        path.touch(mode=0o600)
        path.write_bytes(msgspec.json.encode(created.bundle))
        return path


class Se(NamedTuple):
    """A running SE."""

    paths: Paths
    pid: int
    log: Path


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any], *, timeout_s: float = 30.0) -> Iterator[subprocess.Popen[Any]]:
    """Ends a process that still runs when the context is left: SIGTERM, later SIGKILL."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
