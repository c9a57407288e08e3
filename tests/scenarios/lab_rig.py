"""A controller and SEs as real processes, each SE with an OpenSSH server, and cables between them that a test can cut.

`Cable` is a TCP path in user space; the trust document names its ports, so that all that SEs say goes through it.
`Site` is a controller behind two cables, `RealSe` an SE's daemon with its sshd. Each ends only what it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import rig
from rig import RunningController, until

from appliance.errors import NotFoundError
from appliance.lab import sshd
from appliance.lab.layout import Layout, SePart
from appliance.protocol.why import Chain, Step, StepResult
from appliance.runtime.child import Daemon
from appliance.runtime.health import HealthDocument, read_health
from appliance.runtime.mode import Mode
from image_builder import output
from image_builder import seed as baking

INTERVAL_S = 1.0
"""Between heartbeats, in these tests."""
NOTICE_S = INTERVAL_S + 2 * 2.0
"""The watchdog's promise: a dead peer is noticed within the interval and two deadlines."""
SLACK_S = 1.0
"""What two busy cores may add."""
QUICK = {
    "redial_first_s": 0.1,
    "redial_most_s": 1.0,
    "connect_timeout_s": 2.0,
    "telemetry_interval_s": 0.5,
    "retry_most_s": 1.0,
}


class Resources(NamedTuple):
    """What a process holds of the system."""

    descriptors: int
    threads: int


def resources(pid: int) -> Resources:
    """Counts descriptors and threads of a process."""
    threads = Path(f"/proc/{pid}/status").read_text().partition("Threads:")[2].split()[0]
    return Resources(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()), int(threads))


def listening(pid: int) -> set[str]:
    """Local TCP addresses, in the kernel's own notation, on which a process listens."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1])
    return found


class Cable:
    """Carries TCP connections from `host` to 127.0.0.1:`target`. Thread-safe from outside; one loop in a thread inside.

    While a direction is cut its bytes wait, as packets do that will be sent again; ends and resets don't get across
    either, and new connections are taken and hear nothing.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host = host
        self.target = 0
        self._flows: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._waiting: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cable")
        self._thread.start()
        self._up, self._down = asyncio.Event(), asyncio.Event()
        self._server = self._run(self._listen(port))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.mend()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _listen(self, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._accept, self.host, port)

    async def _stop_listening(self) -> None:
        for sock in self._server.sockets:
            self._loop.remove_reader(sock)
        for _ in range(4):  # turns in which what was just accepted is made known; asyncio forgets it at a close
            await asyncio.sleep(0)
        self._server.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._waiting.add(writer)
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(lambda _: (self._tasks.discard(task), writer.transport.abort()))

    async def _set(self, up: bool, down: bool) -> None:
        for event, is_open in ((self._up, up), (self._down, down)):
            event.set() if is_open else event.clear()

    def cut(self, *, up: bool = True, down: bool = True) -> None:
        """Cuts the way from the SE to the controller (`up`), the way back (`down`), or both."""
        self._run(self._set(not up, not down))

    def mend(self) -> None:
        """Both ways are open again, and what waited goes on."""
        self._run(self._set(True, True))

    def reset(self) -> None:
        """Ends every connection with a reset on both sides."""

        async def go() -> None:
            for writer in [*(writer for flow in self._flows for writer in flow), *self._waiting]:
                _reset(writer)

        self._run(go())

    def unplug(self) -> None:
        """Refuses new connections, and resets the ones there are."""

        self._run(self._stop_listening())
        self.reset()

    def plug(self) -> None:
        """Takes connections again."""
        self._server = self._run(self._listen(self.port))

    @property
    def flows(self) -> int:
        """Connections that are carried now."""
        return len(self._flows)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._up.wait()
            await self._down.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            _reset(writer)
            return
        finally:
            self._waiting.discard(writer)
        self._flows.add(flow := (writer, far_writer))
        try:
            await asyncio.gather(self._carry(reader, far_writer, self._up), self._carry(far_reader, writer, self._down))
        finally:
            self._flows.discard(flow)
            far_writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: asyncio.Event) -> None:
        await _carry(reader, writer, way)

    def close(self) -> None:
        """Ends all of it."""

        async def go() -> None:
            await self._stop_listening()
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(others)
            await asyncio.sleep(0)  # lets transports give their sockets back

        self._run(go())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: asyncio.Event) -> None:
    try:
        while content := await reader.read(65536):
            await way.wait()
            writer.write(content)
            await writer.drain()
        await way.wait()
        writer.write_eof()
    except OSError:
        await way.wait()
        _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class RealSe:
    """An SE: its root with a baked seed, its sshd, and its daemon as a process."""

    def __init__(
        self, layout: Layout, name: str, bundle: Path, *, settings: dict[str, Any] | None = None,
        clock: dict[str, Any] | None = None, prefix: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.name = name
        self.paths = layout.se(name)
        self.log = layout.log(name)
        self.prefix = list(prefix)
        """Comes before the daemon's and the SSH server's command, `ip netns exec` for example."""
        self.process: subprocess.Popen[bytes] | None = None
        self._layout = layout
        self._part = SePart(name=name, sshd_port=rig.free_ports(1)[0])
        self._sshd: Daemon | None = None
        self.paths.root.mkdir(parents=True, exist_ok=True)
        self.user = pwd.getpwuid(os.geteuid()).pw_name
        sshd.prepare(layout, self._part, user=self.user)
        self.start_sshd()
        self.bake(bundle)
        self.paths.settings_file.parent.mkdir(parents=True, exist_ok=True)
        self.write_settings(settings or {}, clock or {})
        rig.set_mode(self.paths, Mode.SE)

    def bake(self, bundle: Path) -> None:
        """Bakes a seed from `bundle` beside the root; an older one is replaced."""
        seed = self._layout.seed(self.name)
        shutil.rmtree(seed, ignore_errors=True)
        now = int(time.time())
        baked = baking.bake(bundle.read_bytes(), baking.Wishes(name=self.name), baked_at=now, now=now)
        output.place(baked.files, directory=seed, iso=None, iso_content=b"")

    def write_settings(self, own: dict[str, Any], clock: dict[str, Any]) -> None:
        """Writes the settings file."""
        terms = {
            "seed": str(self._layout.seed(self.name)), "sshd_host": "127.0.0.1", "sshd_port": self._part.sshd_port,
            **QUICK, **own,
        }  # fmt: skip
        lines = ["[se]", *(f"{key} = {json.dumps(value)}" for key, value in terms.items())]
        lines += ["[clock]", *(f"{key} = {json.dumps(value)}" for key, value in clock.items())]
        self.paths.settings_file.write_text("\n".join(lines) + "\n")

    def start_sshd(self) -> None:
        """Starts its SSH server and waits for its banner."""
        file = self._layout.sshd(self.name) / "sshd_config"
        command = [*self.prefix, sshd.find(), "-D", "-e", "-f", str(file)]
        self._sshd = Daemon(command, log_path=file.with_name("sshd.log"))
        if not self.prefix:
            until(lambda: sshd.is_answering(self._part.sshd_port), what="sshd answers")

    def stop_sshd(self) -> None:
        """Ends its SSH server."""
        if self._sshd is not None:
            self._sshd.terminate(5.0)
            self._sshd = None

    def command(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs `appliance` on this SE's root, whatever its exit code."""
        line = [sys.executable, "-m", "appliance", "--root", str(self.paths.root), *args]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)

    def start(self, *python: str, wrap: Sequence[str] = ()) -> RealSe:
        """Starts the daemon; `python` are the interpreter's arguments in place of `-m appliance`."""
        line = [*wrap, *self.prefix, sys.executable, *(python or ("-m", "appliance"))]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*line, "--root", str(self.paths.root), "run"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    @property
    def pid(self) -> int:
        """Of the daemon."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """Sends a signal to the daemon."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends the daemon without warning, as a power cut does."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)
        self.process = None

    def stop(self) -> None:
        """Asks the daemon to stop; it must end properly."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(20)
        self.process = None
        assert code == 0, self.log.read_text()

    def wait(self) -> int:
        """Waits for the daemon's own end and returns its exit code."""
        assert self.process is not None
        code = self.process.wait(20)
        self.process = None
        return code

    def end(self) -> None:
        """Makes sure that nothing stays."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.kill()
        self.stop_sshd()

    def health(self) -> HealthDocument | None:
        """What the running daemon last wrote about itself."""
        found = read_health(self.paths.health_file)
        return found if found is not None and self.process is not None and found.pid == self.process.pid else None

    @property
    def state(self) -> str:
        """Its own state line."""
        health = self.health()
        return health.state if health else ""

    def why(self) -> Chain:
        """Its half of the causal chain, as its console shows it."""
        return msgspec.json.decode(self.command("why", "--json").stdout.encode(), type=Chain)

    def failed(self, step: Step) -> str:
        """The text and code of a failed step, "" where it didn't fail."""
        health = self.health()
        link = next((link for link in health.steps if link.step is step), None) if health else None
        return f"{link.text} ({link.code})" if link is not None and link.result is StepResult.FAILED else ""

    def stored(self, file: str) -> dict[str, Any]:
        """The value of one of its documents."""
        value: dict[str, Any] = json.loads((self.paths.se_state / file).read_text())["value"]
        return value

    def logged(self) -> str:
        """Its log."""
        return self.log.read_text() if self.log.exists() else ""


class Site:
    """A controller behind two cables, and SEs."""

    def __init__(
        self, root: Path, *, settings: dict[str, Any] | None = None, clock: dict[str, Any] | None = None,
        address: str = "", date: str = "now", name: str = "", cable: type[Cable] = Cable, **more: Any,
    ) -> None:  # fmt: skip
        """With an `address` the controller listens there, and SEs reach it without a cable of ours, by `name` where
        there is one. `cable` is what the link goes through; `more` is the controller's."""
        self.layout = Layout(root)
        self.enroll, self.ssh = Cable(), cable()
        self.ses: list[RealSe] = []
        user = pwd.getpwuid(os.geteuid()).pw_name
        terms = {"heartbeat_interval_s": INTERVAL_S, "reverse_users": [user], **(settings or {})}
        at = {"address": address, "told": name}
        where: dict[str, Any] = at if address else {"seen": (self.enroll.port, self.ssh.port)}
        self.controller = RunningController(
            self.layout.controller.root, settings=terms, clock=clock, date=date, **where, **more
        )
        self.enroll.target, self.ssh.target = self.controller.enroll_port, self.controller.ssh_port

    @property
    def bundle(self) -> Path:
        """The first image key's bundle."""
        return next((self.controller.paths.controller_state / "bundles").glob("*.json"))

    def se(self, name: str, *, bundle: Path | None = None, **more: Any) -> RealSe:
        """Makes one more SE, from the first image key's bundle unless another is given; it isn't started."""
        self.ses.append(RealSe(self.layout, name, bundle or self.bundle, **more))
        return self.ses[-1]

    def is_up(self, se: RealSe) -> bool:
        """Whether both sides call it UP, without a reservation, and its log, which comes a moment later, too."""
        moves = re.findall(r"link to node \d+: \w+ -> (\w+)", se.logged())
        return se.state == "UP" and self.controller.state(se.name) == "UP OK" and moves[-1:] == ["up"]

    def until_up(self, se: RealSe, *, deadline_s: float = 20.0) -> None:
        """Waits until both sides call it UP."""

        def seen() -> bool:
            assert se.process is None or se.process.poll() is None, se.logged()
            with contextlib.suppress(Exception):  # not enrolled yet, or no controller
                return self.is_up(se)
            return False

        try:
            until(seen, what=f"{se.name} is UP", deadline_s=deadline_s)
        except AssertionError as error:
            told = self.controller.command("why", se.name, check=False)
            tails = (text[-2000:] for text in (told.stdout + told.stderr, self.controller.log.read_text(), se.logged()))
            raise AssertionError("\n".join((str(error), f"its own state: {se.state}", *tails))) from None

    def until_state(self, se: RealSe, state: str, *, deadline_s: float = 20.0) -> None:
        """Waits until the controller tells `state` ("DOWN LINK_LOST" for example)."""

        def is_told() -> bool:
            with contextlib.suppress(NotFoundError):  # it hasn't enrolled yet
                return self.controller.state(se.name) == state
            return False

        until(is_told, what=f"{se.name} is {state}", deadline_s=deadline_s)

    def uses(self) -> int:
        """How often the first image key was used."""
        return self.controller.operator.image_keys()[0].uses

    def events(self, kind: str) -> list[str]:
        """Texts of all events of a kind."""
        return [event.text for event in self.controller.operator.events() if event.kind == kind]

    def told_of_losses(self, se: RealSe) -> str:
        """What `why` says beside the link that is up: how often others were lost lately, and how the last one was."""
        return next(link.text for link in self.controller.operator.why(se.name).steps if link.step is Step.LINK)

    def samples_without_gap(self, se: RealSe, since: float, *, most_s: float) -> bool:
        """Whether the controller has this SE's samples from `since` until now, none further apart than `most_s`."""
        times = [sample.time for sample in self.controller.operator.telemetry(se.name, since=since)]
        marks = [since, *times, time.time()]
        return bool(times) and all(later - earlier <= most_s for earlier, later in itertools.pairwise(marks))

    def close(self) -> None:
        """Ends everything."""
        for se in self.ses:
            se.end()
        self.controller.end()
        self.enroll.close()
        self.ssh.close()


@contextlib.contextmanager
def site(root: Path, **more: Any) -> Iterator[Site]:
    """A site whose controller runs."""
    found = Site(root, **more)
    try:
        found.controller.start()
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def no_leak(pid: Callable[[], int]) -> Iterator[None]:
    """The process holds no more descriptors, threads and listening addresses afterwards than before, once at rest."""
    before, addresses = resources(pid()), listening(pid())
    yield
    end = time.monotonic() + 10.0
    while any(after > earlier for after, earlier in zip(resources(pid()), before, strict=True)) or (
        listening(pid()) - addresses
    ):
        held = f"{resources(pid())}, {listening(pid())}"
        assert time.monotonic() < end, f"process {pid()} keeps {held}, it had {before}, {addresses}"
        time.sleep(0.05)
