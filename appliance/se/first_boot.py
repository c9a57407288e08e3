"""Drives first boot and refresh: does each phase of `se.enroll`, waits as it says, until the grant is on disk.

State is on disk before anything is done with it: seed's trust, image key and identity before the first request, the
grant before anything uses it. So it may be cut anywhere; the next start goes on, with the same se_id and key, and gets
the same grant again.

Each failure is one sentence in the log and one step in the health file; nothing makes it give up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Literal

from appliance import __version__
from appliance.errors import ApplianceError, EnrollError, SeedError, TrustError, UsageError
from appliance.paths import Paths
from appliance.pki import jws
from appliance.pki.identity import Identity
from appliance.pki.image_key import image_key_id
from appliance.pki.trust import verify_receipt, verify_trust
from appliance.protocol import enroll as said
from appliance.protocol import strict_json, tunnel
from appliance.protocol import token as tokens
from appliance.protocol.address import se_number
from appliance.protocol.enroll import Claim, EnrollRequest, Grant, NonceAnswer, Pending, RefreshRequest, Refusals
from appliance.protocol.problem import Problem
from appliance.protocol.seed import Hints
from appliance.protocol.trust import (
    MAX_ROOT_CHANGES,
    MAX_TRUST_BYTES,
    TRUST_PATH,
    Envelope,
    TrustAnswer,
    TrustDocument,
    TrustRequest,
)
from appliance.protocol.why import Step, StepResult
from appliance.runtime import host, log
from appliance.runtime.backoff import Backoff
from appliance.runtime.clock import Clock
from appliance.runtime.stop import StopToken
from appliance.se import enroll, seed
from appliance.se.believed import Beliefs
from appliance.se.enroll import Awaiting, Done, Event, Failed, Phase, Progress, Refused
from appliance.se.given import LOOK_S, GivenFile
from appliance.se.https import JSON, MAX_ANSWER_BYTES, Answer, Conversation, believed_time
from appliance.se.identity import SeState, host_keys
from appliance.settings import Se

MAX_SKEW_TOLD_S = 60.0
"""A larger difference of clocks is told; it decides nothing."""

_HEALTH_STEP = {
    Phase.SEED: Step.BOOT,
    Phase.IDENTITY: Step.BOOT,
    Phase.NONCE: Step.NONCE,
    Phase.ENROLL: Step.GRANT,
    Phase.REJOIN: Step.GRANT,
    Phase.REFRESH: Step.GRANT,
    Phase.STORE: Step.STORED,
}


class Enrollment:
    """One SE's way to its grant. One thread.

    Args:
        paths: for the seed and sshd's host key.
        settings: `[se]`.
        state: identity and grant, on disk.
        beliefs: whom to believe.
        clock: this machine's.
        tell: takes a step of the causal chain: step, result, text, code, hint.
        tell_line: takes the sentence of the state line.
    """

    def __init__(
        self,
        paths: Paths,
        settings: Se,
        *,
        state: SeState,
        beliefs: Beliefs,
        clock: Clock,
        tell: Callable[[Step, StepResult, str, str, str], None],
        tell_line: Callable[[str], None],
    ) -> None:
        self._log = log.bind("enroll")
        self._paths = paths
        self._settings = settings
        self._state = state
        self._beliefs = beliefs
        self._tell = tell
        self._line = tell_line
        self._clock = clock
        self._seed: seed.LoadedSeed | None = None
        self._given = GivenFile(paths.se_state)
        self._token = ""
        """For ENROLL or REJOIN, whichever it is good for."""
        self._protocol = 1
        """What this conversation's controller and this agent both speak."""
        self._rejoin = ""
        """The se_id that a rejoin token names."""
        self._image_key: Identity | None = None
        self._grant: Grant | None = None
        self._conversation: Conversation | None = None
        self._open = contextlib.ExitStack()
        self._turn = 0
        self._told: frozenset[str] = frozenset()

    def first_boot(self, stop: StopToken) -> None:
        """Runs until this SE has a grant on disk, is told to stop, or to be another SE."""
        self._drive(enroll.first_boot, stop)

    def refresh(self, stop: StopToken) -> None:
        """Asks for the grant again until it is on disk, or is told to stop."""
        self._drive(self._start_refresh, stop)

    def _start_refresh(self) -> Progress:
        try:
            loaded = self._load_seed()
            self._seed = loaded if loaded.seed.cluster_id == self._beliefs.current.cluster_id else None
            self._read_token(self._given.read().token or loaded.token)
        except SeedError:
            self._seed = None  # its addresses would be tried too; an enrolled SE needs nothing else of it
        self._image_key = self._state.image_key()
        return enroll.refresh(can_enroll=self._image_key is not None)

    def _drive(self, start: Callable[[], Progress], stop: StopToken) -> None:
        backoff = Backoff(first_s=self._settings.redial_first_s, most_s=self._settings.redial_most_s)
        stamp, progress = self._given.stamp(), start()
        try:
            while progress.phase is not Phase.DONE:
                self._wait(self._wait_s(progress, backoff), stamp, stop)
                if stop.stopped:
                    return
                if self._given.stamp() != stamp:
                    stamp, progress = self._given.stamp(), start()
                    if self._given.read().anew:
                        return  # the daemon starts over, and sets the identity aside before anything else
                    self._log.info("something was given on the console; starting over with it")
                    backoff.reset()
                event = self._attempt(progress, stop)
                if isinstance(event, Awaiting):
                    backoff.reset()
                following = enroll.advance(progress, event)
                self._log.debug("%s: %s, then %s", progress.phase, type(event).__name__, following.phase)
                if following.phase in {Phase.NONCE, Phase.SEED, Phase.DONE}:
                    self._hang_up()
                progress = following
        finally:
            self._hang_up()

    def _wait(self, wait_s: float, stamp: Mapping[str, int], stop: StopToken) -> None:
        """Waits, until stopped or something new is given."""
        until = self._clock.monotonic() + wait_s
        while (left_s := until - self._clock.monotonic()) > 0 and self._given.stamp() == stamp:
            if stop.wait(min(left_s, LOOK_S)):
                return

    def _wait_s(self, progress: Progress, backoff: Backoff) -> float:
        if progress.wait_s is None:
            # Another address is tried at once, a whole round of failures waits.
            if progress.phase is Phase.NONCE and self._turn % max(1, len(self._addresses())):
                return 0.0
            return backoff.next_s()
        return progress.wait_s + backoff.next_s() if progress.wait_s else 0.0

    def _hang_up(self) -> None:
        self._conversation = None
        self._open.close()

    # --- one phase -----------------------------------------------------------------------------------------------

    def _attempt(self, progress: Progress, stop: StopToken) -> Event:
        try:
            return self._do(progress, stop)
        except ApplianceError as error:
            if stop.stopped:
                return Failed()
            step = _HEALTH_STEP[progress.phase]
            if progress.phase is Phase.NONCE and self._conversation is None:
                step = Step.TLS
            self._tell(step, StepResult.FAILED, error.message, error.code, error.hint)
            self._line(f"{progress.phase.value}: {error.message}")
            self._log.warning(
                "%s failed, it will be tried again: %s", progress.phase.value, error.message,
                extra={"code": error.code, "hint": error.hint},
            )  # fmt: skip
            return Failed()

    def _do(self, progress: Progress, stop: StopToken) -> Event:
        match progress.phase:
            case Phase.SEED:
                return self._read_seed()
            case Phase.IDENTITY:
                return self._make_identity()
            case Phase.NONCE:
                return self._get_nonce(stop)
            case Phase.ENROLL:
                return self._ask(said.ENROLL_PATH, self._enroll_request(progress.nonce), by_image_key=True)
            case Phase.REJOIN:
                return self._ask(said.REJOIN_PATH, self._enroll_request(progress.nonce), by_image_key=False)
            case Phase.REFRESH:
                return self._ask(said.REFRESH_PATH, self._refresh_request(progress.nonce), by_image_key=False)
            case _:
                return self._store()

    def _load_seed(self) -> seed.LoadedSeed:
        return seed.load(self._paths, setting=self._settings.seed, given=self._given.read().seed)

    def _read_seed(self) -> Event:
        loaded = self._load_seed()
        for note in sorted(set(loaded.notes) - self._told):
            self._log.warning("%s", note)
        self._told |= set(loaded.notes)
        self._beliefs.start_from_seed(loaded.envelope, loaded.document)
        self._seed = loaded
        self._log.info("seed of cluster %s read from %s", loaded.seed.cluster_id, loaded.source)
        self._read_token(self._given.read().token or loaded.token)
        return Done()

    def _read_token(self, text: str) -> None:
        """Notes the token, and the SE that it lets this one be again; one without form is left out and told."""
        self._token, self._rejoin = "", ""
        if text:
            try:
                self._rejoin = tokens.parse(text).se_id
                self._token = text
            except UsageError as error:
                self._log.warning("the seed's token is left out: %s", error.message)

    def _make_identity(self) -> Event:
        loaded, own = self._seed, self._state.image_key()
        if loaded is not None and loaded.image_key is not None:
            # The seed's goes first: whoever baked a new image key did so because the old one no longer serves.
            if own is None or own.public_line != loaded.image_key.public_line:
                self._state.keep_image_key(loaded.image_key)
            own = loaded.image_key
        self._image_key = own
        record = self._state.record
        if record is None and own is None and not self._rejoin:
            raise EnrollError(
                "this SE has neither an identity nor an image key to get one with; it waits for a rejoin token"
                + "".join(f"; {text}" for text in self._state.set_aside),
                hint="on the controller: appliance token create --rejoin SE; here: appliance enroll --token -, "
                "or attach a seed disk with the token, or with a current image key",
                code="ENROLL-030",
            )
        if record is None or (self._rejoin and record.se_id != self._rejoin):
            self._state.create(image_id=loaded.seed.image_id if loaded else "", se_id=self._rejoin)
            self._log.info("made a key for SE %s", self._state.require().se_id)
        if not host_keys(self._paths):
            raise EnrollError(
                "this SE's sshd has no Ed25519 host key yet; without it the controller couldn't tell it from another",
                hint="ssh-keygen -A; the file is etc/ssh/ssh_host_ed25519_key.pub",
                code="ENROLL-033",
            )
        fingerprint = self._state.identity.thumbprint
        self._tell(Step.BOOT, StepResult.OK, f"SE {self._state.require().se_id}, key {fingerprint}", "", "")
        self._line(f"enrolling, key {fingerprint}")
        return Done(has_image_key=own is not None, rejoins=bool(self._rejoin))

    def _addresses(self) -> list[str]:
        """Pushed, granted, seed and per-VM addresses, each once, in this order."""
        documents = [self._beliefs.current]
        if self._state.grant is not None:
            body = self._state.grant.trust.body()
            documents.append(strict_json.decode(body, TrustDocument, max_bytes=MAX_TRUST_BYTES))
        known = [address for document in documents for node in document.nodes for address in node.enroll]
        return list(dict.fromkeys([*known, *(self._seed.controllers if self._seed else ())]))

    def _get_nonce(self, stop: StopToken) -> Event:
        addresses = self._addresses()
        if not addresses:
            raise EnrollError("no address of a controller is known", hint="bake the seed with one", code="ENROLL-031")
        address = addresses[self._turn % len(addresses)]
        self._turn += 1
        conversation = self._converse(address, stop)
        if conversation.is_of_later_root and self._catch_up(conversation):
            # What it believes from now on may revoke what this connection was verified by.
            self._hang_up()
            conversation = self._converse(address, stop)
        self._tell(Step.TLS, StepResult.OK, f"node {conversation.peer.node} at {address}", "", "")
        self._conversation = conversation
        answer = conversation.post(said.NONCE_PATH, b"", attempt_id=self._state.require().attempt_id)
        if answer.status != 200:
            return self._refused(answer, Step.NONCE)
        spoken = tunnel.agree(answer.protocol)
        if spoken is None:
            raise EnrollError(
                f"the controller speaks protocol {answer.protocol}, this agent "
                f"{tunnel.OLDEST_PROTOCOL_NUMBER} to {tunnel.PROTOCOL_NUMBER}",
                hint="upgrade the older of the two: neighbouring protocol numbers understand each other",
                code=Refusals.PROTOCOL.value.code,
            )
        self._protocol = spoken
        given = strict_json.decode(answer.body, NonceAnswer, max_bytes=MAX_ANSWER_BYTES)
        floor = max(self._seed.seed.baked_at if self._seed else 0, self._beliefs.current.signed_at)
        conversation.check_time(believed_time(clock=self._clock, controller_time=given.time, floor=floor))
        skew_s = self._clock.now() - given.time
        if abs(skew_s) > MAX_SKEW_TOLD_S:
            self._log.warning("this machine's clock is off by %+.0f s from the controller's", skew_s)
        self._tell(Step.NONCE, StepResult.OK, f"from {address}, clock skew {skew_s:+.0f} s", "", "")
        return Done(nonce=given.nonce)

    def _converse(self, address: str, stop: StopToken) -> Conversation:
        return self._open.enter_context(
            Conversation(
                address,
                trust=self._beliefs.current,
                clock=self._clock,
                connect_timeout_s=self._settings.connect_timeout_s,
                stop=stop,
            )
        )

    def _catch_up(self, conversation: Conversation) -> bool:
        """Follows changes of root that this SE slept through, one by one: each document is signed by a root of the one
        before it, and stored before the next is asked for. Returns whether there were any.

        Raises:
            TrustError, MalformedError: a document that doesn't hold; those before it stay in force.
        """
        before = self._beliefs.version
        for _ in range(MAX_ROOT_CHANGES + 1):
            wish = strict_json.encode(TrustRequest(version=self._beliefs.version))
            attempt_id = self._state.require().attempt_id
            answer = conversation.post(TRUST_PATH, wish, attempt_id=attempt_id, media_type=JSON)
            if answer.status != 200:
                break  # an older controller: who missed one change alone gets on without
            following = strict_json.decode(answer.body, TrustAnswer, max_bytes=MAX_ANSWER_BYTES)
            if not self._beliefs.accept(following.trust):
                break
        return self._beliefs.version != before

    def _enroll_request(self, nonce: str) -> EnrollRequest:
        record, loaded = self._state.require(), self._seed
        return EnrollRequest(
            audience=self._beliefs.current.cluster_id,
            nonce=nonce,
            se_id=record.se_id,
            se_key=self._state.identity.public_line,
            host_keys=host_keys(self._paths),
            facts=host.facts(image_digest=record.image_id),
            agent_version=__version__,
            attempt_id=record.attempt_id,
            hints=loaded.hints if loaded else Hints(),
            token=self._token,
            protocol=self._protocol,
        )

    def _refresh_request(self, nonce: str) -> RefreshRequest:
        record = self._state.require()
        return RefreshRequest(
            audience=self._beliefs.current.cluster_id,
            nonce=nonce,
            se_id=record.se_id,
            agent_version=__version__,
            attempt_id=record.attempt_id,
            claim=self._claim(record.grant.receipt) if record.grant else None,
        )

    def _claim(self, receipt: Envelope) -> Claim:
        """What proves this SE to a controller that was restored from a backup older than its enrollment."""
        return Claim(
            receipt=receipt,
            se_key=self._state.identity.public_line,
            host_keys=host_keys(self._paths),
            facts=host.facts(image_digest=self._state.require().image_id),
        )

    def _ask(self, path: str, request: EnrollRequest | RefreshRequest, *, by_image_key: bool) -> Event:
        own = self._state.identity
        signers: list[tuple[Literal["image", "se"], str, Identity]] = [("se", own.thumbprint, own)]
        if by_image_key and self._image_key is not None:
            signers.insert(0, ("image", image_key_id(self._image_key.public_line), self._image_key))
        if self._conversation is None:
            raise EnrollError("no connection to ask on")
        body = jws.sign(strict_json.encode(request), signers)
        answer = self._conversation.post(path, body, attempt_id=request.attempt_id)
        if answer.status in {200, 201}:
            self._grant = self._checked(strict_json.decode(answer.body, Grant, max_bytes=MAX_ANSWER_BYTES))
            self._tell(Step.GRANT, StepResult.OK, f"SE number {self._grant.number}, {self._grant.address}", "", "")
            return Done()
        if answer.status == 202:
            pending = strict_json.decode(answer.body, Pending, max_bytes=MAX_ANSWER_BYTES)
            text = f"an operator must approve this SE; its key is {own.thumbprint}"
            self._tell(
                Step.GRANT, StepResult.WAITING, text, "", f"on the controller: appliance se approve {own.thumbprint}"
            )
            self._line(text)
            if text not in self._told:
                self._told |= {text}
                self._log.info("%s", text)
            return Awaiting(min(max(1.0, pending.retry_after_s), self._settings.retry_most_s))
        return self._refused(answer, Step.GRANT)

    def _refused(self, answer: Answer, step: Step) -> Refused:
        try:
            problem = strict_json.decode(answer.body, Problem, max_bytes=MAX_ANSWER_BYTES)
        except ApplianceError:
            raise EnrollError(
                f"the controller answered HTTP {answer.status} and no reason",
                hint="is that the controller's enroll port (8443)?",
                code="ENROLL-032",
            ) from None
        text = problem.title + (f": {problem.detail}" if problem.detail else "")
        self._tell(step, StepResult.FAILED, text, problem.code, problem.advice)
        self._line(f"refused: {text} ({problem.code})")
        self._log.warning("the controller refused: %s", text, extra={"code": problem.code, "advice": problem.advice})
        retry_after_s = min(max(answer.retry_after_s, float(problem.retry_after_s)), self._settings.retry_most_s)
        return Refused(problem.code, retry_after_s, problem.nonce)

    def _checked(self, grant: Grant) -> Grant:
        """Returns a grant that is for this SE, of this cluster, and whose parts a root signed. Raises `TrustError`."""
        current, record = self._beliefs.current, self._state.require()
        if (grant.cluster_id, grant.se_id) != (current.cluster_id, record.se_id):
            raise TrustError(
                f"grant for SE {grant.se_id!r} of cluster {grant.cluster_id!r}, "
                f"expected {record.se_id!r} of {current.cluster_id!r}"
            )
        if se_number(grant.address) != grant.number:
            raise TrustError(f"grant with address {grant.address!r} for SE number {grant.number}")
        document = verify_trust(grant.trust, anchors=current.roots, current=current)
        roots = list(dict.fromkeys([*current.roots, *document.roots]))
        receipt = verify_receipt(grant.receipt, roots, document.revoked_node_keys)
        expected = (record.se_id, self._state.identity.thumbprint, grant.number)
        if (receipt.se_id, receipt.thumbprint, receipt.number) != expected:
            raise TrustError("the grant's receipt is for another SE, key or number")
        return grant

    def _store(self) -> Event:
        if self._grant is None:
            raise EnrollError("no grant to store")
        self._state.save_grant(self._grant)
        self._beliefs.accept(self._grant.trust)
        self._given.destroy()
        self._tell(Step.STORED, StepResult.OK, f"enrolled as SE number {self._grant.number}", "", "")
        self._line(f"enrolled as SE number {self._grant.number}")
        self._log.info(
            "enrolled as SE number %d, %s", self._grant.number, self._grant.address,
            extra={"se_id": self._grant.se_id, "name": self._grant.name},
        )  # fmt: skip
        return Done()
