"""The SE's daemon: puts its parts together, and says in which order they live.

    no grant yet    first boot (`se.first_boot`), then the process replaces itself: TLS, ISO reading and what else only
                    enrolling needs is gone from its memory
    a grant         links, forward side, telemetry; and a refresh when no link has been there for long

Both hold the root lock and stop within three seconds of SIGTERM. Only here is decided what is critical: without the
links the daemon ends and is started anew; telemetry and the forward side are started again by the supervisor.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import msgspec

from appliance.errors import ApplianceError
from appliance.paths import Paths
from appliance.protocol import why
from appliance.protocol.tunnel import ImageKeyCopies, LinkState
from appliance.protocol.why import Step, StepResult
from appliance.runtime import child, host, log, systemd
from appliance.runtime.clock import Clock, SystemClock
from appliance.runtime.health import BEAT_S, Health, read_health
from appliance.runtime.stop import StopToken, stop_on_signals
from appliance.runtime.supervisor import Supervisor
from appliance.se import identity
from appliance.se.believed import Beliefs
from appliance.se.given import GivenFile
from appliance.se.identity import SeState
from appliance.settings import Settings
from appliance.storage.atomic import make_dir
from appliance.storage.lock import RootLock

STOP_S = 2.5
"""How long services may take to end."""

START_OVER_S = 300.0
"""How long this process may take to replace itself before the watchdog takes it for hung."""

_log = log.bind("daemon")
_ENROLL_STEPS = (Step.BOOT, Step.TLS, Step.NONCE, Step.GRANT, Step.STORED)


def run(paths: Paths, settings: Settings) -> int:
    """Runs until told to stop. Returns the exit code.

    Raises:
        LockedError: another daemon works on this root.
        ApplianceError: something critical failed; the service manager starts anew.
    """
    stop = StopToken()
    synchronised = {"auto": None, "yes": True, "no": False}[settings.clock.synchronised]
    clock = SystemClock(settings.clock.offset_s, synchronised)
    with stop_on_signals(stop), RootLock(paths.lock):
        make_dir(paths.run, mode=0o755)
        state = SeState(paths)
        state.load()
        given = GivenFile(paths.se_state)
        if (told := given.read()).anew:
            state.give_up()
            given.write(msgspec.structs.replace(told, anew=False))
        beliefs = Beliefs(state.trust_document, authorized_keys=state.authorized_keys_path)
        beliefs.load(state.grant.trust if state.grant else None)
        earlier = read_health(paths.health_file)
        health = Health(paths.health_file, "se", clock)
        systemd.notify("READY=1" + systemd.watchdog_limit())
        if state.grant is None:
            _enroll(paths, settings, stop, clock=clock, state=state, beliefs=beliefs, health=health)
        else:
            _take_up(health, state, earlier.steps if earlier is not None and earlier.side == "se" else [])
            _link(paths, settings, stop, clock=clock, state=state, beliefs=beliefs, health=health)
        if stop.stopped:  # else systemd would wait for an end that doesn't come, and kill what starts over
            systemd.notify("STOPPING=1")
    if not stop.stopped:
        _start_over()
    _log.info("stopped: %s", stop.reason)
    return 0


def _supervisor(stop: StopToken, clock: Clock, health: Health) -> Supervisor:
    def tick() -> None:
        health.beat()
        systemd.notify("WATCHDOG=1")

    tick_s = min(BEAT_S, systemd.watchdog_interval_s() or BEAT_S)
    return Supervisor(stop, clock=clock, tick=tick, tick_s=tick_s, join_timeout_s=STOP_S)


def _start_over() -> None:
    """Replaces this process by itself, with the same arguments. Doesn't return."""
    command = [*child.self_command(), *sys.argv[1:]]
    environment = dict(os.environ)
    if getattr(sys, "frozen", False):
        # Keeps systemd's variables, which clean_environment takes away: the process stays the one that systemd knows.
        environment = {**child.clean_environment(), "PYINSTALLER_RESET_ENVIRONMENT": "1"} | {
            name: value for name, value in os.environ.items() if name.startswith(("NOTIFY_SOCKET", "WATCHDOG_"))
        }
    _log.info("the daemon starts over: only enrolling needs what enrolling loads")
    systemd.notify("STATUS=starting over" + systemd.watchdog_limit(START_OVER_S))
    log.drain()
    os.execve(command[0], command, environment)  # noqa: S606 - ourselves, with our own arguments


def _enroll(
    paths: Paths,
    settings: Settings,
    stop: StopToken,
    *,
    clock: Clock,
    state: SeState,
    beliefs: Beliefs,
    health: Health,
) -> None:
    from appliance.se.first_boot import Enrollment

    def tell_line(text: str) -> None:
        health.line("se", "ENROLLING", text, [])
        systemd.notify(f"STATUS={text}")

    enrollment = Enrollment(
        paths, settings.se, state=state, beliefs=beliefs, clock=clock, tell=health.step, tell_line=tell_line
    )
    tell_line("first boot" + "".join(f"; {text}" for text in state.set_aside))
    supervisor = _supervisor(stop, clock, health)
    supervisor.add("enroll", enrollment.first_boot, critical=True)
    supervisor.run()


def _take_up(health: Health, state: SeState, earlier: list[why.Link]) -> None:
    """Fills in the steps up to the grant: as an earlier life of this daemon saw them, else as the disk has them."""
    known = {link.step: link for link in earlier if link.result is StepResult.OK}
    record = state.require()
    number = record.grant.number if record.grant else 0
    for step in _ENROLL_STEPS:
        if step in known:
            health.take_over(known[step])
        else:
            health.step(step, StepResult.OK, f"SE {record.se_id}, enrolled as number {number} at an earlier start")


def _link(
    paths: Paths,
    settings: Settings,
    stop: StopToken,
    *,
    clock: Clock,
    state: SeState,
    beliefs: Beliefs,
    health: Health,
) -> None:
    # Here and not above: paramiko and psutil are for tunnel mode, and the first boot's memory is gone by then.
    from appliance.se.caller import Caller
    from appliance.se.forward import Forward
    from appliance.se.links import Links
    from appliance.se.receipt import Receipts
    from appliance.se.refresh import Refresh
    from appliance.se.telemetry import Telemetry
    from appliance.se.witness import Witness
    from appliance.storage.spool import Spool

    witness = Witness(paths.se_state / "witness.json", beliefs)
    witness.load()
    receipts = Receipts(state, beliefs)
    spool = Spool(paths.se_state / "spool", max_bytes=settings.se.spool_max_bytes)
    telemetry = Telemetry(spool, settings.se.telemetry_interval_s, clock, host.Host())

    def caller() -> Caller:
        record = state.require()
        if record.grant is None:
            raise ApplianceError("this SE lost its grant")
        key, is_next_key = state.login_identity()
        return Caller(
            user=settings.users.se,
            identity=key,
            is_next_key=is_next_key,
            keys=state,
            grant=record.grant,
            receipts=receipts,
            tickets=state,
            beliefs=beliefs,
            witness=witness,
            facts=partial(host.facts, image_digest=record.image_id),
            host_keys=partial(identity.host_keys, paths),
            spent=spent,
            telemetry=telemetry,
            spool=spool,
            tell=refresh.tell,
            settings=settings.se,
            clock=clock,
        )

    def spent() -> ImageKeyCopies:
        (copies, told), grant = state.scrub_image_key(paths), state.require().grant
        if told and grant is not None:
            health.step(Step.STORED, StepResult.OK, f"enrolled as SE number {grant.number}; {', '.join(told)}")
        return copies

    def on_change() -> None:
        states = links.states()
        shown = ", ".join(f"node {number} {link.value}" for number, link in sorted(states.items()))
        is_up = LinkState.UP in states.values()
        grant = state.require().grant
        health.line("se", "UP" if is_up else "DOWN", shown or "no link", [grant.address] if grant else [])
        systemd.notify(f"STATUS={shown}")
        if is_up:
            refresh.link_is_up()

    links = Links(caller, lambda: beliefs.current, most=settings.se.max_links, clock=clock, on_change=on_change)
    refresh = Refresh(paths, settings.se, state=state, beliefs=beliefs, links=links, clock=clock, tell=health.step)
    beliefs.on_change(links.follow)
    forward = Forward(paths.forward_socket, settings.se.forwards, open_channel=links.open_channel)
    while_this_se = stop.child()

    def watch_console(token: StopToken) -> None:
        GivenFile(paths.se_state).watch(token)
        while_this_se.stop("this SE is to be another one")

    supervisor = _supervisor(while_this_se, clock, health)
    supervisor.add("links", links.run, critical=True)
    supervisor.add("given", watch_console, critical=True)
    supervisor.add("refresh", refresh.run, critical=False)
    supervisor.add("forward", forward.run, critical=False)
    supervisor.add("telemetry", telemetry.run, critical=False)
    try:
        supervisor.run()
    finally:
        spool.close()
