"""Who becomes an SE, in whose place, and what operators change about it: one store transaction each, with its audit.

The tables decide (`protocol.enroll`, `protocol.token`, `protocol.standing`); this module looks up what they ask for
and writes what follows. A request that is accepted takes a use of its image key, and the token where it brought a good
one (an open image key asks for none and takes none); both are free again when it is rejected, deleted before it was
approved, or lapses. An SE that an operator lets in after all counts as a use too, even as one above the maximum: a
person decided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from appliance.controller.rate import Rates
from appliance.controller.records import ImageKeyRecord, Record, SeRecord, TokenRecord
from appliance.controller.registry import Registry
from appliance.errors import NotFoundError
from appliance.protocol import token as tokens
from appliance.protocol.address import MAX_SE_NUMBER
from appliance.protocol.enroll import (
    Decision,
    EnrollRequest,
    Evidence,
    Hook,
    InstanceFacts,
    Policy,
    Refusals,
    SeStatus,
    Verdict,
    decide,
    decide_rejoin,
)
from appliance.protocol.standing import Act, act

_AUDITED = {Refusals.CONFLICT, Refusals.CLONED_KEY}
"""Neither can be had without an image key, a token, or the key of an SE; strangers' refusals are only counted."""
AUDITED_REFUSALS_PER_H = 100
"""And one an hour for each se_id: an image key opens the door to asking, it must not fill the audit."""
_VERBS = {
    Act.APPROVE: "approved",
    Act.REJECT: "rejected",
    Act.REVOKE: "revoked",
    Act.REINSTATE: "reinstated",
    Act.DELETE: "deleted",
}


class Enrolled(NamedTuple):
    """Outcome of a request: the verdict, and the SE's record where there is something to answer with."""

    verdict: Verdict
    record: SeRecord | None
    is_new: bool = False
    """Whether this request made the record."""
    is_told: bool = False
    """Whether a refusal went into the audit; of a flood of them only some do."""


class Acted(NamedTuple):
    """Outcome of an operator's act: the record as it is now, and whether that changed anything."""

    record: SeRecord
    changed: bool


def _refused(refusal: Refusals) -> Enrolled:
    return Enrolled(Verdict(Decision.REFUSE, refusal), None)


class Admission:
    """The door. One loop only."""

    def __init__(self, registry: Registry, *, pending_life_s: float, wall: Callable[[], float]) -> None:
        """`pending_life_s` is how long a request waits for approval before it lapses."""
        self._registry = registry
        self._pending_life_s = pending_life_s
        self._wall = wall
        # Half of them at once: what comes again while an hour passes is the other half.
        self._refusals = Rates(
            rate_per_s=AUDITED_REFUSALS_PER_H / 2 / 3600,
            burst=AUDITED_REFUSALS_PER_H // 2,
            source_rate_per_s=1 / 3600,
            source_burst=1,
            now=wall(),
        )

    # What SEs ask for.

    async def enroll(
        self, request: EnrollRequest, *, thumbprint: str, image_key_id: str, source: str, hook: Hook | None = None
    ) -> Enrolled:
        """Decides about a request whose signatures were verified, and stores the outcome.

        ASK_HOOK stores nothing: the caller asks the hook, which takes its time, and comes again with its word.

        Raises:
            StoreError: nothing was stored; the SE should try again.
        """
        async with self._registry.turn():
            return await self._enroll(request, thumbprint, image_key_id, source, hook)

    async def _enroll(
        self, request: EnrollRequest, thumbprint: str, image_key_id: str, source: str, hook: Hook | None
    ) -> Enrolled:
        registry, now = self._registry, self._wall()
        if registry.is_reserved(thumbprint):
            return _refused(Refusals.KEY_IN_USE)
        unused, nonce = await registry.nonce_used(request.nonce, now)
        key, existing, by_key = (
            self._image_key(image_key_id), registry.se(request.se_id), registry.se_by_key(thumbprint)
        )  # fmt: skip
        token, fault = self._judge(request, image_key_id=image_key_id)
        image = registry.image(request.facts.image_digest)
        verdict = decide(
            request.se_id,
            thumbprint,
            by_id=existing.known if existing else None,
            by_key=by_key.known if by_key else None,
            terms=key.terms,
            source=source,
            now=int(now),
            evidence=Evidence(fault, hook, image_revoked=image is not None and image.revoked_at > 0),
        )
        if verdict.decision is Decision.ASK_HOOK:
            return Enrolled(verdict, None)
        if verdict.refusal is not None:
            return await self._note_refusal(request, verdict.refusal, source)
        if existing is not None:
            await registry.use_nonce(request.nonce)
            return Enrolled(verdict, existing)
        if registry.next_number > MAX_SE_NUMBER:
            return _refused(Refusals.NUMBERS)
        granted = verdict.decision is Decision.GRANT_NEW
        number = registry.next_number
        record = SeRecord(
            se_id=request.se_id,
            number=number,
            name=request.hints.name or f"se-{number}",
            labels=request.hints.labels,
            se_key=request.se_key,
            thumbprint=thumbprint,
            host_keys=request.host_keys,
            image_key_id=image_key_id,
            status=SeStatus.ENROLLED if granted else SeStatus.PENDING,
            enrolled_at=now,
            source=source,
            facts=request.facts,
            agent_version=request.agent_version,
            attempt_id=request.attempt_id,
            token=token.digest if token else "",
        )
        number_is_ours, number_after = registry.next_number_taken()
        detail = f"number {number}, image key {image_key_id}, key {thumbprint}"
        await registry.commit(
            record,
            _used(key, 1),
            *([_taken(token, record.se_id, now)] if token else []),
            compares=[unused, number_is_ours],
            writes=[nonce, number_after],
            actor=f"se {source}",
            action="enroll.granted" if granted else "enroll.pending",
            subject=record.se_id,
            detail=detail + (f", token {tokens.token_id(token.digest)}" if token else ""),
        )
        registry.next_number = number + 1
        return Enrolled(verdict, record, is_new=True)

    async def rejoin(self, request: EnrollRequest, *, thumbprint: str, source: str) -> Enrolled:
        """Lets a new key take the place of an SE's old one, by a rejoin token. Raises as `enroll`.

        Name, labels, number and image key stay; tickets, facts, host keys and the confirmed hello are the new
        machine's. The caller closes the links that the old key holds.
        """
        registry = self._registry
        async with registry.turn(request.se_id):
            now = self._wall()
            if registry.is_reserved(thumbprint):
                return _refused(Refusals.KEY_IN_USE)
            unused, nonce = await registry.nonce_used(request.nonce, now)
            existing, by_key = registry.se(request.se_id), registry.se_by_key(thumbprint)
            token, fault = self._judge(request, image_key_id="")
            verdict = decide_rejoin(
                request.se_id,
                thumbprint,
                by_id=existing.known if existing else None,
                by_key=by_key.known if by_key else None,
                token=fault,
            )
            if verdict.refusal is not None:
                return await self._note_refusal(request, verdict.refusal, source)
            if existing is None or token is None or verdict.decision is not Decision.REPLACE_KEY:
                await registry.use_nonce(request.nonce)
                return Enrolled(verdict, existing)
            record = msgspec.structs.replace(
                existing,
                se_key=request.se_key,
                thumbprint=thumbprint,
                host_keys=request.host_keys,
                enrolled_at=now,
                confirmed_at=0.0,
                source=source,
                facts=request.facts,
                seen_facts=InstanceFacts(),
                agent_version=request.agent_version,
                attempt_id=request.attempt_id,
                ticket="",
                ticket_pending="",
                ticket_superseded="",
                token=token.digest,
            )
            await registry.commit(
                record,
                _taken(token, record.se_id, now),
                compares=[unused],
                writes=[nonce],
                actor=f"se {source}",
                action="enroll.rejoined",
                subject=record.se_id,
                detail=f"key {thumbprint} for {existing.thumbprint}, token {tokens.token_id(token.digest)}",
            )
            return Enrolled(verdict, record, is_new=True)

    async def _note_refusal(self, request: EnrollRequest, refusal: Refusals, source: str) -> Enrolled:
        is_told = refusal in _AUDITED and self._refusals.allow(request.se_id, self._wall())
        if is_told:
            unused, nonce = await self._registry.nonce_used(request.nonce, self._wall())
            await self._registry.commit(
                compares=[unused], writes=[nonce], actor=f"se {source}", action="enroll.refused",
                subject=request.se_id, detail=refusal.value.code,
            )  # fmt: skip
        return _refused(refusal)._replace(is_told=is_told)

    def _judge(self, request: EnrollRequest, *, image_key_id: str) -> tuple[TokenRecord | None, Refusals | None]:
        """Returns the token that a request brings where it is good, else why it isn't."""
        key = self._registry.image_key(image_key_id)
        if not request.token or (key is not None and key.policy is Policy.OPEN):
            return None, Refusals.TOKEN_MISSING
        found = self._registry.token(tokens.digest(request.token))
        fault = tokens.judge(
            found.terms if found else None,
            image_key_id=image_key_id,
            se_id="" if image_key_id else request.se_id,
            instance_id=request.facts.instance_id,
            now=int(self._wall()),
        )
        return (None if fault else found), fault

    def _image_key(self, image_key_id: str) -> ImageKeyRecord:
        key = self._registry.image_key(image_key_id)
        if key is None:
            raise NotFoundError(f"no image key {image_key_id!r} is known", hint="see `appliance image-key list`")
        return key

    # What operators do, and what time does.

    async def act(self, se_id: str, doing: Act, *, actor: str, reason: str) -> Acted:
        """Does what an operator wants with an SE as it stands now. The caller closes its links where it must.

        Raises:
            NotFoundError: there is no such SE (any more).
            UsageError: that can't be done to an SE of its status.
            StoreError: as `enroll`.
        """
        async with self._registry.turn(se_id):
            record = self._registry.se(se_id)
            if record is None:
                raise NotFoundError(f"no SE {se_id!r} is known", hint="see `appliance se list`")
            status, now = act(doing, record.status), self._wall()
            if status is record.status:
                return Acted(record, changed=False)
            changed = msgspec.structs.replace(record, status=status, status_reason=reason, status_at=now)
            also: list[Record] = []
            if doing is Act.APPROVE or status is SeStatus.PENDING:
                # It is enrolled, or asks anew, from now: so says its receipt, and from now its request lapses.
                changed = msgspec.structs.replace(changed, enrolled_at=now)
            if record.status is SeStatus.PENDING and status is not SeStatus.ENROLLED:
                changed, also = self._freed(changed)
            elif status is SeStatus.PENDING:
                also = self._uses(record, 1)
            detail = f"{reason}; {record.thumbprint}" if doing is Act.APPROVE else reason
            await self._registry.commit(
                changed, *also, actor=actor, action=f"se.{_VERBS[doing]}", subject=se_id, detail=detail
            )
            return Acted(changed, changed=True)

    def _freed(self, record: SeRecord) -> tuple[SeRecord, list[Record]]:
        """Returns `record` without what its request took, and what it took as it is free again."""
        freed = self._uses(record, -1)
        token = self._registry.token(record.token) if record.token else None
        if token is not None:
            freed.append(msgspec.structs.replace(token, taken_by="", taken_at=0))
        return msgspec.structs.replace(record, token=""), freed

    def _uses(self, record: SeRecord, times: int) -> list[Record]:
        """An SE's image key with so many uses more; nothing where it was made after the backup of a restored node."""
        key = self._registry.image_key(record.image_key_id)
        return [_used(key, times)] if key else []

    async def lapse(self) -> list[SeRecord]:
        """Forgets requests that waited too long; an SE that still lives asks anew. Returns them. Raises as `enroll`."""
        lapsed = []
        for record in self._registry.ses():
            if record.status is SeStatus.PENDING and self._is_over(record):
                async with self._registry.turn(record.se_id):
                    now_kept = self._registry.se(record.se_id)
                    if now_kept is None or now_kept.status is not SeStatus.PENDING or not self._is_over(now_kept):
                        continue
                    _, freed = self._freed(now_kept)
                    await self._registry.commit(
                        *freed, forgotten=now_kept, actor="controller", action="enroll.lapsed",
                        subject=now_kept.se_id, detail=f"number {now_kept.number}, nobody approved it in time",
                    )  # fmt: skip
                lapsed.append(now_kept)
        return lapsed

    def _is_over(self, record: SeRecord) -> bool:
        return self._wall() - record.enrolled_at >= self._pending_life_s

    def lapses_at(self, record: SeRecord) -> float:
        """When a request lapses, seconds since 1970."""
        return record.enrolled_at + self._pending_life_s


def _used(key: ImageKeyRecord, times: int) -> ImageKeyRecord:
    return msgspec.structs.replace(key, uses=max(0, key.uses + times))


def _taken(token: TokenRecord, se_id: str, now: float) -> TokenRecord:
    return msgspec.structs.replace(token, taken_by=se_id, taken_at=int(now))
