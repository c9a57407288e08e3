"""What a link that breaks leaves behind: one SE whose link is reset again and again, and its controller's memory.

Each time a whole link: log-in, hello, confirmation, self-test, check of the reverse path, a heartbeat, then a reset.
Some of what grows is meant: the controller keeps the last ways in of each source, and the last ten thousand events.
"""

from __future__ import annotations

import contextlib

import asyncssh
import msgspec
import uvloop
from rig import link_in_turn

from appliance.lab.simulated import Beats, SharedSshd, SimulatedSe
from appliance.protocol.seed import Bundle
from bench.processes import resident_bytes
from bench.report import Report, Row
from bench.stand import Controller, Options, Stand

WARM = 25
ENOUGH = 8000
MIB = 1 << 20


def run(stand: Stand, options: Options) -> Report:
    """`--count` resets, and what the last quarter of them added."""
    settings = {"heartbeat_interval_s": 1.0}
    with stand.place() as place, stand.controller(place / "resets", settings=settings) as controller:
        stand.say(f"{options.count} links, one after the other")
        grown = uvloop.run(_reset(stand, controller, options.count))
    counts = sorted(grown)
    late = counts[len(counts) * 3 // 4]
    first, last = grown[counts[0]], grown[counts[-1]]
    late_kib = (last - grown[late]) / 1024 / (counts[-1] - late)
    # Fewer don't fill what is kept on purpose.
    goal = 0.5 if options.count >= ENOUGH else None
    told = ", ".join(f"{count}: {grown[count] / MIB:.1f}" for count in counts)
    return Report(
        bench="resets",
        rows=[
            Row(name="resets.grown_mib", value=round((last - first) / MIB, 1), unit="MiB", better="low"),
            Row(name="resets.last_quarter_kib", value=round(late_kib, 2), unit="KiB a link", goal=goal, better="low"),
        ],
        notes=[f"{stand.what}; resident memory in MiB after so many links: {told}"],
    )


async def _reset(stand: Stand, controller: Controller, count: int) -> dict[int, int]:
    """Returns the controller's memory after how many links."""
    bundle = msgspec.json.decode(controller.bundle(uses=1).read_bytes(), type=Bundle)
    se = SimulatedSe(bundle, name="bench-1", sshd=SharedSshd(), beats=Beats())
    await se.enroll()
    found = {}
    for turn in range(1, count + 1):
        await link_in_turn(se)
        await se.beat()
        conn = se.conn
        se.close()
        if conn is not None:
            with contextlib.suppress(OSError, asyncssh.Error):
                await conn.wait_closed()
        if turn == WARM or turn % max(1, count // 16) == 0:
            found[turn] = resident_bytes([controller.pid])
            stand.say(f"{turn} links: {found[turn] / MIB:.1f} MiB")
    return found
