"""What the cluster knows: SEs, image keys, numbers, used nonces, audit. Every change is one store transaction.

The registry keeps all records in memory, as the store last confirmed them, so that a lookup never waits. It decides
nothing by itself: `protocol.enroll.decide` and `protocol.tunnel.judge_newcomer` do. Order of every change: compute,
commit, then change memory, then answer; whoever got an answer can rely on it after a power cut. Changes that extend
the audit or hand out numbers take the ledger lock; link tickets only touch their own SE's record and are grouped by
the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NamedTuple, TypeVar

import msgspec

from appliance.controller import records
from appliance.controller.audit import Audit
from appliance.controller.records import ImageKeyRecord, SeRecord
from appliance.controller.store.port import Compare, Put, Store
from appliance.errors import NotFoundError, StoreError, UsageError
from appliance.pki import ssh_keys
from appliance.pki.identity import Identity
from appliance.pki.image_key import create_image_key
from appliance.protocol.address import MAX_SE_NUMBER, se_number
from appliance.protocol.enroll import (
    NONCE_LIFE_S,
    Decision,
    EnrollRequest,
    ImageKeyTerms,
    InstanceFacts,
    Known,
    Refusals,
    SeStatus,
    Verdict,
    decide,
)
from appliance.protocol.operator import ImageKeyTermsWish

_log = logging.getLogger(__name__)

R = TypeVar("R", SeRecord, ImageKeyRecord)

PAGE = 1000

_LEASE_SHARED_S = 60
"""Nonces used within this time share one lease, which outlives the youngest of them."""


class Enrolled(NamedTuple):
    """Outcome of an enrollment: the verdict, and the SE's record where it isn't a refusal."""

    verdict: Verdict
    record: SeRecord | None


class _Kept(NamedTuple):
    """A record and the store revision it was read or written at."""

    record: SeRecord
    revision: int


class Registry:
    """All durable knowledge of one controller node. One loop only."""

    def __init__(self, store: Store, audit: Audit, *, wall: Callable[[], float]) -> None:
        self._store = store
        self.audit = audit
        self._wall = wall
        self._ledger = asyncio.Lock()
        self._is_stale = False
        """Whether memory may be behind the store."""
        self._ses: dict[str, _Kept] = {}
        self._by_key: dict[str, str] = {}
        self._by_number: dict[int, str] = {}
        self._image_keys: dict[str, tuple[ImageKeyRecord, int]] = {}
        self._next_number = 1
        self._reserved: set[str] = set()
        """Thumbprints of node, login and image keys, which no SE may use."""
        self._lease = (0, 0.0)
        """The lease that newly used nonces share, and the time after which a new one is taken."""
        self.used_nonces: list[str] = []
        """Nonces that were used before this process started and may still be fresh."""

    async def load(self, *, reserved: Iterable[str]) -> None:
        """Reads everything from the store. `reserved` are thumbprints of node and login keys."""
        self._reserved = set(reserved)
        await self._read()

    async def _read(self) -> None:
        # Before reading, not after: a commit that fails meanwhile makes what was read stale again.
        self._is_stale = False
        try:
            await self._read_all()
        except BaseException:
            self._is_stale = True
            raise

    async def _read_all(self) -> None:
        await self.audit.load()
        async for key, value, revision in self._all(records.SE_PREFIX):
            self._remember(records.decode(value, SeRecord, key), revision)
        async for key, value, revision in self._all(records.IMAGE_KEY_PREFIX):
            record = records.decode(value, ImageKeyRecord, key)
            self._keep_image_key(record, revision)
        self.used_nonces = [
            key.removeprefix(records.NONCE_PREFIX) async for key, _, _ in self._all(records.NONCE_PREFIX)
        ]
        entry = await self._store.get(records.NUMBER_NEXT)
        self._next_number = int(entry.value) if entry else 1

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Holds the ledger lock; reads the store anew where an earlier commit's outcome is unknown."""
        async with self._ledger:
            if self._is_stale:
                await self._read()
            yield

    async def _all(self, prefix: str) -> AsyncIterator[tuple[str, bytes, int]]:
        after = ""
        while page := await self._store.range(prefix, start_after=after, limit=PAGE):
            for entry in page:
                yield entry.key, entry.value, entry.mod_revision
            after = page[-1].key

    def _remember(self, record: SeRecord, revision: int) -> None:
        kept = self._ses.get(record.se_id)
        if kept is not None and kept.revision > revision:
            return  # read while a link's ticket was committed
        self._ses[record.se_id] = _Kept(record, revision)
        self._by_key[record.thumbprint] = record.se_id
        self._by_number[record.number] = record.se_id

    def _keep_image_key(self, record: ImageKeyRecord, revision: int) -> None:
        self._image_keys[record.image_key_id] = (record, revision)
        self._reserved.add(ssh_keys.fingerprint(record.public_key))

    async def _nonce_lease(self, now: float) -> int:
        lease, until = self._lease
        if now >= until or now < until - _LEASE_SHARED_S:
            lease = await self._store.lease(NONCE_LIFE_S + _LEASE_SHARED_S)
            self._lease = (lease, now + _LEASE_SHARED_S)
        return lease

    # Looking up: from memory, at once.

    def ses(self) -> list[SeRecord]:
        """All SEs but deleted ones, by number."""
        kept = (entry.record for entry in self._ses.values() if entry.record.status is not SeStatus.DELETED)
        return sorted(kept, key=lambda record: record.number)

    def se(self, se_id: str) -> SeRecord | None:
        """The SE of that id."""
        kept = self._ses.get(se_id)
        return kept.record if kept else None

    def se_by_key(self, thumbprint: str) -> SeRecord | None:
        """The SE whose key has that fingerprint."""
        se_id = self._by_key.get(thumbprint)
        return self.se(se_id) if se_id else None

    def se_by_number(self, number: int) -> SeRecord | None:
        """The SE of that number."""
        se_id = self._by_number.get(number)
        return self.se(se_id) if se_id else None

    def find(self, text: str) -> SeRecord:
        """Finds an SE by id, number, loopback address or name.

        Raises:
            NotFoundError: nothing fits.
            UsageError: the name fits several.
        """
        number = int(text) if text.isascii() and text.isdigit() and len(text) <= 8 else se_number(text)
        record = self.se(text) or (self.se_by_number(number) if number else None)
        if record is not None:
            return record
        named = [entry for entry in self.ses() if entry.name == text]
        if not named:
            raise NotFoundError(f"no SE {text!r} is known", hint="see `appliance se list`")
        if len(named) > 1:
            numbers = ", ".join(str(entry.number) for entry in named)
            raise UsageError(f"{len(named)} SEs are named {text!r}", hint=f"use one of the numbers {numbers}")
        return named[0]

    def image_keys(self) -> list[ImageKeyRecord]:
        """All image keys, oldest first."""
        return sorted((record for record, _ in self._image_keys.values()), key=lambda record: record.created_at)

    def image_key(self, image_key_id: str) -> ImageKeyRecord | None:
        """The image key of that id."""
        found = self._image_keys.get(image_key_id)
        return found[0] if found else None

    # Changing: one transaction each.

    async def _commit(
        self,
        compares: list[Compare],
        writes: list[Put],
        *,
        at: float,
        actor: str,
        action: str,
        subject: str,
        detail: str,
    ) -> int:
        """Commits `writes` with an audit entry; the caller holds the ledger lock. Returns the revision."""
        entry, audit_compares, audit_writes = self.audit.prepare(
            at=at, actor=actor, action=action, subject=subject, detail=detail
        )
        revision = await self._txn([*compares, *audit_compares], [*writes, *audit_writes])
        self.audit.committed(entry)
        return revision

    async def _txn(self, compares: list[Compare], writes: list[Put]) -> int:
        """Commits, and notes where memory may be behind the store: a commit that failed can still have happened."""
        try:
            result = await self._store.txn(compares, writes)
        except StoreError:
            self._is_stale = True
            raise
        if not result.succeeded:
            self._is_stale = True
            raise StoreError("the store changed under a decision", hint="try again", retryable=True)
        return result.revision

    async def enroll(self, request: EnrollRequest, *, thumbprint: str, image_key_id: str, source: str) -> Enrolled:
        """Decides about a request whose signatures were verified, and stores the outcome.

        Raises:
            StoreError: nothing was stored; the SE should try again.
        """
        async with self._turn():
            return await self._enroll(request, thumbprint, image_key_id, source)

    def _known(self, record: SeRecord | None) -> Known | None:
        return record.known if record else None

    async def _enroll(self, request: EnrollRequest, thumbprint: str, image_key_id: str, source: str) -> Enrolled:
        now = self._wall()
        key, key_revision = self._image_keys[image_key_id]
        if thumbprint in self._reserved:
            return Enrolled(Verdict(Decision.REFUSE, Refusals.KEY_IN_USE), None)
        existing = self.se(request.se_id)
        verdict = decide(
            request.se_id,
            thumbprint,
            by_id=self._known(existing),
            by_key=self._known(self.se_by_key(thumbprint)),
            terms=terms(key),
            source=source,
            now=int(now),
        )
        nonce = Put(records.NONCE_PREFIX + request.nonce, b"", await self._nonce_lease(now))
        unused = Compare(nonce.key, "version", "=", 0)
        if verdict.decision is Decision.REFUSE:
            if verdict.refusal in {Refusals.CONFLICT, Refusals.CLONED_KEY}:
                await self._commit(
                    [unused], [nonce], at=now, actor=f"se {source}", action="enroll.refused", subject=request.se_id,
                    detail=verdict.refusal.value.code,
                )  # fmt: skip
            return Enrolled(verdict, None)
        if existing is not None:
            await self._txn([unused], [nonce])
            return Enrolled(verdict, existing)
        if self._next_number > MAX_SE_NUMBER:
            return Enrolled(Verdict(Decision.REFUSE, Refusals.NUMBERS), None)
        number = self._next_number
        granted = verdict.decision is Decision.GRANT_NEW
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
        )
        used = msgspec.structs.replace(key, uses=key.uses + 1)
        if number == 1:
            next_is_ours = Compare(records.NUMBER_NEXT, "version", "=", 0)
        else:
            next_is_ours = Compare(records.NUMBER_NEXT, "value", "=", str(number).encode())
        revision = await self._commit(
            [
                unused,
                next_is_ours,
                Compare(records.se_key(record.se_id), "version", "=", 0),
                Compare(records.thumbprint_key(thumbprint), "version", "=", 0),
                Compare(records.image_key_key(image_key_id), "mod_revision", "=", key_revision),
            ],
            [
                nonce,
                Put(records.NUMBER_NEXT, str(number + 1).encode()),
                Put(records.se_key(record.se_id), records.encode(record)),
                Put(records.thumbprint_key(thumbprint), record.se_id.encode()),
                Put(records.number_key(number), record.se_id.encode()),
                Put(records.image_key_key(image_key_id), records.encode(used)),
            ],
            at=now,
            actor=f"se {source}",
            action="enroll.granted" if granted else "enroll.pending",
            subject=record.se_id,
            detail=f"number {number}, image key {image_key_id}, key {thumbprint}",
        )
        self._remember(record, revision)
        self._image_keys[image_key_id] = (used, revision)
        self._next_number = number + 1
        return Enrolled(verdict, record)

    def _revision(self, was: SeRecord) -> int:
        """The revision of the record that a change was computed from; whoever waited may have been overtaken."""
        kept = self._ses[was.se_id]
        if kept.record != was:
            raise StoreError(f"the record of {was.name} changed meanwhile", hint="try again", retryable=True)
        return kept.revision

    async def update_se(self, was: SeRecord, record: SeRecord) -> None:
        """Stores `record` in the place of `was`; only its own key is touched, so the store groups many of these.

        Raises:
            StoreError: the SE's record isn't `was` any more (retryable), or the store failed; memory is as before.
        """
        if self._is_stale:
            async with self._turn():
                pass
        key = records.se_key(record.se_id)
        compare = Compare(key, "mod_revision", "=", self._revision(was))
        revision = await self._txn([compare], [Put(key, records.encode(record))])
        self._remember(record, revision)

    async def update_audited(
        self, was: SeRecord, record: SeRecord, *, actor: str, action: str, detail: str = ""
    ) -> None:
        """Stores `record` in the place of `was`, together with an audit entry. Raises as `update_se`."""
        async with self._turn():
            await self._update_audited(was, record, actor=actor, action=action, detail=detail)

    async def _update_audited(self, was: SeRecord, record: SeRecord, *, actor: str, action: str, detail: str) -> None:
        key = records.se_key(record.se_id)
        revision = await self._commit(
            [Compare(key, "mod_revision", "=", self._revision(was))], [Put(key, records.encode(record))],
            at=self._wall(), actor=actor, action=action, subject=record.se_id, detail=detail,
        )  # fmt: skip
        self._remember(record, revision)

    async def note(self, *, actor: str, action: str, subject: str, detail: str = "") -> None:
        """Adds an audit entry that changes nothing else."""
        async with self._turn():
            await self._commit([], [], at=self._wall(), actor=actor, action=action, subject=subject, detail=detail)

    async def set_status(self, se_id: str, status: SeStatus, *, actor: str, reason: str) -> SeRecord:
        """Revokes, deletes (a tombstone stays) or quarantines an SE as it stands now; a deleted one stays deleted."""
        async with self._turn():
            record = self._ses[se_id].record
            if record.status in {status, SeStatus.DELETED}:
                return record
            changed = msgspec.structs.replace(record, status=status, status_reason=reason, status_at=self._wall())
            await self._update_audited(record, changed, actor=actor, action=f"se.{status.value}", detail=reason)
            return changed

    async def create_image_key(self, wish: ImageKeyTermsWish, *, actor: str) -> tuple[ImageKeyRecord, Identity]:
        """Makes an image key; the private half is returned once and never kept."""
        image_key_id, identity = create_image_key()
        now = int(self._wall())
        record = ImageKeyRecord(
            image_key_id=image_key_id,
            public_key=identity.public_line,
            policy=wish.policy,
            created_at=now,
            expires_at=now + wish.expires_in_s,
            max_uses=wish.max_uses,
            networks=tuple(wish.networks),
            note=wish.note,
        )
        async with self._turn():
            key = records.image_key_key(image_key_id)
            detail = f"policy {record.policy.value}, max uses {record.max_uses}, expires at {record.expires_at}"
            revision = await self._commit(
                [Compare(key, "version", "=", 0)], [Put(key, records.encode(record))], at=self._wall(), actor=actor,
                action="image-key.created", subject=image_key_id, detail=detail,
            )  # fmt: skip
            self._keep_image_key(record, revision)
        return record, identity

    async def revoke_image_key(self, image_key_id: str, *, actor: str, reason: str) -> ImageKeyRecord:
        """Revokes an image key; SEs that came by it are left alone. Revoking twice changes nothing."""
        async with self._turn():
            if image_key_id not in self._image_keys:
                raise NotFoundError(f"no image key {image_key_id!r} is known", hint="see `appliance image-key list`")
            record, revision = self._image_keys[image_key_id]
            if record.revoked_at:
                return record
            revoked = msgspec.structs.replace(record, revoked_at=int(self._wall()))
            key = records.image_key_key(image_key_id)
            revision = await self._commit(
                [Compare(key, "mod_revision", "=", revision)], [Put(key, records.encode(revoked))], at=self._wall(),
                actor=actor, action="image-key.revoked", subject=image_key_id, detail=reason,
            )  # fmt: skip
            self._image_keys[image_key_id] = (revoked, revision)
            return revoked


def terms(record: ImageKeyRecord) -> ImageKeyTerms:
    """An image key's terms as the decision table sees them."""
    return ImageKeyTerms(
        policy=record.policy,
        revoked=record.revoked_at > 0,
        expires_at=record.expires_at,
        max_uses=record.max_uses,
        uses=record.uses,
        networks=record.networks,
    )


def drift(record: SeRecord) -> list[str]:
    """Names the self-asserted facts that changed since enrollment, but the boot id, which every reboot changes."""
    if record.seen_facts == InstanceFacts():
        return []
    told = []
    for name in ("dmi_uuid", "instance_id", "macs", "image_digest"):
        was, now = getattr(record.facts, name), getattr(record.seen_facts, name)
        if was != now:
            told.append(f"{name} was {was or 'unset'}, is {now or 'unset'}")
    return told
