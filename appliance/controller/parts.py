"""The controller's composition root: every part, made once and given what it needs; the answers parts ask each other
for. Starts nothing: that is `daemon`'s.
"""

from __future__ import annotations

import logging
import math
import os
import pwd
import shutil
import ssl
import sys
from collections.abc import Collection

import asyncssh

from appliance import __version__
from appliance.controller import metrics, problems
from appliance.controller.admission import Admission
from appliance.controller.attempts import Attempts
from appliance.controller.audit import Audit
from appliance.controller.channel import ChannelApi
from appliance.controller.descriptors import Descriptors
from appliance.controller.direct import DirectFrontEnd
from appliance.controller.enroll import EnrollApi
from appliance.controller.events import Events
from appliance.controller.fleet import Fleet
from appliance.controller.hook import EnrollHook
from appliance.controller.images import Images
from appliance.controller.intents import Intents
from appliance.controller.link import Link
from appliance.controller.listener import FrontEnd, HttpLimits
from appliance.controller.material import Files, Material
from appliance.controller.nonce import Nonces
from appliance.controller.operator import REVERSE_HINT, REVERSE_WORKS, OperatorApi, views
from appliance.controller.operator_enroll import AdmissionApi
from appliance.controller.operator_images import ImagesApi
from appliance.controller.operator_trust import TrustApi
from appliance.controller.rate import KeyRates, Rates
from appliance.controller.registry import Registry
from appliance.controller.renewal import Expiry, Renewal, of_material
from appliance.controller.reverse import ReversePath
from appliance.controller.rotation import Kind, Rotation
from appliance.controller.safekeeping import Safekeeping
from appliance.controller.scrape import scrape
from appliance.controller.sockets import Sockets, port_of
from appliance.controller.store.sqlite import SqliteStore
from appliance.controller.telemetry import History
from appliance.controller.tokens import Tokens
from appliance.controller.trust import Publication
from appliance.controller.tunnel import Gateway
from appliance.controller.vault import Vault
from appliance.controller.web import Endpoint, Request, StreamingResponse, application
from appliance.errors import StorageError, TrustError
from appliance.paths import Paths
from appliance.pki import ssh_keys, tls
from appliance.protocol import enroll as enroll_said
from appliance.protocol import tunnel
from appliance.protocol.enroll import SeStatus
from appliance.protocol.operator import ControllerView
from appliance.protocol.trust import TrustDocument
from appliance.protocol.why import Step, StepResult
from appliance.protocol.window import Pool
from appliance.runtime import host
from appliance.runtime.clock import Clock
from appliance.runtime.health import Health
from appliance.settings import Settings

_log = logging.getLogger(__name__)

OPERATOR_BODY_BYTES = 64 * 1024


def allowed_uids(names: Collection[str]) -> frozenset[int]:
    """User ids of the users who may use the reverse path; unknown names are told and left out."""
    found = set()
    for name in names:
        try:
            found.add(pwd.getpwnam(name).pw_uid)
        except KeyError:
            _log.warning("controller.reverse_users names %r, who does not exist on this host", name)
    return frozenset(found)


class Parts:
    """All parts of one controller. What listens is told by `tls_context`, `gateway` and the fronts."""

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
        self.descriptors = Descriptors(clock.monotonic)
        self.history = History(history_s=terms.telemetry_history_s)
        audit = Audit(store, cluster_id=cluster.cluster_id, node=cluster.node, epoch=cluster.epoch)
        self.registry = Registry(store, audit, wall=clock.now)
        self.intents = Intents(self.registry, store, wall=clock.now)
        self.fleet = Fleet(
            self.registry, self.history, self.events, terms=terms, wall=clock.now, monotonic=clock.monotonic
        )
        self.trust = Publication(self.material, on_publish=self.reserve, wall=clock.now)
        self.rotation = Rotation(
            self.material, self.trust, waiting=self._unaware, on_switch=self._switched, wall=clock.now
        )
        self.vault = Vault(
            self.material,
            self.trust,
            on_switch=lambda: self._switched(Kind.CA),
            wall=clock.now,
            monotonic=clock.monotonic,
        )
        uids = allowed_uids(terms.reverse_users)
        windows = Pool(terms.windows_max_bytes)
        self.reverse = ReversePath(
            self.fleet, windows=windows, allowed_uids=lambda: uids, checked=self._reverse_checked
        )
        self.nonces = Nonces(self.material.nonce_key)
        self.admission = Admission(self.registry, pending_life_s=terms.pending_life_s, wall=clock.now)
        self.tokens = Tokens(self.registry, wall=clock.now)
        self.hook = EnrollHook(terms.enroll_hook)
        self.kept = Safekeeping(self.material, self.registry, store, self.events, terms=terms, wall=clock.now)
        self.key_rates = KeyRates(rate_per_s=terms.image_key_rate_per_s, burst=terms.image_key_burst)
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
            key_rates=self.key_rates,
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
            registry=self.registry,
            fleet=self.fleet,
            events=self.events,
            attempts=self.attempts,
            view=self.view,
            refusals=lambda: self.enroll_api.refusals,
            problems=self.problems,
            hindrances=self.hindrances,
            drain=self.drain,
            wall=clock.now,
        )
        images_api = ImagesApi(
            self.registry,
            Images(self.registry, cluster_id=cluster.cluster_id, wall=clock.now),
            self.fleet,
            self.events,
            material=self.material,
            key_rates=self.key_rates,
            has_hook=bool(terms.enroll_hook),
            wall=clock.now,
        )
        self.enroll_front = self._front(
            "Appliance enrollment", self.enroll_api.endpoints(), enroll_said.MAX_HEADER_BYTES, 24 * 1024,
            keep_alive_s=5, max_begun=terms.max_begun_requests, unread_timeout_s=terms.body_timeout_s,
        )  # fmt: skip
        # A link's channel speaks every few seconds; it must outlive the longest interval many times.
        self.channel_front = DirectFrontEnd(
            application("Appliance channel", channel_api.endpoints(), max_body=tunnel.MAX_BODY_BYTES, documented=True),
            self._limits(tunnel.MAX_HEADER_BYTES, tunnel.MAX_BODY_BYTES, keep_alive_s=900),
            path=tunnel.HEARTBEAT_PATH,
            answer=channel_api.answer_beat,
        )
        trust_api = TrustApi(
            self.rotation, self.vault, self.fleet, self.events, intents=self.intents, view=self.view, wall=clock.now
        )
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
            *images_api.endpoints(),
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
            channel_api=self.channel_front,
            windows=windows,
            descriptors=self.descriptors,
            on_lost=self._lost,
            wall=clock.now,
            monotonic=clock.monotonic,
        )
        self.tls_context = self._tls_context()
        self.acceptor: asyncssh.SSHAcceptor | None = None
        self.renewal = Renewal(self.material, self.tls_context, self.events, expiries=self._expiries, wall=clock.now)

    def _front(
        self, title: str, endpoints: list[Endpoint], max_header: int, max_body: int, *, keep_alive_s: int,
        max_begun: int = sys.maxsize, unread_timeout_s: float = math.inf,
    ) -> FrontEnd:  # fmt: skip
        limits = self._limits(max_header, max_body, keep_alive_s=keep_alive_s)
        limits = limits._replace(max_begun=max_begun, unread_timeout_s=unread_timeout_s)
        return FrontEnd(application(title, endpoints, max_body=max_body, documented=True), limits)

    def _limits(self, max_header: int, max_body: int, *, keep_alive_s: int) -> HttpLimits:
        terms = self.settings.controller
        return HttpLimits(
            max_header, max_body, terms.header_timeout_s, terms.body_timeout_s, keep_alive_s, terms.max_queued_requests
        )

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

    def _expiries(self) -> list[Expiry]:
        now, advice = self.clock.now(), "`appliance image-key create` makes another"
        keys = [key for key in self.registry.image_keys() if key.is_active(now)]
        return [
            *of_material(self.material),
            *(Expiry(f"image key {key.image_key_id}", key.expires_at, key.created_at, advice) for key in keys),
        ]

    def _has_room(self) -> bool:
        return shutil.disk_usage(self.paths.controller_state).free >= self.settings.controller.disk_reserve_bytes

    def _lost(self, link: Link) -> None:
        self.fleet.lost(link)
        self.attempts.note(
            link.source, Step.LINK, StepResult.FAILED, at=self.clock.now(), se_id=link.se_id,
            code=link.lost_reason.value, text=link.lost_text, hint="the SE redials by itself",
        )  # fmt: skip

    def _reverse_checked(self, link: Link, error: str) -> None:
        self.fleet.reverse_checked(link, error)
        result = StepResult.FAILED if error else StepResult.OK
        self.attempts.note(
            link.source, Step.REVERSE, result, at=self.clock.now(), se_id=link.se_id,
            code="REVERSE_DOWN" if error else "", text=error or REVERSE_WORKS, hint=REVERSE_HINT if error else "",
        )  # fmt: skip

    def reserve(self, trust: TrustDocument) -> None:
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
            # Who comes from now on may not believe who signed the head so far.
            self.kept.witness.sign()
        elif kind is Kind.HOST_KEY and self.acceptor is not None:
            self.acceptor.update(server_host_keys=[str(files.host_key)])

    def drain(self) -> None:
        """Admits nobody any more, neither links nor enrollments."""
        self.enroll_api.draining = True
        self.gateway.drain()

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
            backup_is_due=self.material.files.backup_due.exists(),
            short_of_bytes=0 if self._has_room() else self.settings.controller.disk_reserve_bytes,
            clock_is_synchronised=self.clock.synchronised(),
            now=self.clock.now(),
        )
        return [*self.hindrances(), *found, *self.kept.problems(), *filter(None, [self.trust.problem()])]

    def hindrances(self) -> list[str]:
        """What keeps SEs from coming up now, whosever they are."""
        found = [self.descriptors.problem(), self.gateway.problem()]
        if slow_s := self.store.slow_s():
            found.append(f"the store is slow: it took {slow_s:.1f} s to write something; look at this host's disk")
        return [text for text in found if text]

    def _refused(self) -> dict[str, int]:
        """Whom the limits turned away, by reason, since the start."""
        found = {f"gateway-{kind}": count for kind, count in self.gateway.refusals.items()}
        found["gateway-slot"] = self.gateway.slots.shed
        found["descriptors"] = self.descriptors.refused
        found |= {f"reverse-{kind}": count for kind, count in self.reverse.refusals.items()}
        found |= {f"link-{kind}": count for kind, count in self.fleet.refusals.items()}
        fronts = {"enroll": self.enroll_front, "channel": self.channel_front, "operator": self.operator_front}
        for name, front in fronts.items():
            found |= {f"{name}-{kind}": count for kind, count in front.refusals.items()}
        return found

    async def _metrics(self, _request: Request, _body: None) -> StreamingResponse:
        snapshot = metrics.ControllerMetrics(
            version=__version__,
            cluster_id=self.material.cluster.cluster_id,
            node=self.material.cluster.node,
            process=host.own_process(),
            links=self.fleet.links,
            enrolled=self.enroll_api.granted,
            refusals=dict(self.enroll_api.refusals),
            refused=self._refused(),
            audit_entries=self.registry.audit.count,
            samples_accepted=self.history.accepted,
            samples_refused=dict(self.history.refused),
            certificate_expires_at=float(self.material.node_certificate_expires_at),
            expiries={expiry.what: float(expiry.expires_at) for expiry in self._expiries()},
        )
        return StreamingResponse(
            metrics.render(snapshot, scrape(self.fleet, self.history)), media_type=metrics.CONTENT_TYPE
        )
