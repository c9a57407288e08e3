"""RECOVERY: what a controller restored from a backup does until an operator says that all is found again.

What happened between the backup and the restore is unknown to it: SEs that enrolled, were approved or got new keys,
and SEs, image keys and tokens that were revoked. SEs that it doesn't know show their receipts (`protocol.receipt`) and
wait for approval under their old number. Numbers of new SEs begin far above those that can have been given out; a
receipt beyond even that moves them on. What was revoked can't be known, and is told as a warning.

The record is made by `controller.restore`, in the store; `begin` opens RECOVERY again for SEs that come late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from appliance.controller import records
from appliance.controller.admission import Enrolled
from appliance.controller.records import Record, SeRecord
from appliance.controller.registry import Registry
from appliance.controller.store.port import Compare, Op, Put, Store
from appliance.errors import UsageError
from appliance.protocol.address import MAX_SE_NUMBER
from appliance.protocol.enroll import Decision, RefreshRequest, Refusals, SeStatus, Verdict
from appliance.protocol.receipt import SKIPPED_NUMBERS, judge
from appliance.protocol.trust import AuditHead, Receipt
from appliance.protocol.tunnel import UNKNOWN_TICKET

RECOVERY = "recovery"
"""Key in the store."""


MAX_STRANGERS = 64


class RecoveryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The newest restore. Times are seconds since 1970."""

    epoch: int
    began_at: float
    backup_made_at: float
    backup_epoch: int
    numbers_known: int
    """The next number by the backup."""
    numbers_from: int
    """The first number that was given to a new SE after the restore."""
    tokens_withdrawn: int
    """Tokens that nobody had used by the backup; somebody may have since."""
    audit_sequence: int
    """Of the backup's newest audit entry."""
    trust_version: int = 0
    """Of the backup's trust document."""
    ended_at: float = 0.0


class Recovery:
    """RECOVERY of one controller node. One loop only; `load` first."""

    def __init__(self, registry: Registry, store: Store, *, wall: Callable[[], float]) -> None:
        self._registry = registry
        self._store = store
        self._wall = wall
        self.record: RecoveryRecord | None = None
        self.lost_audit = 0
        """The newest entry before the restore that a witness remembers and the backup did not have."""
        self._seen_trust = 0
        """The newest version of the trust document before the restore that an SE had and the backup did not."""
        self._strangers: set[str] = set()
        """Names of SEs, or source addresses, that showed to know another root than this controller."""

    async def load(self) -> None:
        """Reads the record. Raises `StoreError`."""
        found = await self._store.get(RECOVERY)
        self.record = records.decode(found.value, RecoveryRecord, found.key) if found else None

    @property
    def is_active(self) -> bool:
        """Whether receipts are taken."""
        return self.record is not None and not self.record.ended_at

    def waiting(self) -> list[SeRecord]:
        """SEs that hold receipts and wait for approval."""
        return [record for record in self._registry.ses() if record.status is SeStatus.PENDING and record.receipt_epoch]

    def head_lost(self, head: AuditHead) -> None:
        """A witness showed a head from before the restore that the backup did not have."""
        self.lost_audit = max(self.lost_audit, head.sequence)

    # What tells that the backup was too old: nothing is decided by it, since anybody can say it.

    def trust_shown(self, version: int) -> None:
        """An SE said which version of the trust document it had when it came."""
        if self.record is not None and self.record.trust_version < version < self.record.epoch:
            self._seen_trust = max(self._seen_trust, version)

    def root_unknown(self, who: str) -> None:
        """Somebody doesn't believe this controller's root, or shows what a root signed that isn't known here."""
        if self.is_active and len(self._strangers) < MAX_STRANGERS:
            self._strangers.add(who)

    # What SEs ask for.

    async def claim(
        self, request: RefreshRequest, receipt: Receipt, *, thumbprint: str, source: str, epoch: int
    ) -> Enrolled:
        """Judges a receipt whose signature, and that of the SE's key, were verified; holds the SE for approval.

        Raises:
            StoreError: nothing was stored; the SE should try again.
        """
        registry, claim = self._registry, request.claim
        if claim is None:
            return _refused(Refusals.SE_UNKNOWN)
        async with registry.turn(request.se_id):
            if registry.is_reserved(thumbprint):
                return _refused(Refusals.KEY_IN_USE)
            known, by_key = registry.se(request.se_id), registry.se_by_key(thumbprint)
            refusal = judge(
                receipt,
                request.se_id,
                thumbprint,
                epoch=epoch,
                by_id=known.known if known else None,
                since=int(known.key_since) if known else 0,
                by_key=by_key.known if by_key else None,
            )
            if refusal is not None:
                return _refused(refusal)
            if known is not None and known.receipt_epoch and known.thumbprint == thumbprint:
                return Enrolled(Verdict(Decision.PENDING), known)
            holder = registry.se_by_number(receipt.number)
            number, fault = known.number if known else receipt.number, ""
            checks, writes, next_number = self._numbers(receipt.number)
            if known is None and holder is not None:
                if next_number > MAX_SE_NUMBER:
                    return _refused(Refusals.NUMBERS)
                number, fault = next_number, f"its number {receipt.number} is {holder.name}'s by now"
                next_number += 1
                checks, writes = self._next_number(next_number)
            record = self._held(known, request, receipt, number=number, fault=fault, source=source)
            also: list[Record] = []
            key = registry.image_key(receipt.image_key_id)
            if known is None and key is not None:
                also.append(msgspec.structs.replace(key, uses=key.uses + 1))
            detail = f"number {number}, receipt of epoch {receipt.epoch} for number {receipt.number}, key {thumbprint}"
            await registry.commit(
                record, *also, compares=checks, writes=writes, actor=f"se {source}", action="enroll.receipt",
                subject=record.se_id, detail=f"{detail}; {fault}" if fault else detail,
            )  # fmt: skip
            registry.next_number = max(registry.next_number, next_number)
            return Enrolled(Verdict(Decision.PENDING), record, is_new=True)

    def _held(
        self, known: SeRecord | None, request: RefreshRequest, receipt: Receipt, *, number: int, fault: str, source: str
    ) -> SeRecord:
        claim, now = request.claim, self._wall()
        if claim is None:
            raise UsageError("a request without a claim")
        fields = {
            "status": SeStatus.PENDING,
            "enrolled_at": now,
            "source": source,
            "se_key": claim.se_key,
            "thumbprint": receipt.thumbprint,
            "host_keys": claim.host_keys,
            "attempt_id": request.attempt_id,
            "agent_version": request.agent_version,
            "ticket": UNKNOWN_TICKET,
            "ticket_pending": "",
            "ticket_superseded": "",
            "receipt_epoch": receipt.epoch,
            "receipt_fault": fault,
        }
        if known is not None:
            return msgspec.structs.replace(known, **fields)
        return SeRecord(
            se_id=request.se_id,
            number=number,
            name=receipt.name or f"se-{number}",
            labels=receipt.labels,
            image_key_id=receipt.image_key_id,
            facts=claim.facts,
            **fields,  # type: ignore[arg-type]
        )

    def _next_number(self, after: int) -> tuple[list[Compare], list[Op]]:
        unchanged, _ = self._registry.next_number_taken()
        return [unchanged], [Put(records.NUMBER_NEXT, str(after).encode())]

    def _numbers(self, shown: int) -> tuple[list[Compare], list[Op], int]:
        """What makes new numbers begin far above one that a receipt shows, where they don't yet."""
        if shown < self._registry.next_number:
            return [], [], self._registry.next_number
        after = min(shown + SKIPPED_NUMBERS, MAX_SE_NUMBER + 1)
        return *self._next_number(after), after

    # What operators do.

    def approvable(self) -> Iterator[SeRecord]:
        """Those who wait and whose receipts hold without a reservation."""
        return (record for record in self.waiting() if not record.receipt_fault)

    async def end(self, *, actor: str, reason: str) -> None:
        """Takes no receipts any more. Raises `UsageError` where none are taken, `StoreError`."""
        if not self.is_active:
            raise UsageError("this controller is not in RECOVERY", hint="nothing was changed")
        await self._store_record(ended_at=self._wall(), actor=actor, action="recovery.ended", reason=reason)

    async def begin(self, *, actor: str, reason: str) -> None:
        """Takes receipts again. Raises `UsageError` where it was never restored or does so already, `StoreError`."""
        if self.record is None:
            raise UsageError(
                "this controller was not restored from a backup: it knows every SE that it ever enrolled",
                hint="an SE that is unknown here belongs to another cluster, or was never enrolled",
            )
        if self.is_active:
            raise UsageError("this controller is in RECOVERY already", hint="nothing was changed")
        await self._store_record(ended_at=0.0, actor=actor, action="recovery.begun", reason=reason)

    async def _store_record(self, *, ended_at: float, actor: str, action: str, reason: str) -> None:
        if self.record is None:
            raise UsageError("this controller was not restored from a backup", hint="nothing was changed")
        changed = msgspec.structs.replace(self.record, ended_at=ended_at)
        async with self._registry.turn():
            await self._registry.commit(
                writes=[Put(RECOVERY, records.encode(changed))], actor=actor, action=action,
                subject=f"epoch {changed.epoch}", detail=reason,
            )  # fmt: skip
        self.record = changed

    def warnings(self) -> list[str]:
        """What an operator must think of before RECOVERY ends, one sentence each."""
        if self.record is None:
            return []
        record = self.record
        active = [key.image_key_id for key in self._registry.image_keys() if key.is_active(self._wall())]
        enrolled = sum(1 for entry in self._registry.ses() if entry.status is SeStatus.ENROLLED)
        told = [
            f"who was revoked, rejected or deleted after the backup can't be known: {enrolled} SEs count as enrolled, "
            "see `appliance se list`",
            f"image keys revoked after the backup can't be known: active are {', '.join(active) or 'none'}",
            "images added or revoked after the backup can't be known: see `appliance image list`",
        ]
        if record.tokens_withdrawn:
            told.append(f"{record.tokens_withdrawn} tokens were withdrawn: they may have been used after the backup")
        if self.lost_audit > record.audit_sequence:
            first, last = record.audit_sequence + 1, self.lost_audit
            told.append(f"audit entries {first} to {last} of the time before the restore are lost; SEs remember them")
        if self._seen_trust:
            told.append(
                f"SEs have seen version {self._seen_trust} of the trust document, the backup has version "
                f"{record.trust_version}: changes of roots, host keys and log-in keys after the backup are lost"
            )
        if stranger := self._too_old():
            told.append(stranger)
        told += [
            f"{entry.name} (number {entry.number}) is not approved with the others: {entry.receipt_fault}"
            for entry in self.waiting()
            if entry.receipt_fault
        ]
        return told

    def _too_old(self) -> str:
        """What to do where the fleet knows another root, "" where nothing tells of one."""
        if not self._strangers:
            return ""
        some = ", ".join(sorted(self._strangers)[:5]) + (" …" if len(self._strangers) > 5 else "")
        return (
            f"the root CA was changed after this backup, as {some} showed: restore a backup that was taken after "
            "`rotate-ca begin`; without one, each of these SEs needs a new seed and a rejoin token, on its console: "
            "`appliance enroll --anew --seed PATH --token -`"
        )

    def problem(self) -> str:
        """RECOVERY in one sentence, "" where there is none."""
        if self.record is None or not self.is_active:
            return ""
        waiting = len(self.waiting())
        text = "RECOVERY: restored from a backup"
        if waiting:
            text += f"; {waiting} SEs show receipts, `appliance se approve --receipts` lets them in"
        if stranger := self._too_old():
            text += f"; {stranger}"
        return text + "; `appliance controller recovery status` tells what can't be known, `… recovery end` ends it"


def _refused(refusal: Refusals) -> Enrolled:
    return Enrolled(Verdict(Decision.REFUSE, refusal), None)


__all__ = ["RECOVERY", "Recovery", "RecoveryRecord"]
