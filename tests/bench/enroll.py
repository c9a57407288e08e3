"""How many SEs a controller enrolls a second, and what it costs: TLS, nonce, JWS with two signatures, durable grant.

The clients are real ones in one process on the same machine, so their cost is in the figure. An fsync on a virtual
disk may cost next to nothing, and would then say nothing about a disk: so they are counted, in a run of its own under
strace, whose cost isn't in the rate.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from pathlib import Path

import msgspec
import uvloop

from appliance.lab.fleet import percentile
from appliance.lab.simulated import Beats, SharedSshd, SimulatedSe
from appliance.protocol.seed import Bundle
from appliance.runtime import child
from bench.processes import cpu_s
from bench.report import Report, Row
from bench.stand import Controller, Options, Stand

CLIENTS = 4
COUNTED = 100
"""Enrollments under strace."""
_SYNC = re.compile(rb"\bf(?:data)?sync\(")
_UNLIMITED = {
    "enroll_rate_per_s": 100_000.0, "enroll_burst": 100_000, "source_rate_per_s": 100_000.0, "source_burst": 100_000,
    "image_key_rate_per_s": 100_000.0, "image_key_burst": 100_000,
}  # fmt: skip
"""All clients have one address here; what is measured is the work, not the limits."""


def run(stand: Stand, options: Options) -> Report:
    """Measures a rate, then counts fsyncs."""
    with stand.place() as place:
        with stand.controller(place / "rate", settings=_UNLIMITED) as controller:
            stand.say(f"{options.count} enrollments by {CLIENTS} clients")
            theirs_s, ours_s = cpu_s([controller.pid]), time.process_time()
            took_s, each_s = uvloop.run(enroll_many(controller, options.count))
            theirs_s, ours_s = cpu_s([controller.pid]) - theirs_s, time.process_time() - ours_s
        rows = [
            Row(name="enroll.per_s", value=round(options.count / took_s, 1), unit="1/s", goal=100, better="high"),
            Row(name="enroll.p99_ms", value=round(percentile(each_s, 0.99) * 1000, 2), unit="ms", better="low"),
        ]
        notes = [
            f"{stand.what}; {options.count} enrollments by {CLIENTS} clients in one process on the same cores; "
            f"each is a TLS handshake, a nonce and a grant; median {percentile(each_s, 0.5) * 1000:.1f} ms",
            f"processor time an enrollment: controller {theirs_s / options.count * 1000:.1f} ms, "
            f"client {ours_s / options.count * 1000:.1f} ms",
            "there is no peer that enrolls in this sense",
        ]
        if child.find_program("strace") is None:
            notes.append("enroll.fsyncs is missing: it needs strace (apt-get install strace)")
            return Report(bench="enroll", rows=rows, notes=notes)
        stand.say(f"{COUNTED} enrollments under strace")
        log = place / "strace.log"
        tracer = ["strace", "-f", "-e", "trace=fsync,fdatasync", "-o", str(log)]
        with stand.controller(place / "count", settings=_UNLIMITED, tracer=tracer) as controller:
            before = _syncs(log)
            uvloop.run(enroll_many(controller, COUNTED))
            counted = _syncs(log) - before
        rows.append(Row(name="enroll.fsyncs", value=counted / COUNTED, unit="1/enrollment", better="low"))
        notes.append(f"fsyncs: {counted} fsync and fdatasync calls of the controller in {COUNTED} enrollments")
        return Report(bench="enroll", rows=rows, notes=notes)


def _syncs(log: Path) -> int:
    return len(_SYNC.findall(log.read_bytes()))


async def enroll_many(
    controller: Controller, count: int, *, clients: int = CLIENTS, per_s: float = math.inf
) -> tuple[float, list[float]]:
    """Returns the seconds that all took, and that each took; no more than `per_s` begin in a second."""
    bundle = msgspec.json.decode(controller.bundle(uses=count + clients).read_bytes(), type=Bundle)
    sshd = SharedSshd()
    ses = [SimulatedSe(bundle, name=f"bench-{index}", sshd=sshd, beats=Beats()) for index in range(count + clients)]
    # connections, prepared statements and pages that only the first ones have to wait for
    await asyncio.gather(*(se.enroll() for se in ses[:clients]))
    waiting = iter(enumerate(ses[clients:]))
    each_s: list[float] = []

    async def client() -> None:
        for number, se in waiting:
            await asyncio.sleep(began + number / per_s - time.perf_counter())
            asked = time.perf_counter()
            await se.enroll()
            each_s.append(time.perf_counter() - asked)

    began = time.perf_counter()
    async with asyncio.timeout(300):
        await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, each_s
