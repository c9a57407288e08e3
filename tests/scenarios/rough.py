"""What makes a path, a clock or a process rough, and the judgement that all faults go through.

`RoughCable` delays, jitters, stalls and forgets; `Skewed` lets a process see another wall clock, `older` an older
protocol; `judged` demands that a fault leaves nothing behind: no descriptor, thread or listening address more than
before, nothing acknowledged lost, nothing enrolled twice, no alarm, an SE that both sides call UP in time, and a
controller that tells afterwards how the link was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import random
import re
import resource
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lab_rig import Cable, RealSe, Resources, Site, listening, resources
from rig import until
from traffic import Traffic

NOTHING = Resources(0, 0)
REST_S = 20.0
"""How long processes may take to come to rest after a fault."""


class RoughCable(Cable):
    """A cable whose one-way delay, jitter and stalls a test sets, and that can forget what it carries."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        """One way."""
        self.jitter_s = 0.0
        """Up to so much more, different for each piece; order is kept, as TCP keeps it."""
        self.stall_s = 0.0
        """A stall of this length now and then: what a loss looks like above TCP."""
        self.stalls_of_a_hundred = 0
        self.random = random.Random(1)
        self._forgotten: set[asyncio.Event] = set()
        self._carried: set[asyncio.Event] = set()
        super().__init__()

    def forget(self) -> None:
        """Drops all connections and tells neither end: what a NAT does that lost its table, or a power cut."""

        async def go() -> None:
            for event in self._carried:
                event.set()
            self._forgotten |= self._carried
            self._carried.clear()
            self._flows.clear()

        self._run(go())

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: asyncio.Event) -> None:
        gone = asyncio.Event()
        self._carried.add(gone)
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
        loop = asyncio.get_running_loop()

        async def take() -> None:
            while content := await reader.read(16384):
                await pieces.put((loop.time() + self._latency_s(), content))
            await pieces.put((loop.time() + self._latency_s(), b""))

        taking = loop.create_task(take())
        hole = loop.create_task(gone.wait())
        giving = loop.create_task(self._give(pieces, writer, way))
        try:
            await asyncio.wait([hole, giving, taking], return_when=asyncio.FIRST_COMPLETED)
            if gone.is_set():
                giving.cancel()
                taking.cancel()
                with contextlib.suppress(asyncio.CancelledError):  # by the cable's end, nobody else knows this flow
                    await asyncio.Event().wait()  # both ends stay open and hear nothing more
                return
            await taking
            await giving
        except OSError:
            await way.wait()
            writer.transport.abort()
        finally:
            for task in (taking, hole, giving):
                task.cancel()
            await asyncio.gather(taking, hole, giving, return_exceptions=True)
            self._carried.discard(gone)

    async def _give(
        self, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: asyncio.Event
    ) -> None:
        while True:
            due, content = await pieces.get()
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            await way.wait()
            if not content:
                writer.write_eof()
                return
            writer.write(content)
            await writer.drain()

    def _latency_s(self) -> float:
        stall = self.stall_s if self.random.randrange(100) < self.stalls_of_a_hundred else 0.0
        return self.delay_s + self.random.uniform(0.0, self.jitter_s) + stall


# --- what a process holds ----------------------------------------------------------------------------------------


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


class Held(NamedTuple):
    """What one process holds."""

    resources: Resources
    addresses: set[str]

    @classmethod
    def by(cls, pid: int) -> Held:
        """Looks at a process."""
        return cls(resources(pid), listening(pid))

    def is_within(self, before: Held) -> bool:
        """Whether it is no more than `before`."""
        return (
            all(now <= then for now, then in zip(self.resources, before.resources, strict=True))
            and self.addresses <= before.addresses
        )


def controller_pid(at: Site) -> int:
    """Of the controller's daemon."""
    assert at.controller.process is not None
    return at.controller.process.pid


@contextlib.contextmanager
def judged(
    at: Site,
    se: RealSe,
    *,
    back_s: float,
    samples_apart_s: float = 3.0,
    alarms: int = 0,
    restarts: bool = False,
    room: Resources = NOTHING,
    lost: str = "",
    traffic: Traffic | None = None,
) -> Iterator[float]:
    """A fault happens and ends inside; afterwards all must be as before. Yields the wall time at the beginning.

    Args:
        at: the site.
        se: whose link suffers.
        back_s: within which both sides must call it UP.
        samples_apart_s: most that two delivered samples may be apart: nothing measured was lost.
        alarms: how many are right.
        restarts: a process was started anew meanwhile, so that its descriptors may differ by a few.
        room: what else is no leak: a pool of threads that has grown, an SE more.
        lost: a pattern of what `why` must tell of the last link, now that another one is up.
        traffic: must get across before and afterwards, unchanged.
    """
    if traffic is not None:
        traffic.flows()
    since, others, key = time.time(), at.uses() - len(at.ses), se.stored("identity.json")["key"]
    before = {"controller": Held.by(controller_pid(at)), se.name: Held.by(se.pid)}
    yield since
    at.until_up(se, deadline_s=back_s)
    if traffic is not None:
        traffic.flows()
    until(
        lambda: at.samples_without_gap(se, since, most_s=samples_apart_s),
        what=f"all telemetry arrives, none further apart than {samples_apart_s} s", deadline_s=REST_S,
    )  # fmt: skip
    room = Resources(4, 2) if restarts else room
    _at_rest("controller", lambda: controller_pid(at), before["controller"], room, same=not restarts)
    _at_rest(se.name, lambda: se.pid, before[se.name], room, same=not restarts)
    assert at.uses() - len(at.ses) == others, "nobody enrolled twice"
    assert se.stored("identity.json")["key"] == key
    assert len(at.controller.operator.se(se.name).alarms) == alarms
    # Each fault costs a link, and many within minutes are told, rightly.
    verdict = at.controller.operator.why(se.name).verdict
    assert verdict == "all steps happened" or verdict.endswith("(FLAPPING)")
    assert se.why().verdict == "all steps happened"
    if lost:
        told = at.told_of_losses(se)
        assert re.search(f"its link was lost .*: (?:{lost})", told), told


def _at_rest(name: str, pid: Callable[[], int], before: Held, room: Resources, *, same: bool) -> None:
    """Waits until a process holds no more than `before` and `room`; the `same` process listens where it did."""
    most = Resources(*(had + more for had, more in zip(before.resources, room, strict=True)))

    def is_at_rest() -> bool:
        now = Held.by(pid())
        addresses = now.addresses if same else before.addresses
        return now._replace(addresses=addresses).is_within(before._replace(resources=most)) and (
            len(now.addresses) <= len(before.addresses)
        )

    try:
        until(is_at_rest, what="rest", deadline_s=REST_S)
    except AssertionError:
        raise AssertionError(f"{name} keeps {Held.by(pid())}, it had {before}") from None


@contextlib.contextmanager
def few_descriptors(pid: int, *, spare: int) -> Iterator[None]:
    """Lets a process open only `spare` more."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1 + spare, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


# --- another clock, another version -------------------------------------------------------------------------------

_SITE = """
import os
if "TEST_CLOCK" in os.environ:
    import mmap, struct, time
    with open(os.environ["TEST_CLOCK"], "r+b") as _file:
        _map = mmap.mmap(_file.fileno(), 8)
    _real = time.time
    time.time = lambda: _real() + struct.unpack("d", _map[:8])[0]
if "TEST_PROTOCOL" in os.environ:
    import appliance.protocol.tunnel as _said
    _said.PROTOCOL_NUMBER = int(os.environ["TEST_PROTOCOL"])
    _said.OLDEST_PROTOCOL_NUMBER = max(1, _said.PROTOCOL_NUMBER - 1)
"""


def environment(folder: Path, **names: str) -> list[str]:
    """Returns what to put before a daemon's command: with `TEST_CLOCK` or `TEST_PROTOCOL` in its environment.

    It survives that the daemon executes itself anew, as an SE's does after enrolling.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITE)
    project = Path(__file__).resolve().parents[2]
    return ["env", f"PYTHONPATH={folder}:{project}", *(f"{name}={value}" for name, value in names.items())]


class OtherClock:
    """A wall clock that a test moves under a running process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "offset"
        file.write_bytes(struct.pack("d", 0.0))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), 8)
        self.wrap = environment(folder, TEST_CLOCK=str(file))

    def jump(self, offset_s: float) -> None:
        """Sets it to the right time plus `offset_s`."""
        self._map[:8] = struct.pack("d", offset_s)

    def close(self) -> None:
        """Gives the file back."""
        self._map.close()
