"""The controller's life: starts its parts in one loop, stops them in order.

Order of a start: lock, material, store, registry; then sockets; then listeners; READY last. Order of a stop: nobody
new, links closed, tasks ended, store closed, lock released.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import pwd
import signal
from collections.abc import Coroutine
from typing import Any

import msgspec
import uvloop

from appliance.controller.listener import TlsListener
from appliance.controller.material import Files, Material
from appliance.controller.parts import Parts
from appliance.controller.rotation import resume_files
from appliance.controller.sockets import Bound, open_sockets, port_of, raise_descriptor_limit
from appliance.controller.store.sqlite import SqliteStore
from appliance.controller.tending import tend
from appliance.paths import Paths
from appliance.protocol.why import Step, StepResult
from appliance.runtime import systemd
from appliance.runtime.clock import SYNCHRONISED, Clock, SystemClock
from appliance.runtime.health import BEAT_S
from appliance.runtime.peer import unix_peer
from appliance.settings import Settings
from appliance.storage.atomic import make_dir, write_atomic
from appliance.storage.lock import RootLock

_log = logging.getLogger(__name__)

STOP_WAIT_S = 3.0
"""How long a stop waits for closed links to be gone."""


class Controller:
    """A controller that runs."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.stopping = asyncio.Event()

    async def run(self) -> None:
        """Serves until `stopping` is set."""
        parts = self.parts
        loop = asyncio.get_running_loop()
        await parts.registry.load(reserved=())
        await parts.kept.load()
        parts.reserve(parts.material.trust)
        now = int(parts.clock.now())
        for nonce in parts.registry.used_nonces:
            parts.nonces.use(nonce, now)
        parts.renewal.look()
        listener = TlsListener(
            parts.sockets.enroll,
            parts.tls_context,
            parts.enroll_front,
            descriptors=parts.descriptors,
            handshake_timeout_s=parts.settings.controller.handshake_timeout_s,
            max_connections=parts.settings.controller.max_unauthenticated,
            max_per_source=parts.settings.controller.max_unauthenticated_per_source,
            on_handshake=self._handshake,
        )
        acceptor = parts.acceptor = parts.gateway.listen(parts.sockets.ssh, parts.material.files.host_key)
        parts.rotation.resume()
        await parts.intents.settle(parts.trust.in_force())
        operator = await loop.create_unix_server(
            lambda: parts.operator_front.protocol(identify=_actor), sock=parts.sockets.operator
        )
        metrics_server = await loop.create_server(parts.metrics_front.protocol, sock=parts.sockets.metrics)
        tasks = [asyncio.create_task(work, name=name) for name, work in self._services(listener)]
        try:
            self._announce()
            stop = asyncio.create_task(self.stopping.wait())
            done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task is not stop:
                    _log.error("%s ended by itself", task.get_name())
                    await task
        finally:
            systemd.notify("STOPPING=1")
            parts.drain()
            acceptor.close()
            operator.close()
            metrics_server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            parts.fleet.close_all("the controller stops")
            parts.operator_front.close()
            parts.metrics_front.close()
            parts.hook.close()
            parts.kept.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(parts.gateway.empty.wait(), STOP_WAIT_S)
            parts.paths.controller_file.unlink(missing_ok=True)
            parts.paths.controller_socket.unlink(missing_ok=True)

    def _services(self, listener: TlsListener) -> list[tuple[str, Coroutine[Any, Any, None]]]:
        parts = self.parts
        return [
            ("enroll", listener.run()),
            ("reverse", parts.reverse.run(parts.sockets.reverse)),
            ("watch", parts.fleet.watch()),
            ("slots", parts.gateway.keep_slots()),
            ("tending", self._tend()),
            ("safekeeping", parts.kept.run()),
            ("renewal", parts.renewal.run()),
            ("watchdog", self._watchdog()),
        ]

    def _announce(self) -> None:
        parts = self.parts
        bound = Bound(
            pid=os.getpid(),
            enroll_port=port_of(parts.sockets.enroll),
            ssh_port=port_of(parts.sockets.ssh),
            reverse_port=port_of(parts.sockets.reverse),
            metrics_port=port_of(parts.sockets.metrics),
            socket=str(parts.paths.controller_socket),
            started_at=parts.started_at,
        )
        write_atomic(parts.paths.controller_file, msgspec.json.encode(bound), mode=0o644)
        text = f"enroll {bound.enroll_port}, ssh {bound.ssh_port}, reverse {bound.reverse_port}"
        parts.health.line("controller", "ready", text, parts.material.cluster.addresses)
        systemd.notify(f"READY=1\nSTATUS={text}")
        parts.events.emit("tunnel", "controller.ready", parts.material.cluster.cluster_id, f"controller ready: {text}")

    def _handshake(self, source: str, error: str) -> None:
        parts = self.parts
        result = StepResult.FAILED if error else StepResult.OK
        hint = "the SE checks this node's certificate against its own root CA; see its console" if error else ""
        text = f"TLS handshake failed: {error}" if error else "TLS handshake done"
        code = "ENROLL-041" if error else ""
        if "ALERT_UNKNOWN_CA" in error:
            parts.kept.recovery.root_unknown(source)
        parts.attempts.note(source, Step.TLS, result, at=parts.clock.now(), text=text, code=code, hint=hint)

    async def _tend(self) -> None:
        parts = self.parts
        life_s = parts.settings.controller.pending_life_s
        await tend(
            parts.admission, parts.tokens, parts.fleet, parts.events,
            key_rates=parts.key_rates, pending_life_s=life_s, monotonic=parts.clock.monotonic,
        )  # fmt: skip

    async def _watchdog(self) -> None:
        interval_s = min(BEAT_S, systemd.watchdog_interval_s() or BEAT_S)
        while True:
            self.parts.health.beat()
            systemd.notify("WATCHDOG=1")
            await asyncio.sleep(interval_s)


def _actor(transport: Any) -> dict[str, Any]:
    """Names the local user at the other end of the operator socket."""
    pid, uid, _gid = unix_peer(transport.get_extra_info("socket"))
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "?"
    return {"actor": f"{name} (uid {uid}, process {pid})"}


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3)."""


def _collect_less() -> None:
    """Makes the collector of cycles look at what a fleet keeps as seldom as it can.

    Ten thousand links are millions of objects, which live for days and are no cycles that end: to walk them takes a
    second in which no heartbeat is answered. It must look now and then all the same, though heartbeats, enrollments and
    links that ended leave no cycles. The young are looked at often and few at a time: 20,000 objects in one go, as they
    are with ten times fewer looks, kept heartbeats waiting for 30 to 50 ms on two busy cores.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000, 2, 700)


def _give_buffers_back() -> None:
    """Keeps the heap without holes: buffers of 128 KiB and more come from the system and go back to it at once.

    glibc's malloc raises these bounds to the size of the largest buffer it saw freed. What was read from a socket then
    lies on the heap between the packets that wait for a service which doesn't read, and 16 MiB of them kept 110.
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL(None)
        for bound in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(bound, 128 * 1024)


async def _main(paths: Paths, settings: Settings, clock: Clock) -> None:
    logging.getLogger("asyncssh").setLevel(logging.ERROR)
    store = SqliteStore.open(paths.store_file, clock=clock)
    try:
        sockets = open_sockets(paths, settings)
        try:
            controller = Controller(Parts(paths, settings, clock, sockets, store))
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, controller.stopping.set)
            loop.add_signal_handler(signal.SIGHUP, controller.parts.renewal.recheck.set)
            await controller.run()
        finally:
            sockets.close()
    finally:
        await store.close()


def run(paths: Paths, settings: Settings) -> int:
    """Runs the controller until SIGTERM or SIGINT; SIGHUP looks at the node certificate.

    Returns:
        The exit code, 0 after a stop that was asked for.

    Raises:
        LockedError: another daemon works on this root.
        StorageError: `controller init` has not run here, or its state is damaged.
        SettingsError: a port can't be bound.
    """
    clock = SystemClock(settings.clock.offset_s, SYNCHRONISED[settings.clock.synchronised])
    make_dir(paths.state, mode=0o755)
    make_dir(paths.run, mode=0o755)
    with RootLock(paths.lock):
        files = Files(paths.controller_state)
        files.check_ready()
        resume_files(files)
        Material(files)
        raise_descriptor_limit()
        _collect_less()
        _give_buffers_back()
        uvloop.run(_main(paths, settings, clock))
    return 0
