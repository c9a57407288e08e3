"""How soon a frozen peer is noticed, and how soon all works again after it goes on; OpenSSH goes through the same.

Twice, with SIGSTOP: first the SE's side is frozen, then the controller's, the peer's same side at the same moment. The
freeze lasts until both have noticed. "Again" is when a connection to the reverse address shows the banner of the SSH
server behind it, over a new link; an SE must also call itself up, and be called so by the controller.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from appliance.cli.operator import Operator
from appliance.errors import ApplianceError
from appliance.lab.layout import LabStatus
from appliance.paths import Paths
from appliance.protocol.fleet import State
from appliance.runtime.health import read_health
from bench import openssh
from bench.processes import children, is_alive
from bench.report import Report, Row
from bench.stand import Options, Stand

NOTICE_DEADLINE_S = 90.0
AGAIN_DEADLINE_S = 240.0
_LIVE = {State.UP, State.DEGRADED}


def run(stand: Stand, options: Options) -> Report:
    """Freezes both sides in turn."""
    notes = [f"{stand.what}; SIGSTOP to one side until both products noticed, then SIGCONT"]
    noticed: dict[str, list[float]] = {"appliance": [], "OpenSSH": []}
    again: dict[str, list[float]] = {"appliance": [], "OpenSSH": []}
    with stand.place() as place, stand.lab(place) as lab, contextlib.ExitStack() as stack:
        ours = _Ours(lab)
        theirs: _Theirs | None = None
        if missing := openssh.missing():
            notes.append(f"no OpenSSH to compare with: apt-get install {' '.join(missing)}")
        else:
            server = stack.enter_context(openssh.server(place))
            theirs = _Theirs(server, stack.enter_context(openssh.reverse(server, lab.ses[0].sshd_port)))
        for side in ("SE", "controller"):
            parties: dict[str, _Party] = {"appliance": ours} | ({"OpenSSH": theirs} if theirs else {})
            first, second = _freeze(stand, parties, side)
            for name in parties:
                noticed[name].append(first[name])
                again[name].append(second[name])
                notes.append(
                    f"{name}, {side} frozen: the other side noticed after {first[name]:.1f} s, "
                    f"up again {second[name]:.1f} s after the freeze ended"
                )
    # What notices is OpenSSH's own keep-alive on either side; what comes back is autossh, which starts ssh anew.
    alive = f"OpenSSH ServerAlive and ClientAlive {openssh.ALIVE_S} s x {openssh.ALIVE_COUNT}"

    def row(name: str, found: Mapping[str, list[float]], goal: float, peer: str) -> Row:
        return Row(
            name=name, value=round(max(found["appliance"]), 2), unit="s", goal=goal, better="low",
            peer=peer if theirs else None,
            peer_value=round(max(found["OpenSSH"]), 2) if theirs else None,
        )  # fmt: skip

    return Report(
        bench="recovery",
        rows=[
            row("recovery.frozen_notice_s", noticed, 10, alive),
            row("recovery.up_again_s", again, 2, f"autossh over {alive}"),
        ],
        notes=notes,
    )


class _Party:
    """One of the two products, with a machine at each end of a link."""

    def processes(self, side: str) -> list[int]:
        """What runs on a side: "SE" or "controller"."""
        raise NotImplementedError

    def watch(self, frozen: str) -> Callable[[], bool]:
        """Returns what tells whether the side that isn't frozen noticed."""
        raise NotImplementedError

    def is_up(self) -> bool:
        """Whether a connection to the reverse address gets through."""
        raise NotImplementedError


class _Ours(_Party):
    def __init__(self, lab: LabStatus) -> None:
        self._lab = lab
        self._se = lab.ses[0]
        self._operator = Operator(Paths(Path(lab.controller.operator_socket).parents[2]), deadline_s=2.0)

    def processes(self, side: str) -> list[int]:
        pid = self._se.pid if side == "SE" else self._lab.controller.pid
        return [pid, *children(pid)]

    def _says_controller(self) -> bool:
        try:
            return self._operator.se(str(self._se.number)).summary.state in _LIVE
        except ApplianceError:
            return False

    def _says_se(self) -> bool:
        health = read_health(Path(self._se.health))
        return health is not None and health.state == "UP"

    def watch(self, frozen: str) -> Callable[[], bool]:
        return lambda: not (self._says_controller() if frozen == "SE" else self._says_se())

    def is_up(self) -> bool:
        return (
            self._says_se()
            and self._says_controller()
            and openssh.shows_banner(self._se.address, self._lab.controller.reverse_port)
        )


class _Theirs(_Party):
    def __init__(self, server: openssh.Server, link: openssh.Reverse) -> None:
        self._server = server
        self._link = link

    def processes(self, side: str) -> list[int]:
        if side == "SE":
            return [self._link.autossh, *self._link.ssh]
        return [self._server.pid, *self._server.sessions]

    def watch(self, frozen: str) -> Callable[[], bool]:
        there = self._server.sessions if frozen == "SE" else self._link.ssh
        return lambda: not all(map(is_alive, there))

    def is_up(self) -> bool:
        return self._link.answers()


def _freeze(stand: Stand, parties: Mapping[str, _Party], side: str) -> tuple[dict[str, float], dict[str, float]]:
    """Freezes one side of all. Returns the seconds to the notice and, from the thaw, to being up again."""
    watches = {name: party.watch(side) for name, party in parties.items()}
    stand.say(f"freezing each {side}")
    with _stopped([pid for party in parties.values() for pid in party.processes(side)]):
        noticed = _times(stand, "noticed", watches, NOTICE_DEADLINE_S)
    ups = {name: party.is_up for name, party in parties.items()}
    return noticed, _times(stand, "up again", ups, AGAIN_DEADLINE_S)


def _times(
    stand: Stand, what: str, conditions: Mapping[str, Callable[[], bool]], deadline_s: float
) -> dict[str, float]:
    """Returns for each name after how many seconds its condition became true; the deadline where it didn't."""
    began = time.monotonic()
    found: dict[str, float] = {}
    while len(found) < len(conditions) and time.monotonic() - began < deadline_s:
        for name, condition in conditions.items():
            if name not in found and condition():
                found[name] = time.monotonic() - began
                stand.say(f"{name} {what} after {found[name]:.1f} s")
        time.sleep(0.02)
    for name in conditions:
        if name not in found:
            stand.say(f"{name} not {what} within {deadline_s:.0f} s")
    return dict.fromkeys(conditions, deadline_s) | found


@contextlib.contextmanager
def _stopped(pids: list[int]) -> Iterator[None]:
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
