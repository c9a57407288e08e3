"""Stage tunnel on the SE: one link's whole life, from dial to loss. A new `Link` is made for each try (`se.links`).

    dial         TCP, key exchange, host key checked, log-in             DIALING -> GREETING
    greet        hello; ticket stored durably; own reverse address; confirm; spent image key destroyed; self-test
                                                                         GREETING -> LINKED, or QUARANTINED
    live         heartbeats, telemetry with every n-th; the first answer makes it UP, unless the self-test got in
    end          lost, silent, refused or told to stop: everything it had is closed, `run` raises or returns

Each wait has an end: `watchdog.Guard` holds one deadline over dial and greet and the watchdog's rules afterwards, and
closes the socket. A quarantined link only pings.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from appliance import __version__
from appliance.errors import ApplianceError, StorageError, TunnelError
from appliance.pki.identity import Identity
from appliance.protocol import jws
from appliance.protocol import tunnel as said
from appliance.protocol.address import REVERSE_PORT
from appliance.protocol.trust import Envelope, TrustNode
from appliance.protocol.tunnel import LinkEvent, LinkState
from appliance.protocol.why import Step, StepResult
from appliance.runtime import log
from appliance.runtime.stop import StopToken
from appliance.se.caller import Caller
from appliance.se.channel_api import ByteChannel, ChannelApi, decode
from appliance.se.reverse import ReversePath
from appliance.se.self_test import open_doors
from appliance.se.ssh import SshConnection
from appliance.se.watchdog import Guard
from appliance.se.wire import Wire, connect

SSH_PORT = 22
THERE = frozenset({LinkState.LINKED, LinkState.UP, LinkState.QUARANTINED})
"""States in which the controller knows this SE at the other end."""
SILENT_HINT = (
    "the SE dials again by itself; `appliance doctor` on the controller tells whether its daemon hangs, "
    "the way there may be cut, or drop what is too large for it (MTU), and something else may answer at that address"
)
UNCONFINED = "TUNNEL-044"
"""Code: the gateway granted what the self-test wanted."""
TOO_MANY = 429
"""The answer to a heartbeat that came too soon (RFC 6585 section 4)."""
MAX_UNANSWERED = 6
"""Heartbeats without an answer before the link is given up although bytes come: the channel API hangs."""


class _Sent(NamedTuple):
    sequence: int
    at: float
    last_id: int
    """Of the telemetry that went with it, 0 where none did."""


class Link:
    """One link to one node at one address.

    Args:
        caller: who dials.
        node: whom, by the trust document.
        endpoint: `host:port` of its gateway.
        earlier_links: how many this process made before.
        carries: whether telemetry goes over this link.
        on_state: called after each move.
    """

    def __init__(
        self,
        caller: Caller,
        node: TrustNode,
        endpoint: str,
        *,
        earlier_links: int,
        carries: Callable[[], bool],
        on_state: Callable[[LinkState], None],
    ) -> None:
        self._log = log.bind("tunnel")
        self._caller = caller
        self._clock = caller.clock
        self._node = node
        self.endpoint = endpoint
        self._earlier_links = earlier_links
        self._carries = carries
        self._on_state = on_state
        self.keys = caller.keys
        self.state = LinkState.IDLE
        self.was_there = False
        """Whether it ever got as far as a confirmed hello, or quarantine."""
        self._connection: SshConnection | None = None
        self._sent: deque[_Sent] = deque()
        self._sequence = 0
        self._rtt_s = 0.0
        self._least_rtt_s: float | None = None
        self._interval_s = caller.grant.heartbeat_interval_s
        self._until_telemetry = 0
        self._is_key_due = False
        self._is_receipt_due = False
        self._has_news = False
        """Whether the last answer brought a trust document: the next one may bring another."""
        self.slot_s: float | None = None
        """When the gateway asked to come back, seconds after the end of `run`; None where it didn't."""
        self._protocol = said.PROTOCOL_NUMBER
        """What both sides speak, once hello was answered."""
        self._open_doors: list[said.Door] = []
        self._image_key = said.ImageKeyCopies.UNTOLD

    def run(self, stop: StopToken) -> None:
        """Lives until lost or told to stop; returns in the latter case.

        Raises:
            UnreachableError, TrustError, TunnelError, StorageError: why it is over.
        """
        self._move(LinkEvent.DIAL)
        try:
            self._connect(stop)
        except ApplianceError:
            if not stop.stopped:
                raise
        finally:
            self._move(LinkEvent.LOST)

    def open_channel(self, host: str, port: int) -> ByteChannel:
        """Opens a channel to a controller service over this link. Raises `TunnelError`."""
        if self._connection is None or self.state is not LinkState.UP:
            raise TunnelError(f"the link to node {self._node.number} is not up")
        return self._connection.open_channel(host, port)

    def _move(self, event: LinkEvent) -> None:
        before, self.state = self.state, said.advance(self.state, event)
        if before is not self.state:
            self._log.info(
                "link to node %d: %s -> %s", self._node.number, before.value, self.state.value,
                extra={"node": self._node.number, "endpoint": self.endpoint},
            )  # fmt: skip
            self.was_there = self.was_there or self.state in THERE
            self._on_state(self.state)

    def _connect(self, stop: StopToken) -> None:
        settings = self._caller.settings
        sock = connect(self.endpoint, default_port=SSH_PORT, timeout_s=settings.connect_timeout_s, stop=stop)
        wire = Wire(sock, self._clock)
        guard = Guard(wire, self._clock, login_deadline_s=settings.login_timeout_s)
        wire.on_close = guard.lost
        guard.start()
        connection = SshConnection(
            wire, clock=self._clock, rtt_s=lambda: self._least_rtt_s, allow_curve25519=settings.allow_curve25519
        )
        withdraw = stop.on_stop(guard.leave)
        try:
            self._serve(connection, guard)
        except TunnelError:
            if wire.slot_s is not None:
                self.slot_s = wire.slot_s
                text = f"the controller has more log-ins than it can do; our turn is in {wire.slot_s:.1f} s"
                raise TunnelError(text, hint="nothing to do: the SE comes back then", code="TUNNEL-046") from None
            if not guard.reason:
                raise
            # What the link's thread saw is only the closed connection; the guard knows why it was closed.
            raise TunnelError(guard.reason, hint=SILENT_HINT, code="TUNNEL-039") from None
        finally:
            withdraw()
            guard.end()
            connection.close()
            guard.join()

    def _serve(self, connection: SshConnection, guard: Guard) -> None:
        caller = self._caller
        connection.log_in(caller.user, caller.identity, host_keys=self._node.host_keys)
        self._move(LinkEvent.AUTHENTICATED)
        if caller.is_next_key:
            # The controller took it, and its answer got lost.
            caller.keys.promote_key()
        caller.tell(Step.LINK, StepResult.OK, f"node {self._node.number} at {self.endpoint}", "", "")
        api = ChannelApi(lambda: connection.open_channel(said.CHANNEL_HOST, said.CHANNEL_PORT), self._clock)
        reverse = ReversePath(caller.settings.sshd_host, caller.settings.sshd_port, tell=self._tell_reverse)
        reverse.start()
        try:
            self._greet(connection, api, reverse)
            self._connection = connection
            guard.greeted(self._interval_s)
            while guard.wait_due():
                self._beat(api)
                self._collect(api, guard)
                if self._is_key_due and not api.outstanding:
                    self._rotate_key(api)
                elif self._is_receipt_due and not api.outstanding:
                    self._renew_receipt(api)
            if guard.is_leaving:
                connection.say_goodbye()
            elif not guard.reason:
                raise connection.lost()
            hint = SILENT_HINT if guard.reason else ""
            raise TunnelError(guard.reason or "told to stop", hint=hint, code="TUNNEL-039")
        finally:
            self._connection = None
            guard.end()
            reverse.stop()

    # --- greet ---------------------------------------------------------------------------------------------------

    def _greet(self, connection: SshConnection, api: ChannelApi, reverse: ReversePath) -> None:
        caller, node = self._caller, self._node.number
        hello = said.Hello(
            protocol=said.PROTOCOL_NUMBER,
            agent_version=__version__,
            facts=caller.facts(),
            ticket=caller.tickets.ticket(node),
            trust_version=caller.beliefs.version,
            time=self._clock.now(),
            host_keys=caller.host_keys(),
            links=self._earlier_links,
            audit_heads=caller.witness.heads(node),
            wants_receipt=caller.receipts.is_due,
        )
        answer = api.call(said.HELLO_PATH, hello, said.HelloAnswer, timeout_s=self._caller.settings.login_timeout_s)
        if answer.node != node:
            raise TunnelError(f"node {answer.node} answers at {self.endpoint}, expected node {node}", code="TUNNEL-040")
        if said.agree(answer.protocol) != answer.protocol:
            raise TunnelError(
                f"node {node} speaks protocol {answer.protocol}, this agent "
                f"{said.OLDEST_PROTOCOL_NUMBER} to {said.PROTOCOL_NUMBER}",
                hint="upgrade the controller first; agents of its version and of the one before can link to it",
                code="TUNNEL-043",
            )
        self._protocol = answer.protocol
        self._interval_s = answer.heartbeat_interval_s
        if answer.quarantined:
            self._move(LinkEvent.QUARANTINED)
            text = f"in quarantine: {answer.reason}"
            self._log.error("%s", text, extra={"node": node})
            caller.tell(Step.HELLO, StepResult.FAILED, text, "TUNNEL-041", "another VM uses this SE's key")
            return
        # Before confirm, not after: a ticket that the controller counts as current and that a power cut took from this
        # SE would make it look like a restored copy of itself.
        caller.tickets.save_ticket(node, answer.ticket)
        connection.serve_reverse(caller.grant.address, REVERSE_PORT, reverse.accepted)
        confirmed = api.call(
            said.CONFIRM_PATH,
            said.Confirm(ticket=answer.ticket),
            said.ConfirmAnswer,
            timeout_s=self._caller.settings.login_timeout_s,
        )
        self._move(LinkEvent.CONFIRMED)
        text = f"answered by node {node}"
        if answer.reason == said.Newcomer.ROLLED_BACK.value:
            text += f": {answer.reason}"
            self._log.warning("%s", text, extra={"node": node})
        caller.tell(Step.HELLO, StepResult.OK, text, "", "")
        if confirmed.spent:
            self._image_key = caller.spent()
        if answer.trust is not None:
            caller.beliefs.accept(answer.trust)
        if answer.audit_head is not None:
            caller.witness.keep(answer.audit_head)
        caller.receipts.keep(answer.receipt)
        self._has_news = answer.trust is not None
        self._test_restrictions(connection)

    def _test_restrictions(self, connection: SshConnection) -> None:
        """Tries with this SE's own key what must be refused; see `se.self_test`."""
        self._open_doors = open_doors(connection, self._caller.grant.number)
        if not self._open_doors:
            return
        text = f"node {self._node.number} grants this SE's key what it must refuse: {', '.join(self._open_doors)}"
        self._log.error("%s", text, extra={"code": UNCONFINED, "node": self._node.number})
        hint = "anybody who copies this key could use it; check what answers as the gateway, and its version"
        self._caller.tell(Step.HELLO, StepResult.FAILED, text, UNCONFINED, hint)

    def _tell_reverse(self, problem: str) -> None:
        result = StepResult.FAILED if problem else StepResult.OK
        self._caller.tell(Step.REVERSE, result, problem or "a connection from the controller reached sshd", "", "")

    # --- live ----------------------------------------------------------------------------------------------------

    def _beat(self, api: ChannelApi) -> None:
        if len(self._sent) >= MAX_UNANSWERED:
            raise TunnelError(f"{MAX_UNANSWERED} heartbeats unanswered, though the controller sends", code="TUNNEL-042")
        samples, last_id = self._telemetry()
        self._sequence += 1
        is_first, untold = self._sequence == 1, said.ImageKeyCopies.UNTOLD
        beat = said.Heartbeat(
            sequence=self._sequence,
            time=self._clock.now(),
            rtt_s=self._rtt_s,
            telemetry=list(samples),
            spool_bytes=self._caller.spool.size_bytes,
            spool_dropped=self._caller.spool.dropped,
            trust_version=self._caller.beliefs.version,
            open_doors=self._open_doors if self._protocol >= said.SELF_TEST_SINCE else [],
            image_key=self._image_key if is_first and self._protocol >= said.IMAGE_KEY_TOLD_SINCE else untold,
        )
        # The time is taken before the send: the controller's answer may be here before the next line runs.
        self._sent.append(_Sent(self._sequence, self._clock.monotonic(), last_id))
        api.send(said.HEARTBEAT_PATH, beat)

    def _telemetry(self) -> tuple[Sequence[str], int]:
        """Returns what goes with this heartbeat: every n-th one carries what waits."""
        self._until_telemetry -= 1
        if self._until_telemetry > 0 or self.state is not LinkState.UP or not self._carries():
            return (), 0
        self._until_telemetry = math.ceil(self._caller.settings.telemetry_interval_s / max(self._interval_s, 0.01))
        if any(sent.last_id for sent in self._sent):
            return (), 0  # the same samples are under way already
        return self._caller.telemetry.pending()

    def _collect(self, api: ChannelApi, guard: Guard) -> None:
        """Takes answers until none is outstanding or the deadline is over; the guard judges what is missing."""
        while api.outstanding:
            try:
                answer = api.receive(said.DEADLINE_S)
            except TimeoutError:
                return
            if answer is None:
                return  # the channel was closed; the next heartbeat opens another
            arrived = self._clock.monotonic()
            if answer.status == TOO_MANY:
                self._log.warning("the controller wants fewer heartbeats than it asked for")
                if self._sent:
                    self._sent.popleft()  # answers come in order
                guard.answered(self._interval_s)
                continue
            pong = decode(answer, said.HeartbeatAnswer, said.HEARTBEAT_PATH)
            # Those before it, on a channel that was closed, will not be answered any more.
            while self._sent and self._sent[0].sequence < pong.sequence:
                self._sent.popleft()
            if not self._sent or self._sent[0].sequence != pong.sequence:
                raise TunnelError(f"heartbeat {pong.sequence} answered, which nobody sent", code="TUNNEL-036")
            self._answered(self._sent.popleft(), pong, arrived, guard)

    def _answered(self, sent: _Sent, pong: said.HeartbeatAnswer, arrived: float, guard: Guard) -> None:
        first = self._rtt_s == 0.0
        self._rtt_s = max(arrived - sent.at, 1e-6)
        self._least_rtt_s = min(self._rtt_s, self._least_rtt_s or self._rtt_s)
        self._log.debug("heartbeat %d answered after %.1f ms", sent.sequence, self._rtt_s * 1000)
        if not self._open_doors:
            self._move(LinkEvent.ANSWERED)
        if sent.last_id:
            self._caller.telemetry.delivered(sent.last_id)
        self._interval_s = pong.interval_s
        guard.answered(pong.interval_s)
        if first and self.state is LinkState.UP:
            text = f"answered by node {self._node.number} after {self._rtt_s * 1000:.1f} ms"
            self._caller.tell(Step.HEARTBEAT, StepResult.OK, text, "", "")
        if pong.audit_head is not None:
            self._caller.witness.keep(pong.audit_head)
        self._is_key_due = pong.rotate_key and not self._caller.is_next_key
        if self._has_news and pong.trust is None:
            self._is_receipt_due = self._caller.receipts.is_due
        self._has_news = pong.trust is not None
        if pong.trust is not None:
            try:
                self._caller.beliefs.accept(pong.trust)
            except StorageError as error:
                # It comes with each heartbeat until it is kept; a full disk is no reason to lose the link.
                self._log.error("the new trust document could not be stored: %s", error.message)

    def _rotate_key(self, api: ChannelApi) -> None:
        """Makes this SE a new key, as the controller asked: stored first, so that no answer can be lost."""
        self._is_key_due = False
        caller = self._caller
        try:
            successor = caller.keys.next_identity()
        except StorageError as error:
            self._log.error("no new key, it could not be stored: %s", error.message)
            return
        receipt = self._send_key(api, successor)
        caller.keys.promote_key(caller.receipts.checked(receipt, successor.thumbprint))

    def _renew_receipt(self, api: ChannelApi) -> None:
        """Sends the key that counts already: the answer is its receipt as the controller signs it now."""
        self._is_receipt_due = False
        self._caller.receipts.keep(self._send_key(api, self._caller.keys.identity))

    def _send_key(self, api: ChannelApi, key: Identity) -> Envelope | None:
        """Has the controller take `key` as this SE's; returns its receipt."""
        caller = self._caller
        statement = said.rotation_statement(caller.grant.cluster_id, caller.grant.se_id, key.public_line)
        wish = said.RotateKey(se_key=key.public_line, proof=jws.encode_part(key.sign(statement)))
        answer = api.call(said.ROTATE_PATH, wish, said.RotateAnswer, timeout_s=self._caller.settings.login_timeout_s)
        if answer.thumbprint != key.thumbprint:
            raise TunnelError(f"the controller took the key {answer.thumbprint}, which nobody sent", code="TUNNEL-036")
        return answer.receipt
