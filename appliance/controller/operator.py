"""The operator API on the controller's unix socket: what `appliance` commands on the node ask for.

Who may connect is decided by the socket's mode (0660) and group; who did what goes into the audit with the peer's
user id.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from appliance.controller.attempts import Attempts
from appliance.controller.events import Events
from appliance.controller.fleet import Fleet
from appliance.controller.material import Material
from appliance.controller.records import SeRecord
from appliance.controller.registry import Registry
from appliance.controller.web import MAX_NUMBER, Endpoint, ProblemError, Request, simple_problem
from appliance.errors import ApplianceError, NotFoundError, UsageError
from appliance.protocol.enroll import Refusals, SeStatus
from appliance.protocol.fleet import Reason, SeSummary, unconfined
from appliance.protocol.operator import (
    AuditEntry,
    AuditVerdict,
    ControllerView,
    Drained,
    Event,
    SeDetail,
    StatusView,
)
from appliance.protocol.telemetry import Sample
from appliance.protocol.why import Chain, Link, Step, StepResult, verdict

REVERSE_WORKS = "its sshd answers with the enrolled host key"
FLAPPING_HINT = "look at the way between the two: `ping` from the SE's console, its interface's error counters, a NAT"
REVERSE_HINT = "on the SE: systemctl status ssh; `appliance why` there tells its half"
MAX_WAIT_S = 60.0
MAX_AUDIT_PAGE = 10_000


def _found(error: ApplianceError, status: int) -> ProblemError:
    return ProblemError(simple_problem(status, error.code, error.message, advice=error.hint))


def _stored_text(record: SeRecord) -> str:
    if not record.confirmed_at:
        return "the SE has not said so yet"
    destroyed = ", and destroyed its copies of the image key" if record.image_key_gone_at else ""
    return f"the SE confirmed its first hello{destroyed}"


def _number(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name, "")
    try:
        number = float(text) if text else default
    except ValueError:
        number = math.nan
    if not abs(number) <= MAX_NUMBER:
        raise ProblemError(simple_problem(400, "HTTP-400", f"{name}={text[:40]!r} is no number that can be meant"))
    return number


class OperatorApi:
    """Answers operators. One loop only."""

    def __init__(
        self,
        *,
        registry: Registry,
        fleet: Fleet,
        events: Events,
        attempts: Attempts,
        view: Callable[[], ControllerView],
        refusals: Callable[[], Counter[str]],
        problems: Callable[[], list[str]],
        hindrances: Callable[[], list[str]],
        drain: Callable[[], None],
        wall: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._fleet = fleet
        self._events = events
        self._attempts = attempts
        self._view = view
        self._refusals = refusals
        self._problems = problems
        self._hindrances = hindrances
        """What keeps links from coming up, whosever they are."""
        self._drain = drain
        self._wall = wall

    def endpoints(self) -> list[Endpoint]:
        """The table of this front end."""
        no = (400, 404)
        return [
            Endpoint("GET", "/v1/controller", self.controller, "This controller", {200: ControllerView}),
            Endpoint("GET", "/v1/status", self.status, "The fleet in one look", {200: StatusView}),
            Endpoint("GET", "/v1/ses", self.ses, "All SEs", {200: list[SeSummary]}),
            Endpoint("GET", "/v1/ses/{se}", self.se, "One SE", {200: SeDetail}, errors=no),
            Endpoint(
                "GET", "/v1/ses/{se}/telemetry", self.telemetry, "Recent samples", {200: list[Sample]},
                query=("since",), errors=no,
            ),
            Endpoint("GET", "/v1/why/{subject}", self.why, "The causal chain", {200: Chain}, errors=no),
            Endpoint(
                "GET", "/v1/events", self.events, "Events, newest last", {200: list[Event]}, query=("after", "wait_s"),
                errors=(400,),
            ),
            Endpoint(
                "GET", "/v1/audit", self.audit, "Audit entries", {200: list[AuditEntry]}, query=("after", "limit"),
                errors=(400,),
            ),
            Endpoint("GET", "/v1/audit/verify", self.verify, "Check the audit chain", {200: AuditVerdict}),
            Endpoint("POST", "/v1/drain", self.drain, "Stop admitting", {200: Drained}),
        ]  # fmt: skip

    def _se(self, request: Request) -> SeRecord:
        try:
            return self._registry.find(request.path_params["se"])
        except (NotFoundError, UsageError) as error:
            raise _found(error, 404 if isinstance(error, NotFoundError) else 400) from None

    async def controller(self, _request: Request, _body: None) -> ControllerView:
        """This controller."""
        return self._view()

    async def status(self, _request: Request, _body: None) -> StatusView:
        """The fleet in one look."""
        counts = self._fleet.counts()
        return StatusView(
            controller=self._view(),
            states=dict(counts),
            links=self._fleet.links,
            heartbeat_interval_s=self._fleet.interval_s,
            enrolled=sum(1 for record in self._registry.ses() if record.status is SeStatus.ENROLLED),
            refusals=dict(self._refusals()),
            problems=self._problems(),
        )

    async def ses(self, _request: Request, _body: None) -> list[SeSummary]:
        """All SEs."""
        return [self._fleet.summary(record) for record in self._registry.ses()]

    async def se(self, request: Request, _body: None) -> SeDetail:
        """One SE."""
        return self._fleet.detail(self._se(request))

    async def telemetry(self, request: Request, _body: None) -> list[Sample]:
        """Recent samples, oldest first."""
        return self._fleet.history.recent(self._se(request).se_id, _number(request, "since", 0.0))

    async def why(self, request: Request, _body: None) -> Chain:
        """The causal chain of an SE, a source address or an attempt id."""
        subject = request.path_params["subject"]
        try:
            record = self._registry.find(subject)
        except UsageError as error:
            raise _found(error, 400) from None
        except NotFoundError:
            tried = [entry for entry in self._registry.ses() if entry.attempt_id == subject]
            if tried:
                return self._told(tried[0])
            links = self._attempts.chain(subject)
            if links is None:
                text = f"nothing is known of {subject!r}"
                advice = "name an SE, a source address or the attempt id that the SE's console shows"
                raise ProblemError(simple_problem(404, "NOTFOUND-001", text, advice=advice)) from None
            return Chain(subject=subject, side="controller", steps=links, verdict=verdict(links))
        return self._told(record)

    def _told(self, record: SeRecord) -> Chain:
        steps = self._chain(record)
        return Chain(subject=record.name, side="controller", steps=steps, verdict=verdict(steps))

    def _chain(self, record: SeRecord) -> list[Link]:
        seen = {link.step: link for link in self._attempts.chain(record.se_id) or []}
        derived, _ = self._fleet.state(record)
        link = self._fleet.link(record.se_id)
        ok, waiting, failed = StepResult.OK, StepResult.WAITING, StepResult.FAILED
        unseen = StepResult.UNSEEN
        steps = [
            Link(step=Step.BOOT, result=unseen, text=f"boot id {record.seen_facts.boot_id or record.facts.boot_id}"),
            Link(step=Step.TLS, result=ok, at=record.enrolled_at, text=f"from {record.source}"),
            Link(step=Step.NONCE, result=ok, at=record.enrolled_at),
            self._grant_link(record, derived.text),
            Link(
                step=Step.STORED, result=ok if record.confirmed_at else unseen, at=record.confirmed_at,
                text=_stored_text(record),
            ),
        ]  # fmt: skip
        if record.status not in {SeStatus.ENROLLED, SeStatus.PENDING, SeStatus.REJECTED}:
            text = f"{derived.text}: {record.status_reason}" if record.status_reason else derived.text
            hint = "" if record.status is SeStatus.DELETED else f"appliance se reinstate {record.number}"
            at, code = record.status_at, derived.reason.value
            return [*steps, Link(step=Step.LINK, result=failed, at=at, text=text, code=code, hint=hint)]
        lately = self._fleet.lately(record.se_id)
        if link is None:
            last = seen.get(Step.LINK)
            text, code, hint, at = derived.text, derived.reason.value, "", self._fleet.state(record)[1]
            if last is not None and last.result is failed and last.at >= at:
                text, code, hint, at = last.text, last.code, last.hint, last.at
            text = "; ".join(filter(None, [text, *self._hindrances(), lately.text * lately.comes_and_goes]))
            never = not record.confirmed_at and (last is None or last.result is not failed)
            return [
                *steps,
                Link(step=Step.LINK, result=waiting if never else failed, at=at, text=text, code=code, hint=hint),
            ]
        opened_at = self._wall() - self._fleet.age_s(link)
        beats = link.heartbeats
        hello, code, hint = f"agent {link.agent_version}", "", ""
        if derived.reason is Reason.CLONE:
            hello, code = f"{hello}; {derived.text}", derived.reason.value
            hint = f"switch the copy off, then: appliance se release {record.number}"
        steps += [
            Link(
                step=Step.LINK, result=ok, at=opened_at,
                text="; ".join(filter(None, [f"from {link.source}", lately.text])),
                code="FLAPPING" if lately.comes_and_goes else "", hint=FLAPPING_HINT if lately.comes_and_goes else "",
            ),
            Link(
                step=Step.HELLO, result=ok if link.confirmed else waiting, at=opened_at if link.confirmed else 0.0,
                text=hello if link.confirmed else "; ".join(["no confirmed hello yet", *self._hindrances()]),
                code=code, hint=hint,
            )
            if not link.open_doors
            else Link(
                step=Step.HELLO, result=failed, at=opened_at, text=unconfined(link.open_doors), code="UNCONFINED",
                hint="its self-test got through; upgrade this controller, or check who else answers at its SSH port",
            ),
            Link(
                step=Step.HEARTBEAT, result=ok if beats else waiting, at=self._fleet.last_heartbeat_at(record.se_id),
                text=f"{beats} answered" if beats else "none yet",
            ),
        ]  # fmt: skip
        if link.reverse_ok is None:
            return [*steps, Link(step=Step.REVERSE, result=waiting, text="the check is queued")]
        if not link.reverse_ok:
            reverse = Link(
                step=Step.REVERSE,
                result=failed,
                at=link.reverse_at,
                text=link.reverse_error,
                code="REVERSE_DOWN",
                hint=REVERSE_HINT,
            )
            return [*steps, reverse]
        return [*steps, Link(step=Step.REVERSE, result=ok, at=link.reverse_at, text=REVERSE_WORKS)]

    def _grant_link(self, record: SeRecord, text: str) -> Link:
        at = record.enrolled_at
        if record.status is SeStatus.PENDING:
            text, hint = f"{text}; its key is {record.thumbprint}", f"appliance se approve {record.number}"
            return Link(step=Step.GRANT, result=StepResult.WAITING, at=at, text=text, hint=hint)
        if record.status is SeStatus.REJECTED:
            text = f"{text}: {record.status_reason}" if record.status_reason else text
            hint, code = f"appliance se reinstate {record.number}", Refusals.REJECTED.value.code
            return Link(step=Step.GRANT, result=StepResult.FAILED, at=record.status_at, text=text, code=code, hint=hint)
        text = f"number {record.number}, image key {record.image_key_id}"
        return Link(step=Step.GRANT, result=StepResult.OK, at=at, text=text)

    # Events and audit.

    async def events(self, request: Request, _body: None) -> list[Event]:
        """Events after an id; waits where there is none yet."""
        wait_s = min(max(_number(request, "wait_s", 0.0), 0.0), MAX_WAIT_S)
        return await self._events.wait_after(int(_number(request, "after", 0.0)), wait_s=wait_s)

    async def audit(self, request: Request, _body: None) -> list[AuditEntry]:
        """Audit entries, oldest first."""
        limit = int(min(max(_number(request, "limit", 1000.0), 1.0), MAX_AUDIT_PAGE))
        return await self._registry.audit.read(after=int(_number(request, "after", 0.0)), limit=limit)

    async def verify(self, _request: Request, _body: None) -> AuditVerdict:
        """Checks the whole chain."""
        return await self._registry.audit.verify()

    async def drain(self, request: Request, _body: None) -> Drained:
        """Stops admitting links and enrollments; the open ones stay until the stop."""
        links = self._fleet.links
        await self._registry.note(
            actor=request.state.actor, action="controller.drained", subject=f"node {self._view().node}",
            detail=f"nobody is admitted any more; {links} links are open",
        )  # fmt: skip
        self._drain()
        return Drained(links=links)


def views(material: Material, **values: Any) -> ControllerView:
    """Builds the view of this controller from its material and what the daemon bound."""
    return msgspec.convert(
        {
            "cluster_id": material.cluster.cluster_id,
            "node": material.cluster.node,
            "epoch": material.cluster.epoch,
            "root_fingerprint": material.authority.fingerprint,
            "root_expires_at": material.authority.expires_at,
            "root_is_locked": material.authority.is_locked,
            "issuing_fingerprint": material.issuing.fingerprint if material.issuing else "",
            "issuing_expires_at": material.issuing.expires_at if material.issuing else 0,
            "node_certificate_expires_at": material.node_certificate_expires_at,
            "trust_version": material.trust.version,
            "addresses": material.cluster.addresses,
            **values,
        },
        ControllerView,
    )
