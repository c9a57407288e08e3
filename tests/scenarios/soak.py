"""The soak: real daemons, traffic, faults at random from a printed seed, and leak figures at the end.

A round is: one fault on a path or a process that the seed picks, its end, and the wait until both sides call every SE
UP; how long that took is kept by fault. What each process holds is looked at whenever all is UP and at rest, from the
first such moment of its life to the last. `judge` says whether it all held; nothing here retries or restarts anything
that a fault itself did not stop.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from lab_rig import RealSe, Site
from rig import until
from rough import Held, OtherClock, RoughCable, few_descriptors, resident_bytes
from traffic import ECHO, Traffic, echo_service, forwarded

BACK_S = 60.0
"""Within which all must be UP after any fault; the back-off of this lab ends at 1 s."""
REST_S = 15.0
"""Without a fault, before what a process holds is looked at for good."""
GROWTH_BYTES = 12 << 20
"""More than this within one life of a process is told as a leak: allocators keep some of what a fault needed."""
BREAKS_ALL_LINKS = frozenset({"reset", "NAT forgets"})


class Life(msgspec.Struct, kw_only=True):
    """What one process held when it first came to rest and when it last did."""

    process: str
    pid: int
    minutes: float
    rss_mb: tuple[float, float]
    descriptors: tuple[int, int]
    threads: tuple[int, int]
    addresses: tuple[int, int]


class FaultFigures(msgspec.Struct, kw_only=True):
    """All rounds of one fault: how often, and seconds until all was UP again."""

    fault: str
    times: int
    up_again_s_median: float
    up_again_s_most: float
    not_healed: int


class Result(msgspec.Struct, kw_only=True):
    """The whole run."""

    seed: int
    minutes: float
    ses: int
    rounds: int
    faults: list[FaultFigures]
    processes: list[Life]
    traffic_mb: float
    corrupt: int
    problems: list[str]


class Soak:
    """One run."""

    def __init__(self, root: Path, *, seed: int, ses: int, echo: int) -> None:
        self.random = random.Random(seed)
        self.clocks = {name: OtherClock(root / name) for name in ("controller", *(f"se-{i + 1}" for i in range(ses)))}
        self.at = Site(root / "s", cable=RoughCable, services={ECHO: f"127.0.0.1:{echo}"})
        assert isinstance(self.at.ssh, RoughCable)
        self.cable = self.at.ssh
        self.cable.random = self.random
        self.at.controller.start(wrap=self.clocks["controller"].wrap)
        self.ses = [self.at.se(f"se-{i + 1}") for i in range(ses)]
        self.traffic: list[Traffic] = []
        self.lives: dict[int, tuple[str, float, Held, int]] = {}
        """Pid to process, since when, what it held then, its memory then."""
        self.results: list[Life] = []
        self.healed: dict[str, list[float]] = {}
        self.problems: list[str] = []

    def begin(self) -> None:
        """All SEs up, each with its traffic."""
        for se in self.ses:
            port = forwarded(se)
            se.start(wrap=self.clocks[se.name].wrap)
            self.traffic.append(Traffic(port))
        self.until_up()

    def until_up(self) -> None:
        """Waits until both sides call all of them UP. Raises `AssertionError` where one doesn't come."""
        for se in self.ses:
            self.at.until_up(se, deadline_s=BACK_S)

    def close(self) -> None:
        """Ends all of it."""
        for traffic in self.traffic:
            traffic.close()
        self.at.close()
        for clock in self.clocks.values():
            clock.close()

    # What processes hold.

    def pids(self) -> dict[int, str]:
        """All daemons."""
        assert self.at.controller.process is not None
        return {self.at.controller.process.pid: "controller", **{se.pid: se.name for se in self.ses}}

    def look(self) -> None:
        """Notes newcomers at their first rest, with the connections of local programs that each link carries."""
        newcomers = {pid: name for pid, name in self.pids().items() if pid not in self.lives}
        if newcomers:
            try:
                for traffic in self.traffic:
                    traffic.flows()
            except AssertionError as error:
                self.problems.append(f"all are UP, but nothing flows: {error}")
                raise
        for pid, name in newcomers.items():
            self.lives[pid] = (name, time.monotonic(), Held.by(pid), resident_bytes(pid))

    def account(self) -> None:
        """Looks at what all living processes hold now."""
        for pid in self.pids():
            if pid not in self.lives:
                continue
            name, since, first, memory = self.lives[pid]
            now, mib = Held.by(pid), 1 << 20
            life = Life(
                process=name, pid=pid, minutes=round((time.monotonic() - since) / 60, 1),
                rss_mb=(round(memory / mib, 1), round(resident_bytes(pid) / mib, 1)),
                descriptors=(first.resources.descriptors, now.resources.descriptors),
                threads=(first.resources.threads, now.resources.threads),
                addresses=(len(first.addresses), len(now.addresses)),
            )  # fmt: skip
            self.results = [entry for entry in self.results if entry.pid != pid] + [life]

    # Faults. Each begins, lasts and ends; what it stopped it starts again.

    def last(self, most_s: float) -> None:
        """How long a fault lasts."""
        time.sleep(self.random.uniform(0.5, most_s))

    def some_se(self) -> RealSe:
        """Whom it hits."""
        return self.random.choice(self.ses)

    def cut(self, *, up: bool, down: bool) -> None:
        self.cable.cut(up=up, down=down)
        self.last(9.0)
        self.cable.mend()

    def unplug(self) -> None:
        self.cable.unplug()
        self.last(6.0)
        self.cable.plug()

    def long_way(self) -> None:
        self.cable.delay_s = self.random.choice((0.035, 0.15, 0.5))
        self.cable.jitter_s = self.random.choice((0.0, self.cable.delay_s / 2))
        self.cable.reset()
        self.last(15.0)
        self.cable.delay_s = self.cable.jitter_s = 0.0

    def stalls(self) -> None:
        self.cable.stall_s, self.cable.stalls_of_a_hundred = self.random.uniform(0.1, 1.0), 20
        self.last(10.0)
        self.cable.stalls_of_a_hundred = 0

    def flap(self) -> None:
        for _ in range(self.random.randrange(2, 6)):
            self.cable.cut()
            self.cable.reset()
            time.sleep(1.0)
            self.cable.mend()
            time.sleep(1.0)

    def freeze_se(self) -> None:
        se = self.some_se()
        se.signal(signal.SIGSTOP)
        self.last(10.0)
        se.signal(signal.SIGCONT)

    def freeze_controller(self) -> None:
        self.at.controller.signal(signal.SIGSTOP)
        self.last(10.0)
        self.at.controller.signal(signal.SIGCONT)

    def sshd_down(self) -> None:
        se = self.some_se()
        se.stop_sshd()
        self.last(4.0)
        se.start_sshd()

    def clock_jumps(self) -> None:
        clock = self.clocks[self.random.choice(list(self.clocks))]
        clock.jump(self.random.choice((-5, -1, 1, 5)) * 3600.0)
        self.last(4.0)
        clock.jump(0.0)

    def no_descriptors(self) -> None:
        pid = self.random.choice(list(self.pids()))
        with few_descriptors(pid, spare=0):
            self.cable.reset()
            self.last(4.0)

    def renew_certificate(self) -> None:
        (self.at.controller.paths.controller_state / "node.pem").unlink()
        self.at.controller.signal(signal.SIGHUP)
        self.last(1.0)

    def power_cut_se(self) -> None:
        se = self.some_se()
        self.cable.forget()
        self.account()
        se.kill()
        se.start(wrap=self.clocks[se.name].wrap)

    def kill_controller(self) -> None:
        self.account()
        self.at.controller.kill()
        self.last(3.0)
        self.at.controller.start(wrap=self.clocks["controller"].wrap, deadline_s=BACK_S)

    def faults(self) -> dict[str, tuple[int, Callable[[], None]]]:
        """All of them, with how often they come."""
        return {
            "black hole both ways": (3, lambda: self.cut(up=True, down=True)),
            "black hole towards the controller": (3, lambda: self.cut(up=True, down=False)),
            "black hole towards the SE": (3, lambda: self.cut(up=False, down=True)),
            "reset": (4, self.cable.reset),
            "refused": (3, self.unplug),
            "NAT forgets": (3, self.cable.forget),
            "long way": (3, self.long_way),
            "losses": (3, self.stalls),
            "flapping": (3, self.flap),
            "SE frozen": (3, self.freeze_se),
            "controller frozen": (3, self.freeze_controller),
            "sshd down": (2, self.sshd_down),
            "clock jumps": (2, self.clock_jumps),
            "no descriptors": (2, self.no_descriptors),
            "certificate renewed": (1, self.renew_certificate),
            "SE's power cut": (1, self.power_cut_se),
            "controller killed": (1, self.kill_controller),
        }

    def round(self) -> str:
        """One fault and its healing. Returns its name."""
        faults = self.faults()
        name = self.random.choices(list(faults), [weight for weight, _ in faults.values()])[0]
        links = {se.name: self.links(se) for se in self.ses}
        ended = time.monotonic()
        try:
            faults[name][1]()
            ended = time.monotonic()
            if name in BREAKS_ALL_LINKS:
                # Both sides still say UP at this moment.
                until(
                    lambda: all(self.links(se) > links[se.name] for se in self.ses), what="new links", deadline_s=BACK_S
                )
            self.until_up()
        except AssertionError as error:
            self.problems.append(f"{name}: not healed: {str(error)[:2000]}")
            self.healed.setdefault(name, []).append(float("inf"))
            raise
        self.healed.setdefault(name, []).append(time.monotonic() - ended)
        return name

    def rest(self) -> None:
        """All are UP, and nothing happens any more."""
        try:
            self.until_up()
        except AssertionError as error:
            self.problems.append(f"at the end: {str(error)[:2000]}")
            raise

    @staticmethod
    def links(se: RealSe) -> int:
        """How often an SE's link came up."""
        return se.logged().count("linked -> up")

    def judge(self) -> list[str]:
        """What didn't hold, one sentence each."""
        found = list(self.problems)
        operator = self.at.controller.operator
        if operator.image_keys()[0].uses != len(self.ses):
            found.append(f"{operator.image_keys()[0].uses} uses of the image key, {len(self.ses)} SEs")
        if not operator.verify_audit().intact:
            found.append("the audit doesn't hold")
        found += [f"alarm of {se.name}: {text}" for se in self.ses for text in operator.se(se.name).alarms]
        if corrupt := sum(traffic.corrupt for traffic in self.traffic):
            found.append(f"{corrupt} chunks came back changed")
        for life in self.results:
            for what, (first, last), room in (
                ("descriptors", life.descriptors, 2),
                # Pools of threads keep those that a fault needed; they have a size.
                ("threads", life.threads, 6),
                ("listening addresses", life.addresses, 0),
            ):
                if last > first + room:
                    found.append(f"{life.process} ({life.pid}) holds {last} {what}, {first} at first")
            if (life.rss_mb[1] - life.rss_mb[0]) * (1 << 20) > GROWTH_BYTES:
                found.append(f"{life.process} ({life.pid}) grew from {life.rss_mb[0]} to {life.rss_mb[1]} MiB")
        return found


def soak(*, minutes: float, seed: int, ses: int, say: Callable[[str], None]) -> Result:
    """Runs for so long and returns what was found."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, echo_service() as echo:
        run = Soak(Path(folder), seed=seed, ses=ses, echo=echo)
        rounds = 0
        try:
            run.begin()
            say(f"{ses} SEs are UP")
            # Pools and caches are filled by one of each of the frequent faults, before anything is compared.
            for fault in (run.cable.reset, run.stalls, run.cable.forget, run.sshd_down):
                fault()
                run.until_up()
            time.sleep(REST_S)
            run.look()
            end = time.monotonic() + minutes * 60
            with contextlib.suppress(AssertionError):  # it is one of the run's problems by then, and the run is over
                while (left_s := end - time.monotonic()) > 0:
                    name = run.round()
                    rounds += 1
                    say(f"{left_s / 60:5.1f} min left: {name}, UP again after {run.healed[name][-1]:.1f} s")
                    run.look()
                time.sleep(REST_S)
                run.rest()
            run.account()
            problems = run.judge()
            traffic = sum(traffic.bytes for traffic in run.traffic), sum(traffic.corrupt for traffic in run.traffic)
        finally:
            run.close()
    return Result(
        seed=seed, minutes=minutes, ses=ses, rounds=rounds, processes=run.results, problems=problems,
        traffic_mb=round(traffic[0] / 1e6, 1), corrupt=traffic[1],
        faults=[
            FaultFigures(
                fault=name, times=len(times), up_again_s_median=round(statistics.median(times), 2),
                up_again_s_most=round(max(times), 2), not_healed=times.count(float("inf")),
            )
            for name, times in sorted(run.healed.items())
        ],
    )  # fmt: skip


def table(result: Result) -> str:
    """The result for people, as Markdown."""
    lines = [
        f"seed {result.seed}, {result.minutes:g} minutes, {result.ses} SEs, {result.rounds} faults, "
        f"{result.traffic_mb} MB echoed, {result.corrupt} chunks changed",
        "",
        "| fault | times | UP again, median | most |",
        "| --- | --- | --- | --- |",
        *(f"| {f.fault} | {f.times} | {f.up_again_s_median} s | {f.up_again_s_most} s |" for f in result.faults),
        "",
        "| process | life | resident | descriptors | threads | listening |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {p.process} | {p.minutes} min | {p.rss_mb[0]} → {p.rss_mb[1]} MiB | "
            f"{p.descriptors[0]} → {p.descriptors[1]} | {p.threads[0]} → {p.threads[1]} | "
            f"{p.addresses[0]} → {p.addresses[1]} |"
            for p in result.processes
        ),
        "",
        *(result.problems or ["all healed, nothing leaked"]),
    ]
    return "\n".join(lines)


def main(args: list[str]) -> int:
    """Runs the soak; 0 where all held."""
    parser = argparse.ArgumentParser(prog="scripts/soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--ses", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args(args)

    def say(text: str) -> None:
        print(f"soak: {text}", file=sys.stderr, flush=True)

    say(f"seed {wanted.seed}, {wanted.minutes:g} minutes; repeat it with --seed {wanted.seed}")
    result = soak(minutes=wanted.minutes, seed=wanted.seed, ses=wanted.ses, say=say)
    print(_as_json(result) if wanted.json else table(result))
    return 1 if result.problems else 0


def _as_json(result: Result) -> str:
    value: Any = msgspec.to_builtins(result)
    return json.dumps(value, indent=2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
