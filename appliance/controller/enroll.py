"""Stage enroll on HTTPS 8443: nonce, enroll, refresh, rejoin. Order: rate limit, size, form, signatures, rate limit of
the image key, freshness, table, store, answer.

Nothing is parsed before the rate limit, nothing believed before the signatures. Which key verifies which signature
is decided here: the first by the stored image key its `kid` names, the second by the key inside the payload, whose
fingerprint its `kid` must be. A rejoin has that one alone; what speaks for it is the token in the signed payload.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable

from appliance.controller.admission import Admission, Enrolled
from appliance.controller.attempts import Attempts
from appliance.controller.events import Events
from appliance.controller.hook import EnrollHook, Facts
from appliance.controller.nonce import Nonces
from appliance.controller.rate import KeyRates, Rates
from appliance.controller.receipts import Receipts
from appliance.controller.records import ImageKeyRecord, SeRecord
from appliance.controller.recovery import Recovery
from appliance.controller.registry import Registry
from appliance.controller.trust import Publication
from appliance.controller.web import JSON, Endpoint, ProblemError, Request, Response
from appliance.errors import StorageError, TrustError
from appliance.pki import jws as signatures
from appliance.pki import ssh_keys
from appliance.protocol import enroll as said
from appliance.protocol import jws, seed, strict_json, tunnel
from appliance.protocol.address import se_address
from appliance.protocol.enroll import (
    Claim,
    Decision,
    EnrollRequest,
    Grant,
    Hook,
    NonceAnswer,
    Pending,
    RefreshRequest,
    Refusals,
)
from appliance.protocol.strict_json import MalformedError
from appliance.protocol.trust import TRUST_PATH, TrustAnswer, TrustRequest
from appliance.protocol.why import Step, StepResult

_log = logging.getLogger(__name__)

MAX_HOST_KEYS = 4
PENDING_RETRY_S, PENDING_RETRY_MOST_S = 10, 60
PENDING_ASK_PER_S = 20
"""At most about so many waiting SEs ask in a second."""


class EnrollApi:
    """Answers SEs that have no link yet. One loop only."""

    def __init__(
        self,
        registry: Registry,
        events: Events,
        attempts: Attempts,
        *,
        admission: Admission,
        hook: EnrollHook,
        on_replaced: Callable[[SeRecord], None],
        cluster_id: str,
        epoch: int,
        receipts: Receipts,
        recovery: Recovery,
        trust: Publication,
        nonces: Nonces,
        rates: Rates,
        key_rates: KeyRates,
        interval_s: Callable[[], float],
        may_store: Callable[[], bool],
        wall: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        """`on_replaced` is told of an SE whose key a new one replaced: what the old one holds must end."""
        self._registry = registry
        self._admission = admission
        self._hook = hook
        self._on_replaced = on_replaced
        self._events = events
        self._attempts = attempts
        self._cluster_id = cluster_id
        self._epoch = epoch
        self._receipts = receipts
        self._recovery = recovery
        self._trust = trust
        self._nonces = nonces
        self._rates = rates
        self._key_rates = key_rates
        self._interval_s = interval_s
        self._may_store = may_store
        self._wall = wall
        self._monotonic = monotonic
        self.refusals: Counter[str] = Counter()
        """Refusal code to count, since start."""
        self.granted = 0
        self.draining = False
        """Whether nobody is admitted any more."""

    def count_granted(self) -> None:
        """An SE got its first grant."""
        self.granted += 1

    def endpoints(self) -> list[Endpoint]:
        """The table of this front end."""
        errors = (400, 403, 404, 409, 410, 429, 503)
        return [
            Endpoint("POST", said.NONCE_PATH, self.nonce, "Get a nonce", {200: NonceAnswer}, errors=(400, 429)),
            Endpoint(
                "POST", TRUST_PATH, self.trust, "Get the next trust document", {200: TrustAnswer}, TrustRequest,
                errors=(429,), admit=lambda request: self._limit(request, Step.NONCE),
            ),
            Endpoint(
                "POST", said.ENROLL_PATH, self.enroll, "Enroll", {201: Grant, 202: Pending}, bytes, errors=errors
            ),
            Endpoint(
                "POST", said.REFRESH_PATH, self.refresh, "Get the current grant", {200: Grant, 202: Pending}, bytes,
                errors=errors,
            ),
            Endpoint("POST", said.REJOIN_PATH, self.rejoin, "Take an SE's place", {201: Grant}, bytes, errors=errors),
        ]  # fmt: skip

    # Refusing.

    def _refusal(
        self,
        request: Request,
        refusal: Refusals,
        detail: str = "",
        *,
        step: Step = Step.GRANT,
        said_id: str = "",
        retry_after_s: int = 0,
    ) -> ProblemError:
        source = request.state.source
        self.refusals[refusal.value.code] += 1
        fresh = self._nonces.issue(int(self._wall())) if refusal in {Refusals.NONCE_STALE, Refusals.NONCE_USED} else ""
        if not fresh:
            self._attempts.note(
                source, step, StepResult.FAILED, at=self._wall(), attempt_id=_attempt(request), se_id=said_id,
                code=refusal.value.code, text=f"{refusal.value.title}{': ' + detail if detail else ''}",
                hint=refusal.value.advice,
            )  # fmt: skip
        return ProblemError(refusal.problem(detail=detail, nonce=fresh, retry_after_s=retry_after_s))

    def _limit(self, request: Request, step: Step) -> None:
        if self.draining:
            raise self._refusal(request, Refusals.DRAINING, step=step)
        if not self._rates.allow(request.state.source, self._monotonic()):
            raise self._refusal(request, Refusals.RATE, step=step)

    def _limit_key(self, request: Request, key: ImageKeyRecord, se_id: str) -> None:
        """Before the nonce is used up: who waits as told may bring the same one."""
        wait_s = self._key_rates.wait_s(key.image_key_id, self._monotonic(), rate_per_s=key.rate_per_s, burst=key.burst)
        if wait_s:
            raise self._refusal(
                request, Refusals.IMAGE_KEY_RATE, key.image_key_id, said_id=se_id, retry_after_s=math.ceil(wait_s)
            )

    # The five requests.

    async def nonce(self, request: Request, _body: None) -> Response:
        """A nonce and the controller's time."""
        self._limit(request, Step.NONCE)
        theirs = tunnel.parse_number(request.headers.get(said.PROTOCOL_HEADER, ""))
        if tunnel.agree(theirs) is None:
            ours = f"{tunnel.OLDEST_PROTOCOL_NUMBER} to {tunnel.PROTOCOL_NUMBER}"
            raise self._refusal(request, Refusals.PROTOCOL, f"it speaks {theirs}, this controller {ours}")
        now = int(self._wall())
        self._attempts.note(
            request.state.source, Step.NONCE, StepResult.OK, at=self._wall(), attempt_id=_attempt(request),
            text="nonce handed out",
        )  # fmt: skip
        answer = NonceAnswer(nonce=self._nonces.issue(now), time=now)
        # In a header: an older agent refuses an answer with a field that it doesn't know.
        headers = {said.PROTOCOL_HEADER: str(tunnel.PROTOCOL_NUMBER)}
        return Response(strict_json.encode(answer), media_type=JSON, headers=headers)

    async def trust(self, _request: Request, wish: TrustRequest) -> TrustAnswer:
        """What an SE that slept through changes of root needs to believe this controller: no secret, and unsigned."""
        return TrustAnswer(trust=self._trust.following(wish.version))

    async def enroll(self, request: Request, raw: bytes) -> tuple[int, Grant | Pending]:
        """The one request that an image key may sign."""
        self._limit(request, Step.GRANT)
        if not self._may_store():
            raise self._refusal(request, Refusals.UNAVAILABLE, "the disk is nearly full")
        try:
            signed = jws.parse(raw, types=("image", "se"))
            # The payload is needed to find the second key; until both signatures hold it decides nothing.
            wish = strict_json.decode(signed.payload, EnrollRequest, max_bytes=said.MAX_REQUEST_BYTES)
            check_request(wish)
        except MalformedError as error:
            raise self._refusal(request, Refusals.MALFORMED, error.message) from None
        if tunnel.agree(wish.protocol) is None:
            raise self._refusal(request, Refusals.PROTOCOL, f"it speaks {wish.protocol}")
        by_image, by_se = signed.signatures
        image_key = self._registry.image_key(by_image.header.kid)
        if image_key is None:
            raise self._refusal(request, Refusals.IMAGE_KEY_UNKNOWN, by_image.header.kid)
        thumbprint = ssh_keys.fingerprint(wish.se_key)
        if by_se.header.kid != thumbprint:
            raise self._refusal(request, Refusals.MALFORMED, "the second kid is not the fingerprint of the SE's key")
        if image_key.public_key == wish.se_key:
            raise self._refusal(request, Refusals.KEY_IN_USE, "one key in both roles")
        if not signatures.verify(by_image, image_key.public_key):
            raise self._refusal(request, Refusals.SIGNATURE, "by the image key")
        if not signatures.verify(by_se, wish.se_key):
            raise self._refusal(request, Refusals.SIGNATURE, "by the SE's key")
        self._limit_key(request, image_key, wish.se_id)
        self._check_freshness(request, wish.audience, wish.nonce)
        outcome = await self._decided(request, wish, thumbprint, image_key.image_key_id)
        if outcome.verdict.decision is Decision.ASK_HOOK:
            if self._hook.is_busy:
                raise self._refusal(request, Refusals.UNAVAILABLE, "the enroll hook is busy", said_id=wish.se_id)
            word = await self._hook.ask(_facts(wish, thumbprint, image_key.image_key_id, request.state.source))
            outcome = await self._decided(request, wish, thumbprint, image_key.image_key_id, hook=word)
        record = self._accepted(request, wish, outcome)
        return self._answer(request, record, wish.attempt_id, 201, again=not outcome.is_new)

    async def rejoin(self, request: Request, raw: bytes) -> tuple[int, Grant]:
        """A new key for an SE that lost its state: a rejoin token stands in for the image key."""
        self._limit(request, Step.GRANT)
        if not self._may_store():
            raise self._refusal(request, Refusals.UNAVAILABLE, "the disk is nearly full")
        try:
            signed = jws.parse(raw, types=("se",))
            wish = strict_json.decode(signed.payload, EnrollRequest, max_bytes=said.MAX_REQUEST_BYTES)
            check_request(wish)
        except MalformedError as error:
            raise self._refusal(request, Refusals.MALFORMED, error.message) from None
        (by_se,) = signed.signatures
        thumbprint = ssh_keys.fingerprint(wish.se_key)
        if by_se.header.kid != thumbprint:
            raise self._refusal(request, Refusals.MALFORMED, "the kid is not the fingerprint of the SE's key")
        if not signatures.verify(by_se, wish.se_key):
            raise self._refusal(request, Refusals.SIGNATURE, "by the SE's key")
        self._check_freshness(request, wish.audience, wish.nonce)
        try:
            outcome = await self._admission.rejoin(wish, thumbprint=thumbprint, source=request.state.source)
        except StorageError as error:
            raise self._not_stored(request, wish, error) from None
        record = self._accepted(request, wish, outcome)
        if outcome.is_new:
            self._on_replaced(record)
            text = f"{record.name} (number {record.number}) came back from {record.source} with a new key: {thumbprint}"
            self._events.emit("enroll", "enroll.rejoined", record.se_id, text)
        return 201, self._granted(request, record, wish.attempt_id, f"number {record.number} for a new key")

    async def _decided(
        self, request: Request, wish: EnrollRequest, thumbprint: str, image_key_id: str, *, hook: Hook | None = None
    ) -> Enrolled:
        try:
            return await self._admission.enroll(
                wish, thumbprint=thumbprint, image_key_id=image_key_id, source=request.state.source, hook=hook
            )
        except StorageError as error:
            raise self._not_stored(request, wish, error) from None

    def _not_stored(self, request: Request, wish: EnrollRequest | RefreshRequest, error: StorageError) -> ProblemError:
        _log.error("could not store an enrollment: %s", error.message, extra={"stage": "enroll"})
        return self._refusal(request, Refusals.UNAVAILABLE, error.message, said_id=wish.se_id)

    def _accepted(self, request: Request, wish: EnrollRequest | RefreshRequest, outcome: Enrolled) -> SeRecord:
        """Returns the record to answer with. Raises the refusal where there is none."""
        if outcome.record is not None:
            return outcome.record
        refusal = outcome.verdict.refusal or Refusals.MALFORMED
        if outcome.is_told:
            text = f"refused {wish.se_id} from {request.state.source}: {refusal.value.title}"
            self._events.emit("enroll", "enroll.refused", wish.se_id, text)
        raise self._refusal(request, refusal, said_id=wish.se_id)

    async def refresh(self, request: Request, raw: bytes) -> tuple[int, Grant | Pending]:
        """The current grant, for an SE that is enrolled already: its own key is enough.

        After a restore, one that isn't known, or not as approved, may show its receipt with it.
        """
        self._limit(request, Step.GRANT)
        try:
            signed = jws.parse(raw, types=("se",))
            wish = strict_json.decode(signed.payload, RefreshRequest, max_bytes=said.MAX_REQUEST_BYTES)
        except MalformedError as error:
            raise self._refusal(request, Refusals.MALFORMED, error.message) from None
        (by_se,) = signed.signatures
        record = self._registry.se_by_key(by_se.header.kid)
        if self._recovery.is_active and wish.claim is not None and _is_claim(record, wish):
            return await self._claimed(request, wish, wish.claim, by_se)
        if record is None or record.se_id != wish.se_id:
            raise self._refusal(request, Refusals.SE_UNKNOWN, said_id=wish.se_id)
        if not signatures.verify(by_se, record.se_key):
            raise self._refusal(request, Refusals.SIGNATURE, "by the SE's key", said_id=wish.se_id)
        self._check_freshness(request, wish.audience, wish.nonce)
        verdict = said.decide_refresh(record.known)
        if verdict.refusal is not None:
            raise self._refusal(request, verdict.refusal, said_id=wish.se_id)
        return self._answer(request, record, wish.attempt_id, 200, again=True)

    async def _claimed(
        self, request: Request, wish: RefreshRequest, claim: Claim, by_se: jws.Signature
    ) -> tuple[int, Grant | Pending]:
        """An SE that shows its receipt to this restored controller: it waits for approval under its old number."""
        try:
            check_claim(wish, claim)
            thumbprint = ssh_keys.fingerprint(claim.se_key)
        except MalformedError as error:
            raise self._refusal(request, Refusals.MALFORMED, error.message, said_id=wish.se_id) from None
        if by_se.header.kid != thumbprint or not signatures.verify(by_se, claim.se_key):
            raise self._refusal(request, Refusals.SIGNATURE, "by the SE's key", said_id=wish.se_id)
        self._check_freshness(request, wish.audience, wish.nonce)
        if not self._may_store():
            raise self._refusal(request, Refusals.UNAVAILABLE, "the disk is nearly full", said_id=wish.se_id)
        try:
            receipt = self._receipts.check(claim.receipt)
        except (TrustError, MalformedError) as error:
            raise self._refusal(request, Refusals.RECEIPT, error.message, said_id=wish.se_id) from None
        try:
            outcome = await self._recovery.claim(
                wish, receipt, thumbprint=thumbprint, source=request.state.source, epoch=self._epoch
            )
        except StorageError as error:
            raise self._not_stored(request, wish, error) from None
        record = self._accepted(request, wish, outcome)
        if outcome.is_new:
            self._on_replaced(record)
        return self._answer(request, record, wish.attempt_id, 200, again=not outcome.is_new)

    def _check_freshness(self, request: Request, audience: str, nonce: str) -> None:
        if audience != self._cluster_id:
            raise self._refusal(request, Refusals.AUDIENCE, f"it names {audience[:64]}, this is {self._cluster_id}")
        now = int(self._wall())
        if not self._nonces.is_fresh(nonce, now):
            raise self._refusal(request, Refusals.NONCE_STALE)
        if not self._nonces.use(nonce, now):
            raise self._refusal(request, Refusals.NONCE_USED)

    def _answer(
        self, request: Request, record: SeRecord, attempt_id: str, status: int, *, again: bool
    ) -> tuple[int, Grant | Pending]:
        source = request.state.source
        if record.status is said.SeStatus.PENDING:
            text = f"waits for approval, fingerprint {record.thumbprint}"
            self._attempts.note(
                source, Step.GRANT, StepResult.WAITING, at=self._wall(), attempt_id=attempt_id, se_id=record.se_id,
                text=text, hint=f"compare it with the VM's console, then: appliance se approve {record.number}",
            )  # fmt: skip
            if not again:
                text = f"{record.name} (number {record.number}) from {source} waits for approval: {record.thumbprint}"
                self._events.emit("enroll", "enroll.pending", record.se_id, text)
            waiting = sum(1 for entry in self._registry.ses() if entry.status is said.SeStatus.PENDING)
            retry_s = min(max(PENDING_RETRY_S, waiting // PENDING_ASK_PER_S), PENDING_RETRY_MOST_S)
            return 202, Pending(se_id=record.se_id, fingerprint=record.thumbprint, retry_after_s=retry_s)
        if not again:
            self.count_granted()
            text = f"{record.name} enrolled as number {record.number} from {source}, image key {record.image_key_id}"
            self._events.emit("enroll", "enroll.granted", record.se_id, text)
        text = "the same grant again" if again else f"number {record.number} granted"
        return status, self._granted(request, record, attempt_id, text)

    def _granted(self, request: Request, record: SeRecord, attempt_id: str, text: str) -> Grant:
        self._attempts.note(
            request.state.source, Step.GRANT, StepResult.OK, at=self._wall(), attempt_id=attempt_id,
            se_id=record.se_id, text=text,
        )  # fmt: skip
        return self.grant(record)

    def grant(self, record: SeRecord) -> Grant:
        """An SE's grant as it stands now, with a receipt signed for it."""
        return Grant(
            cluster_id=self._cluster_id,
            se_id=record.se_id,
            name=record.name,
            number=record.number,
            address=se_address(record.number),
            trust=self._trust.envelope,
            receipt=self._receipts.sign(record),
            heartbeat_interval_s=self._interval_s(),
        )


def _facts(wish: EnrollRequest, thumbprint: str, image_key_id: str, source: str) -> Facts:
    return Facts(
        se_id=wish.se_id,
        fingerprint=thumbprint,
        image_key_id=image_key_id,
        source=source,
        name=wish.hints.name,
        labels=wish.hints.labels,
        facts=wish.facts,
        agent_version=wish.agent_version,
    )


def _attempt(request: Request) -> str:
    text = request.headers.get(said.ATTEMPT_HEADER, "")
    return text if said.is_attempt_id(text) else ""


def _is_claim(record: SeRecord | None, wish: RefreshRequest) -> bool:
    """Whether a receipt says more than the store: of an SE that isn't known by its key, or waits for approval."""
    if record is None or record.se_id != wish.se_id:
        return True
    return record.status is said.SeStatus.PENDING and not record.receipt_epoch


def check_claim(wish: RefreshRequest, claim: Claim) -> None:
    """Refuses a claim whose fields don't hold, as `check_request` does. Raises `MalformedError`."""
    check_request(
        EnrollRequest(
            audience=wish.audience,
            nonce=wish.nonce,
            se_id=wish.se_id,
            se_key=claim.se_key,
            host_keys=claim.host_keys,
            facts=claim.facts,
            agent_version=wish.agent_version,
            attempt_id=wish.attempt_id,
        )
    )


def check_request(wish: EnrollRequest) -> None:
    """Refuses an enrollment whose fields don't hold, each by name. Raises `MalformedError`."""
    if not said.is_se_id(wish.se_id):
        raise MalformedError("se_id is no random UUID in canonical form")
    if not said.is_attempt_id(wish.attempt_id):
        raise MalformedError("attempt_id is no 16 hex digits")
    if not 1 <= len(wish.host_keys) <= MAX_HOST_KEYS:
        raise MalformedError(f"{len(wish.host_keys)} host keys, 1 to {MAX_HOST_KEYS} expected")
    if len(wish.token) > said.MAX_FACT_CHARS:
        raise MalformedError(f"the token is longer than {said.MAX_FACT_CHARS} characters")
    if problems := [*said.check_facts(wish.facts, wish.agent_version), *seed.check_hints(wish.hints)]:
        raise MalformedError(problems[0])
    for line in (wish.se_key, *wish.host_keys):
        try:
            ssh_keys.parse_public(line)
        except TrustError as error:
            raise MalformedError(error.message) from None
    if wish.se_key in wish.host_keys:
        raise MalformedError("the SE's key is also its sshd's host key")
