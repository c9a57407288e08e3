"""The channel API: hello, confirm and heartbeat, spoken over channels of a link. The link is the identity.

A link goes through these requests in order; what comes out of order is refused. Take-over and clones are judged by
`protocol.tunnel.judge_newcomer`; hellos of one SE are judged one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import secrets
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from appliance.controller.attempts import Attempts
from appliance.controller.fleet import Fleet, ping
from appliance.controller.link import Link
from appliance.controller.pace import paced
from appliance.controller.rate import Rates
from appliance.controller.records import SeRecord
from appliance.controller.safekeeping import Safekeeping
from appliance.controller.store.port import OvertakenError
from appliance.controller.trust import Publication
from appliance.controller.web import MAX_PARTS, Endpoint, ProblemError, Request, simple_problem
from appliance.errors import ApplianceError, StorageError
from appliance.pki import ssh_keys
from appliance.pki.identity import verify
from appliance.protocol import jws, strict_json, tunnel
from appliance.protocol.address import se_address
from appliance.protocol.enroll import InstanceFacts, SeStatus, check_facts
from appliance.protocol.fleet import Reason, unconfined
from appliance.protocol.trust import Envelope
from appliance.protocol.tunnel import (
    Confirm,
    ConfirmAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    HelloAnswer,
    ImageKeyCopies,
    Newcomer,
    RotateAnswer,
    RotateKey,
)
from appliance.protocol.why import Step, StepResult

if TYPE_CHECKING:
    from appliance.controller.telemetry import History

_log = logging.getLogger(__name__)

Said = TypeVar("Said")
Answered = TypeVar("Answered")

TICKET_BYTES = 16
ALARMS_PER_H = 6
"""Copies and roll-backs of one SE that are told and audited: who has its key must not fill the audit with hellos."""
RESTS_S = 0.05
"""How long a link isn't read after each heartbeat too many: a flood of them is then twenty a second."""
MAX_JUDGED = 3
"""How often one hello is judged at most, where the SE's record is changed each time; a ping each is 6 s of its 20."""
REFUSED_STAYS_S = 1.0
"""How long a link whose hello was refused stays open, for the answer to get out."""


def _refuse(status: int, code: str, title: str, advice: str) -> ProblemError:
    return ProblemError(simple_problem(status, code, title, advice=advice))


def _stored(
    answer: Callable[[ChannelApi, Request, Said], Awaitable[Answered]],
) -> Callable[[ChannelApi, Request, Said], Awaitable[Answered]]:
    """Tells both sides why a link isn't admitted where the store fails; the SE redials, which is the way to heal it."""

    @functools.wraps(answer)
    async def run(api: ChannelApi, request: Request, said: Said) -> Answered:
        try:
            return await answer(api, request, said)
        except StorageError as error:
            link: Link = request.state.link
            text = f"not admitted: {error.message}"
            _log.error("%s", text, extra={"stage": "tunnel", "se_id": link.se_id})
            if not link.lost_text:
                link.lost_reason, link.lost_text = Reason.LINK_LOST, text
            advice = "It is the controller's disk or store; `appliance status` there says more. The SE tries again."
            raise _refuse(503, "TUNNEL-026", "The controller can't store anything now", advice) from None

    return run


def _machine(source: str, facts: InstanceFacts) -> str:
    """Names a machine so that an operator tells it from its copy behind the same address."""
    own = [f"boot {facts.boot_id[:8]}"] if facts.boot_id else []
    if facts.macs:
        own.append(f"MAC {facts.macs[0][:17]}")
    return f"{source} ({', '.join(own)})" if own else source


class ChannelApi:
    """Answers links. One loop only."""

    def __init__(
        self,
        fleet: Fleet,
        history: History,
        attempts: Attempts,
        *,
        trust: Publication,
        kept: Safekeeping,
        node: int,
        reverse_port: Callable[[], int],
        check_reverse: Callable[[Link], None],
        wall: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._history = history
        self._attempts = attempts
        self._trust = trust
        self._receipts, self._witness, self._recovery = kept.receipts, kept.witness, kept.recovery
        self._node = node
        self._reverse_port = reverse_port
        self._check_reverse = check_reverse
        self._wall = wall
        # For each SE alone: a thousand may be set back at once by their hypervisor, and each is told.
        self._alarms = Rates(
            rate_per_s=1.0, burst=sys.maxsize, source_rate_per_s=ALARMS_PER_H / 3600, source_burst=ALARMS_PER_H,
            now=wall(),
        )  # fmt: skip
        self._noting: set[asyncio.Task[None]] = set()
        self._hellos: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def endpoints(self) -> list[Endpoint]:
        """The table of this front end."""
        return [
            Endpoint("POST", tunnel.HELLO_PATH, self.hello, "Greet", {200: HelloAnswer}, Hello, errors=(400, 403, 409)),
            Endpoint(
                "POST", tunnel.CONFIRM_PATH, self.confirm, "Confirm the ticket", {200: ConfirmAnswer}, Confirm,
                errors=(403, 409),
            ),
            Endpoint(
                "POST", tunnel.HEARTBEAT_PATH, self.heartbeat, "Ping, with telemetry", {200: HeartbeatAnswer},
                Heartbeat, errors=(409, 429),
            ),
            Endpoint(
                "POST", tunnel.ROTATE_PATH, self.rotate_key, "Take the SE's new key", {200: RotateAnswer}, RotateKey,
                errors=(400, 403, 409),
            ),
        ]  # fmt: skip

    def _record(self, link: Link) -> SeRecord:
        """The SE's record as it stands: who was enrolled at log-in may be revoked, or replaced, before hello."""
        record = self._fleet.registry.se(link.se_id)
        if record is None or record.status is not SeStatus.ENROLLED or record.thumbprint != link.thumbprint:
            raise _refuse(403, "TUNNEL-020", "This SE is not enrolled", "See `appliance se show` on the controller.")
        return record

    def _newer_trust(self, version: int) -> Envelope | None:
        return self._trust.following(version) if version < self._trust.version else None

    @_stored
    async def hello(self, request: Request, hello: Hello) -> HelloAnswer:
        """First word of a link: who it is, judged by its ticket."""
        link: Link = request.state.link
        if link.hello_done:
            raise _refuse(409, "TUNNEL-021", "This link said hello already", "Open a new link.")
        spoken = tunnel.agree(hello.protocol)
        if spoken is None:
            raise self._other_protocol(link, hello)
        link.protocol = spoken
        if problems := check_facts(hello.facts, hello.agent_version):
            raise strict_json.MalformedError(problems[0])
        link.hello_done = True
        link.agent_version = hello.agent_version[:64]
        link.machine = _machine(link.source, hello.facts)
        link.trust_version = hello.trust_version
        self._recovery.trust_shown(hello.trust_version)
        lock = self._hellos.setdefault(link.se_id, asyncio.Lock())
        try:
            async with lock:
                verdict, ticket = await self._judge_as_it_stands(link, hello)
        finally:
            if not self._fleet.holds(link):
                asyncio.get_running_loop().call_later(
                    REFUSED_STAYS_S, link.close, Reason.LINK_LOST, "its hello was refused"
                )
        record = self._record(link)
        quarantined = verdict is Newcomer.QUARANTINE
        if not quarantined:
            await self._witness.shown(hello.audit_heads, by=record.name, source=link.source)
            link.ticket = ticket
            self._attempts.note(
                link.source, Step.HELLO, StepResult.OK, at=self._wall(), se_id=link.se_id, text=verdict.value
            )
        return HelloAnswer(
            protocol=link.protocol,
            ticket=ticket,
            quarantined=quarantined,
            reason=verdict.value,
            heartbeat_interval_s=self._fleet.interval_s,
            time=self._wall(),
            node=self._node,
            reverse_address=se_address(record.number),
            reverse_port=self._reverse_port(),
            trust=self._newer_trust(hello.trust_version),
            audit_head=None if quarantined else self._newer_head(link),
            receipt=self._receipts.sign(record) if hello.wants_receipt and not quarantined else None,
        )

    def _other_protocol(self, link: Link, hello: Hello) -> ProblemError:
        """Refuses an agent too old or too new, where an operator sees it, too."""
        ours = f"{tunnel.OLDEST_PROTOCOL_NUMBER} to {tunnel.PROTOCOL_NUMBER}"
        older = hello.protocol < tunnel.OLDEST_PROTOCOL_NUMBER
        text = f"its agent {hello.agent_version[:64]!r} speaks protocol {hello.protocol}, {ours} are spoken here"
        advice = (
            f"Upgrade the {'agent' if older else 'controller'}: neighbouring protocol numbers understand each other."
        )
        if not link.lost_text:
            link.lost_reason, link.lost_text = Reason.PROTOCOL, text
        asyncio.get_running_loop().call_later(REFUSED_STAYS_S, link.close, Reason.PROTOCOL, text)
        return _refuse(400, "TUNNEL-022", f"Protocol {hello.protocol} is not spoken here, but {ours}", advice)

    def _newer_head(self, link: Link) -> Envelope | None:
        """The newest audit head, where this link didn't get it yet."""
        envelope = self._witness.newer_than(link.audit_seen)
        if envelope is not None and self._witness.head is not None:
            link.audit_seen = self._witness.head.sequence
        return envelope

    async def _judge_as_it_stands(self, link: Link, hello: Hello) -> tuple[Newcomer, str]:
        """As `_judge`, and anew where somebody changed the SE's record meanwhile, an operator for example: else the SE
        would have to dial again, for nothing that it did."""
        for _ in range(MAX_JUDGED - 1):
            with contextlib.suppress(OvertakenError):
                return await self._judge(link, hello)
        return await self._judge(link, hello)

    async def _judge(self, link: Link, hello: Hello) -> tuple[Newcomer, str]:
        fleet, record = self._fleet, self._record(link)
        older = fleet.link(link.se_id)
        answers = False
        if older is not None:
            answers = await ping(older) and fleet.link(link.se_id) is older
            record = self._record(link)
        if link.is_gone:
            raise _refuse(409, "TUNNEL-027", "The link broke before it was judged", "Open a new link and say hello.")
        verdict = tunnel.judge_newcomer(record.tickets, hello.ticket, older_link_answers=answers)
        if verdict is Newcomer.QUARANTINE:
            fleet.quarantine(link)
            if self._alarms.allow(record.se_id, self._wall()):
                first = older.machine if older else "not linked"
                text = f"{record.name}: a second SE with its key came from {link.machine}; the first is {first}"
                fleet.events.emit("tunnel", "se.clone", record.se_id, text)
                await fleet.registry.note(
                    actor=f"se {link.source}",
                    action="se.clone",
                    subject=record.se_id,
                    detail=f"second: {link.machine}; first: {first}",
                )
            return verdict, ""
        ticket = secrets.token_urlsafe(TICKET_BYTES)
        changed = msgspec.structs.replace(record, ticket_pending=ticket, seen_facts=hello.facts)
        if hello.ticket and hello.ticket == record.ticket_pending:
            # It shows the ticket of a hello whose confirmation got lost: it had stored it, so that one is current now.
            changed = msgspec.structs.replace(changed, ticket=hello.ticket)
        link.rolled_back = verdict is Newcomer.ROLLED_BACK
        if link.rolled_back:
            changed = msgspec.structs.replace(changed, ticket_superseded=record.ticket)
        if link.rolled_back and self._alarms.allow(record.se_id, self._wall()):
            await fleet.registry.update_audited(record, changed, actor=f"se {link.source}", action="se.rolled-back")
            text = f"{record.name} came back with an older link ticket from {link.source}: restored snapshot or disk?"
            fleet.events.emit("tunnel", "se.rolled-back", record.se_id, text)
        else:
            await fleet.registry.update_se(record, changed)
        fleet.admit(link)
        return verdict, ticket

    @_stored
    async def confirm(self, request: Request, confirm: Confirm) -> ConfirmAnswer:
        """The SE stored its ticket: from now on the older one is worth nothing."""
        link: Link = request.state.link
        if link.quarantined or not link.ticket or confirm.ticket != link.ticket:
            raise _refuse(409, "TUNNEL-023", "There is no such ticket to confirm", "Open a new link and say hello.")
        record = self._record(link)
        if record.ticket_pending != confirm.ticket:
            raise _refuse(409, "TUNNEL-024", "A newer link of this SE said hello", "Open a new link and say hello.")
        changed = msgspec.structs.replace(record, ticket=confirm.ticket, ticket_pending="")
        if not record.confirmed_at:
            changed = msgspec.structs.replace(changed, confirmed_at=self._wall())
            await self._fleet.registry.update_audited(
                record,
                changed,
                actor=f"se {link.source}",
                action="enroll.spent",
                detail="hello confirmed, image key spent",
            )
        else:
            await self._fleet.registry.update_se(record, changed)
        link.confirmed = True
        link.probes = set(tunnel.SELF_TEST_REFUSALS)
        self._fleet.look(link.se_id)
        return ConfirmAnswer(spent=True)

    def answer_beat(self, state: dict[str, Any], body: bytes) -> bytes:
        """A heartbeat's short way (`direct`): its answer's JSON. Raises as `beat`, and `MalformedError`."""
        beat = strict_json.decode(body, Heartbeat, max_bytes=tunnel.MAX_BODY_BYTES, max_parts=MAX_PARTS)
        return msgspec.json.encode(self.beat(state["link"], beat))

    async def heartbeat(self, request: Request, beat: Heartbeat) -> HeartbeatAnswer:
        """Ping, on the ordinary way."""
        return self.beat(request.state.link, beat)

    def beat(self, link: Link, beat: Heartbeat) -> HeartbeatAnswer:
        """Ping; a confirmed link may bring telemetry, a quarantined one may only ping. Raises `ProblemError`."""
        if not link.confirmed and not link.quarantined:
            raise _refuse(409, "TUNNEL-025", "Hello was not confirmed on this link", "Say hello and confirm first.")
        if wait_s := self._fleet.overdone_s(link):
            # Nothing more is read of it either: each of them, with what it carries, takes time from the others.
            paced(link.conn).rest(RESTS_S)
            title = f"More than {link.terms.heartbeats_per_interval:g} heartbeats an interval"
            refusal = simple_problem(429, "TUNNEL-045", title, advice="Wait as told; the link stays.")
            raise ProblemError(msgspec.structs.replace(refusal, retry_after_s=math.ceil(wait_s)))
        now = self._wall()
        first = link.heartbeats == 0
        link.trust_version = beat.trust_version
        if first:
            self._tested(link, beat)
            self._image_key_told(link, beat.image_key)
        self._fleet.heartbeat(link, rtt_s=beat.rtt_s, lag_s=now - beat.time, spool_bytes=beat.spool_bytes)
        accepted = 0
        if beat.telemetry and not link.quarantined:
            accepted = self._history.accept(link.se_id, beat.telemetry, now)
        if first and not link.quarantined:
            self._attempts.note(
                link.source, Step.HEARTBEAT, StepResult.OK, at=now, se_id=link.se_id, text="first heartbeat answered"
            )
            self._check_reverse(link)
        return HeartbeatAnswer(
            sequence=beat.sequence,
            interval_s=self._fleet.interval_s,
            accepted=accepted,
            trust=None if link.quarantined else self._newer_trust(beat.trust_version),
            audit_head=None if link.quarantined else self._newer_head(link),
            rotate_key=not link.quarantined and self._record(link).key_due,
        )

    def _tested(self, link: Link, beat: Heartbeat) -> None:
        """The link's self-test is over: what is refused from now on was an attack."""
        link.probes = set()
        link.open_doors = tuple(beat.open_doors)
        if link.open_doors and not link.quarantined:
            text = f"{self._record(link).name}: {unconfined(link.open_doors)}"
            _log.error("%s", text, extra={"stage": "tunnel", "se_id": link.se_id})
            self._fleet.events.emit("tunnel", "se.unconfined", link.se_id, text)

    def _image_key_told(self, link: Link, copies: ImageKeyCopies) -> None:
        """Notes once what became of the SE's copies of its image key: its own word, which decides nothing."""
        if link.quarantined or copies is ImageKeyCopies.UNTOLD:
            return
        record = self._record(link)
        if copies is ImageKeyCopies.LEFT:
            text = f"{record.name} could not destroy its copy of the image key {record.image_key_id}: its log says why"
            _log.warning("%s", text, extra={"stage": "enroll", "se_id": link.se_id})
            self._fleet.events.emit("enroll", "se.image-key-left", link.se_id, text)
        elif not record.image_key_gone_at:
            task = asyncio.get_running_loop().create_task(self._note_image_key_gone(record, link.source))
            self._noting.add(task)
            task.add_done_callback(self._noting.discard)

    async def _note_image_key_gone(self, record: SeRecord, source: str) -> None:
        now, registry = self._wall(), self._fleet.registry

        def gone(se: SeRecord) -> SeRecord:
            return se if se.image_key_gone_at else msgspec.structs.replace(se, image_key_gone_at=now)

        try:
            noted = await registry.change_se(
                record.se_id, gone, actor=f"se {source}", action="enroll.image-key-destroyed",
                detail=f"the SE destroyed its copies of {record.image_key_id}",
            )  # fmt: skip
        except ApplianceError as error:  # its next link tells it again
            _log.warning("not noted that an image key was destroyed: %s", error.message, extra={"se_id": record.se_id})
            return
        if noted.image_key_gone_at == now:
            text = f"{record.name} destroyed its copies of the image key {record.image_key_id}"
            self._fleet.events.emit("enroll", "se.image-key-destroyed", record.se_id, text)

    @_stored
    async def rotate_key(self, request: Request, wish: RotateKey) -> RotateAnswer:
        """Puts the SE's new key in the old one's place. Says the same again where its answer got lost, or a receipt of
        before a change of root or issuing CA is to be replaced."""
        link: Link = request.state.link
        record = self._record(link)
        if link.quarantined or not link.confirmed:
            raise _refuse(409, "TUNNEL-025", "Hello was not confirmed on this link", "Say hello and confirm first.")
        if wish.se_key == record.se_key:
            return RotateAnswer(thumbprint=record.thumbprint, receipt=self._receipts.sign(record))
        if not record.key_due:
            raise _refuse(409, "TUNNEL-028", "Nobody asked for a new key", "See `appliance se rotate-key`.")
        try:
            statement = tunnel.rotation_statement(self._trust.document.cluster_id, record.se_id, wish.se_key)
            holds = verify(wish.se_key, jws.decode_part(wish.proof), statement)
            thumbprint = ssh_keys.fingerprint(wish.se_key)
        except ApplianceError as error:
            raise _refuse(400, "TUNNEL-029", "The new key is no Ed25519 key", error.message) from None
        if not holds:
            raise _refuse(403, "TUNNEL-048", "The proof of the new key does not verify", "Sign with the new key.")
        registry = self._fleet.registry
        if registry.is_reserved(thumbprint) or registry.se_by_key(thumbprint) is not None:
            raise _refuse(403, "TUNNEL-049", "The key already has another role", "Make a new key.")
        changed = msgspec.structs.replace(record, se_key=wish.se_key, thumbprint=thumbprint, key_due=False)
        changed = msgspec.structs.replace(changed, key_at=self._wall())
        await registry.update_audited(
            record, changed, actor=f"se {link.source}", action="se.key-rotated",
            detail=f"key {thumbprint} for {record.thumbprint}",
        )  # fmt: skip
        # The old key opened this link; it goes on in the name of the new one.
        link.thumbprint = thumbprint
        self._fleet.events.emit("tunnel", "se.key-rotated", record.se_id, f"{record.name} has a new key {thumbprint}")
        return RotateAnswer(thumbprint=thumbprint, receipt=self._receipts.sign(changed))
