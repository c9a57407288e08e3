"""The controller's composition root: builds every part, starts them in one loop, stops them in order.

Order of a start: lock, material, store, registry; then sockets; then listeners; READY last. Order of a stop: nobody
new, links closed, tasks ended, store closed, lock released.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
import shutil
import signal
import ssl
from collections.abc import Collection, Coroutine
from typing import Any

import asyncssh
import msgspec
import uvloop

from appliance import __version__
from appliance.controller import metrics, problems
from appliance.controller.admission import Admission
from appliance.controller.attempts import Attempts
from appliance.controller.audit import Audit
from appliance.controller.channel import ChannelApi
from appliance.controller.enroll import EnrollApi
from appliance.controller.events import Events
from appliance.controller.fleet import Fleet
from appliance.controller.hook import EnrollHook
from appliance.controller.link import Link
from appliance.controller.listener import FrontEnd, HttpLimits, TlsListener
from appliance.controller.material import Files, Material
from appliance.controller.nonce import Nonces
from appliance.controller.operator import OperatorApi, views
from appliance.controller.operator_enroll import AdmissionApi
from appliance.controller.operator_trust import TrustApi
from appliance.controller.rate import Rates
from appliance.controller.registry import Registry
from appliance.controller.renewal import Renewal
from appliance.controller.reverse import ReversePath
from appliance.controller.rotation import Kind, Rotation, resume_files
from appliance.controller.safekeeping import Safekeeping
from appliance.controller.sockets import Bound, Sockets, open_sockets, port_of, raise_descriptor_limit
from appliance.controller.store.sqlite import SqliteStore
from appliance.controller.telemetry import History
from appliance.controller.tending import tend
from appliance.controller.tokens import Tokens
from appliance.controller.trust import Publication
from appliance.controller.tunnel import Gateway
from appliance.controller.web import Endpoint, Request, StreamingResponse, application
from appliance.errors import StorageError, TrustError
from appliance.paths import Paths
from appliance.pki import ssh_keys, tls
from appliance.protocol import enroll as enroll_said
from appliance.protocol import tunnel
from appliance.protocol.enroll import SeStatus
from appliance.protocol.fleet import State
from appliance.protocol.operator import ControllerView
from appliance.protocol.trust import TrustDocument
from appliance.protocol.why import Step, StepResult
from appliance.runtime import host, systemd
from appliance.runtime.clock import SYNCHRONISED, Clock, SystemClock
from appliance.runtime.health import Health
from appliance.runtime.peer import unix_peer
from appliance.settings import Settings
from appliance.storage.atomic import make_dir, write_atomic
from appliance.storage.lock import RootLock

_log = logging.getLogger(__name__)

OPERATOR_BODY_BYTES = 64 * 1024
IMAGE_KEY_WARNING_S = 7 * 86400
STOP_WAIT_S = 3.0
"""How long a stop waits for closed links to be gone."""


def allowed_uids(names: Collection[str]) -> frozenset[int]:
    """User ids of the users who may use the reverse path; unknown names are told and left out."""
    found = set()
    for name in names:
        try:
            found.add(pwd.getpwnam(name).pw_uid)
        except KeyError:
            _log.warning("controller.reverse_users names %r, who does not exist on this host", name)
    return frozenset(found)


class Controller:
    """All parts of one running controller."""

    def __init__(self, paths: Paths, settings: Settings, clock: Clock, sockets: Sockets, store: SqliteStore) -> None:
        self.paths = paths
        self.settings = settings
        self.clock = clock
        self.sockets = sockets
        self.store = store
        terms = settings.controller
        self.material = Material(Files(paths.controller_state))
        cluster = self.material.cluster
        self.started_at = clock.now()
        self.health = Health(paths.health_file, "controller", clock)
        self.events = Events(clock.now)
        self.attempts = Attempts()
        self.history = History(history_s=terms.telemetry_history_s)
        audit = Audit(store, cluster_id=cluster.cluster_id, node=cluster.node, epoch=cluster.epoch)
        self.registry = Registry(store, audit, wall=clock.now)
        self.fleet = Fleet(
            self.registry,
            self.history,
            self.events,
            wall=clock.now,
            monotonic=clock.monotonic,
            base_interval_s=terms.heartbeat_interval_s,
        )
        self.trust = Publication(self.material, on_publish=self._reserve, wall=clock.now)
        self.rotation = Rotation(
            self.material, self.trust, waiting=self._unaware, on_switch=self._switched, wall=clock.now
        )
        uids = allowed_uids(terms.reverse_users)
        self.reverse = ReversePath(self.fleet, allowed_uids=lambda: uids)
        self.nonces = Nonces(self.material.nonce_key)
        self.admission = Admission(self.registry, pending_life_s=terms.pending_life_s, wall=clock.now)
        self.tokens = Tokens(self.registry, wall=clock.now)
        self.hook = EnrollHook(terms.enroll_hook)
        self.kept = Safekeeping(self.material, self.registry, store, self.events, terms=terms, wall=clock.now)
        self.enroll_api = EnrollApi(
            self.registry,
            self.events,
            self.attempts,
            admission=self.admission,
            hook=self.hook,
            on_replaced=self.fleet.replaced,
            cluster_id=cluster.cluster_id,
            epoch=cluster.epoch,
            receipts=self.kept.receipts,
            recovery=self.kept.recovery,
            trust=self.trust,
            nonces=self.nonces,
            rates=Rates(
                rate_per_s=terms.enroll_rate_per_s,
                burst=terms.enroll_burst,
                source_rate_per_s=terms.source_rate_per_s,
                source_burst=terms.source_burst,
                now=clock.monotonic(),
            ),
            interval_s=lambda: self.fleet.interval_s,
            may_store=self._has_room,
            wall=clock.now,
            monotonic=clock.monotonic,
        )
        channel_api = ChannelApi(
            self.fleet,
            self.history,
            self.attempts,
            trust=self.trust,
            kept=self.kept,
            node=cluster.node,
            reverse_port=lambda: port_of(sockets.reverse),
            check_reverse=self.reverse.check,
            wall=clock.now,
        )
        operator_api = OperatorApi(
            material=self.material,
            registry=self.registry,
            fleet=self.fleet,
            events=self.events,
            attempts=self.attempts,
            view=self.view,
            refusals=lambda: self.enroll_api.refusals,
            problems=self.problems,
            drain=self.drain,
            has_hook=bool(terms.enroll_hook),
            wall=clock.now,
        )
        self.enroll_front = self._front(
            "Appliance enrollment", self.enroll_api.endpoints(), enroll_said.MAX_HEADER_BYTES, 24 * 1024, keep_alive_s=5
        )
        # A link's channel speaks every few seconds; it must outlive the longest interval many times.
        channel_front = self._front(
            "Appliance channel", channel_api.endpoints(), tunnel.MAX_HEADER_BYTES, tunnel.MAX_BODY_BYTES,
            keep_alive_s=900,
        )  # fmt: skip
        trust_api = TrustApi(self.rotation, self.fleet, self.events)
        admission_api = AdmissionApi(
            self.registry,
            self.admission,
            self.tokens,
            self.fleet,
            self.events,
            on_granted=self.enroll_api.count_granted,
        )
        operator_endpoints = [
            *operator_api.endpoints(),
            *admission_api.endpoints(),
            *trust_api.endpoints(),
            *self.kept.endpoints(admission_api.approve_record),
        ]
        self.operator_front = self._front(
            "Appliance operator", operator_endpoints, 16 * 1024, OPERATOR_BODY_BYTES, keep_alive_s=75
        )
        metrics_endpoint = Endpoint("GET", "/metrics", self._metrics, "Prometheus text", {200: None})
        self.metrics_front = self._front("Appliance metrics", [metrics_endpoint], 16 * 1024, 1024, keep_alive_s=75)
        self.gateway = Gateway(
            terms=terms,
            se_user=settings.users.se,
            fleet=self.fleet,
            attempts=self.attempts,
            channel_api=channel_front,
            on_lost=self._lost,
            wall=clock.now,
            monotonic=clock.monotonic,
        )
        self.tls_context = self._tls_context()
        self.acceptor: asyncssh.SSHAcceptor | None = None
        self.stopping = asyncio.Event()
        self.renewal = Renewal(self.material, self.tls_context, self.events, expiries=self._expiries, wall=clock.now)

    def _front(
        self, title: str, endpoints: list[Endpoint], max_header: int, max_body: int, *, keep_alive_s: int
    ) -> FrontEnd:
        terms = self.settings.controller
        limits = HttpLimits(max_header, max_body, terms.header_timeout_s, terms.body_timeout_s, keep_alive_s)
        return FrontEnd(application(title, endpoints, max_body=max_body, documented=True), limits)

    def _tls_context(self) -> ssl.SSLContext:
        files = self.material.files
        try:
            return tls.server_context(files.node_certificate, files.node_key)
        except (TrustError, StorageError) as error:
            # A power cut between the two files of a renewal leaves a pair that doesn't match.
            _log.warning("the node certificate is issued anew: %s", error.message)
            self.material.renew_node_certificate(int(self.clock.now()))
            return tls.server_context(files.node_certificate, files.node_key)

    # What other parts ask for.

    def _expiries(self) -> dict[str, float]:
        found: dict[str, float] = {
            "root CA": self.material.authority.expires_at,
            "node certificate": self.material.node_certificate_expires_at,
        }
        now = self.clock.now()
        for key in self.registry.image_keys():
            # An image key lives a month by default: it would be warned of from its first day on.
            if key.is_active(now) and key.expires_at - now < IMAGE_KEY_WARNING_S:
                found[f"image key {key.image_key_id}"] = key.expires_at
        return found

    def _has_room(self) -> bool:
        return shutil.disk_usage(self.paths.controller_state).free >= self.settings.controller.disk_reserve_bytes

    def _lost(self, link: Link) -> None:
        self.fleet.lost(link)
        self.attempts.note(
            link.source, Step.LINK, StepResult.FAILED, at=self.clock.now(), se_id=link.se_id,
            code=link.lost_reason.value, text=link.lost_text, hint="the SE redials by itself",
        )  # fmt: skip

    def _reserve(self, trust: TrustDocument) -> None:
        lines = [line for node in trust.nodes for line in node.host_keys] + trust.login_keys
        self.registry.reserve(ssh_keys.fingerprint(line) for line in lines)

    def _unaware(self, version: int) -> list[str]:
        """Names of the SEs in good standing that have not seen trust document `version`."""
        return [
            record.name
            for record, link in self.fleet
            if record.status is SeStatus.ENROLLED and (link is None or link.trust_version < version)
        ]

    def _switched(self, kind: Kind) -> None:
        """A successor took over on disk: what listens shows it from now on."""
        files = self.material.files
        if kind is Kind.CA:
            tls.reload(self.tls_context, files.node_certificate, files.node_key)
        elif kind is Kind.HOST_KEY and self.acceptor is not None:
            self.acceptor.update(server_host_keys=[str(files.host_key)])

    def drain(self) -> None:
        """Admits nobody any more."""
        self.gateway.draining = True

    def view(self) -> ControllerView:
        """This controller."""
        return views(
            self.material,
            version=__version__,
            enroll_port=port_of(self.sockets.enroll),
            ssh_port=port_of(self.sockets.ssh),
            reverse_port=port_of(self.sockets.reverse),
            metrics_port=port_of(self.sockets.metrics),
            pid=os.getpid(),
            started_at=self.started_at,
        )

    def problems(self) -> list[str]:
        """What an operator should look at."""
        found = problems.find(
            self.registry,
            self.fleet,
            expiries=self._expiries(),
            short_of_bytes=0 if self._has_room() else self.settings.controller.disk_reserve_bytes,
            clock_is_synchronised=self.clock.synchronised(),
            now=self.clock.now(),
        )
        return [*found, *self.kept.problems()]

    async def _metrics(self, _request: Request, _body: None) -> StreamingResponse:
        ses = []
        for record, link in self.fleet:
            derived, _ = self.fleet.state(record)
            ses.append(
                metrics.SeMetrics(
                    se_id=record.se_id,
                    name=record.name,
                    state=derived.state,
                    up=derived.state in {State.UP, State.DEGRADED, State.UPGRADING},
                    rtt_s=link.rtt.value if link else None,
                    heartbeats=link.heartbeats if link else 0,
                    sample=self.history.latest_text(record.se_id),
                )
            )
        snapshot = metrics.ControllerMetrics(
            version=__version__,
            cluster_id=self.material.cluster.cluster_id,
            node=self.material.cluster.node,
            process=host.own_process(),
            links=self.fleet.links,
            enrolled=self.enroll_api.granted,
            refusals=dict(self.enroll_api.refusals),
            audit_entries=self.registry.audit.count,
            samples_accepted=self.history.accepted,
            samples_refused=dict(self.history.refused),
            certificate_expires_at=float(self.material.node_certificate_expires_at),
        )
        return StreamingResponse(metrics.render(snapshot, ses), media_type=metrics.CONTENT_TYPE)

    # Running.

    async def run(self) -> None:
        """Serves until `stopping` is set."""
        loop = asyncio.get_running_loop()
        await self.registry.load(reserved=())
        await self.kept.load()
        self._reserve(self.material.trust)
        now = int(self.clock.now())
        for nonce in self.registry.used_nonces:
            self.nonces.use(nonce, now)
        self.renewal.look()
        listener = TlsListener(
            self.sockets.enroll,
            self.tls_context,
            self.enroll_front,
            handshake_timeout_s=self.settings.controller.handshake_timeout_s,
            max_connections=self.settings.controller.max_unauthenticated,
            max_per_source=self.settings.controller.max_unauthenticated_per_source,
            on_handshake=self._handshake,
        )
        acceptor = self.acceptor = await self.gateway.listen(self.sockets.ssh, self.material.files.host_key)
        self.rotation.resume()
        operator = await loop.create_unix_server(
            lambda: self.operator_front.protocol(identify=_actor), sock=self.sockets.operator
        )
        metrics_server = await loop.create_server(self.metrics_front.protocol, sock=self.sockets.metrics)
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
            self.drain()
            acceptor.close()
            operator.close()
            metrics_server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.fleet.close_all("the controller stops")
            self.operator_front.close()
            self.metrics_front.close()
            self.hook.close()
            self.kept.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.gateway.empty.wait(), STOP_WAIT_S)
            self.paths.controller_file.unlink(missing_ok=True)
            self.paths.controller_socket.unlink(missing_ok=True)

    def _services(self, listener: TlsListener) -> list[tuple[str, Coroutine[Any, Any, None]]]:
        return [
            ("enroll", listener.run()),
            ("reverse", self.reverse.run(self.sockets.reverse)),
            ("watch", self.fleet.watch()),
            ("tending", self._tend()),
            ("safekeeping", self.kept.run()),
            ("renewal", self.renewal.run()),
            ("watchdog", self._watchdog()),
        ]

    def _announce(self) -> None:
        bound = Bound(
            pid=os.getpid(),
            enroll_port=port_of(self.sockets.enroll),
            ssh_port=port_of(self.sockets.ssh),
            reverse_port=port_of(self.sockets.reverse),
            metrics_port=port_of(self.sockets.metrics),
            socket=str(self.paths.controller_socket),
            started_at=self.started_at,
        )
        write_atomic(self.paths.controller_file, msgspec.json.encode(bound), mode=0o644)
        text = f"enroll {bound.enroll_port}, ssh {bound.ssh_port}, reverse {bound.reverse_port}"
        self.health.line("controller", "ready", text, self.material.cluster.addresses)
        systemd.notify(f"READY=1\nSTATUS={text}")
        self.events.emit("tunnel", "controller.ready", self.material.cluster.cluster_id, f"controller ready: {text}")

    def _handshake(self, source: str, error: str) -> None:
        result = StepResult.FAILED if error else StepResult.OK
        hint = "the SE checks this node's certificate against its own root CA; see its console" if error else ""
        text = f"TLS handshake failed: {error}" if error else "TLS handshake done"
        code = "ENROLL-030" if error else ""
        self.attempts.note(source, Step.TLS, result, at=self.clock.now(), text=text, code=code, hint=hint)

    async def _tend(self) -> None:
        life_s = self.settings.controller.pending_life_s
        await tend(self.admission, self.tokens, self.fleet, self.events, pending_life_s=life_s)

    async def _watchdog(self) -> None:
        interval_s = systemd.watchdog_interval_s()
        while interval_s:
            systemd.notify("WATCHDOG=1")
            await asyncio.sleep(interval_s)
        await asyncio.Event().wait()


def _actor(transport: Any) -> dict[str, Any]:
    """Names the local user at the other end of the operator socket."""
    pid, uid, _gid = unix_peer(transport.get_extra_info("socket"))
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = "?"
    return {"actor": f"{name} (uid {uid}, process {pid})"}


async def _main(paths: Paths, settings: Settings, clock: Clock) -> None:
    logging.getLogger("asyncssh").setLevel(logging.ERROR)
    store = SqliteStore.open(paths.store_file, clock=clock)
    try:
        sockets = open_sockets(paths, settings)
        try:
            controller = Controller(paths, settings, clock, sockets, store)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, controller.stopping.set)
            loop.add_signal_handler(signal.SIGHUP, controller.renewal.recheck.set)
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
        uvloop.run(_main(paths, settings, clock))
    return 0
