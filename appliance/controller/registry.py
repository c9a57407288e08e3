"""What the cluster knows: SEs, image keys, tokens, numbers, used nonces, audit. Every change is one store transaction.

The registry keeps all records in memory, as the store last confirmed them, so that a lookup never waits. It decides
nothing by itself: `controller.admission` and `protocol.tunnel.judge_newcomer` do. Order of every change: compute,
commit, then change memory, then answer; whoever got an answer can rely on it after a power cut. Changes that extend
the audit or hand out numbers take the ledger lock; link tickets only touch their own SE's record and are grouped by
the store. Who changes an SE in its turn takes that SE's lock too, so that it never meets a ticket that is being
written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import msgspec

from appliance.controller import records
from appliance.controller.audit import Audit, Note
from appliance.controller.changes import Changes
from appliance.controller.records import ImageKeyRecord, ImageRecord, Record, SeRecord, TokenRecord
from appliance.controller.store.port import Compare, Delete, Op, OvertakenError, Put, Store
from appliance.errors import NotFoundError, StoreError, UsageError
from appliance.pki import ssh_keys
from appliance.pki.identity import Identity
from appliance.pki.image_key import create_image_key
from appliance.protocol.address import se_number
from appliance.protocol.enroll import NONCE_LIFE_S, InstanceFacts, SeStatus
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.storage.reserve import Reserve

_log = logging.getLogger(__name__)

R = TypeVar("R", SeRecord, ImageKeyRecord, ImageRecord, TokenRecord)

PAGE = 1000

_LEASE_SHARED_S = 60
"""Nonces used within this time share one lease, which outlives the youngest of them."""


class _Kept(NamedTuple, Generic[R]):
    """A record and the store revision it was read or written at."""

    record: R
    revision: int


class Registry:
    """All durable knowledge of one controller node. One loop only."""

    def __init__(self, store: Store, audit: Audit, *, wall: Callable[[], float]) -> None:
        self._store = store
        self.audit = audit
        self._wall = wall
        self._ledger = asyncio.Lock()
        self._writing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """SEs whose records are being written."""
        self._is_stale = False
        """Whether memory may be behind the store."""
        self._ses: dict[str, _Kept[SeRecord]] = {}
        self._by_key: dict[str, str] = {}
        self._by_number: dict[int, str] = {}
        self._image_keys: dict[str, _Kept[ImageKeyRecord]] = {}
        self._images: dict[str, _Kept[ImageRecord]] = {}
        self._by_image_id: dict[str, str] = {}
        """Each id that SEs name to that of the record."""
        self._tokens: dict[str, _Kept[TokenRecord]] = {}
        self.next_number = 1
        self._reserved: set[str] = set()
        """Thumbprints of node, login and image keys, which no SE may use."""
        self._lease = (0, 0.0)
        """The lease that newly used nonces share, and the time after which a new one is taken."""
        self.reserve_space: Reserve | None = None
        """Disk space to be given up where the disk is too full for an audited change."""
        self._changes = Changes(self)
        self.used_nonces: list[str] = []
        """Nonces that were used before this process started and may still be fresh."""

    async def load(self, *, reserved: Iterable[str]) -> None:
        """Reads everything from the store. `reserved` are thumbprints of node and login keys."""
        self._reserved = set(reserved)
        await self._read()

    def reserve(self, thumbprints: Iterable[str]) -> None:
        """Keeps the keys of nodes and log-ins from being enrolled."""
        self._reserved.update(thumbprints)

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
        found = set()
        async for key, value, revision in self._all(records.SE_PREFIX):
            self._remember(record := records.decode(value, SeRecord, key), revision)
            found.add(record.se_id)
        for se_id in self._ses.keys() - found:
            self._forget(self._ses[se_id].record)
        async for key, value, revision in self._all(records.IMAGE_KEY_PREFIX):
            self._remember(records.decode(value, ImageKeyRecord, key), revision)
        async for key, value, revision in self._all(records.IMAGE_PREFIX):
            self._remember(records.decode(value, ImageRecord, key), revision)
        self._tokens.clear()
        async for key, value, revision in self._all(records.TOKEN_PREFIX):
            self._remember(records.decode(value, TokenRecord, key), revision)
        self.used_nonces = [
            key.removeprefix(records.NONCE_PREFIX) async for key, _, _ in self._all(records.NONCE_PREFIX)
        ]
        entry = await self._store.get(records.NUMBER_NEXT)
        self.next_number = int(entry.value) if entry else 1

    @contextlib.asynccontextmanager
    async def turn(self, se_id: str = "") -> AsyncIterator[None]:
        """Holds the ledger lock; reads the store anew where an earlier commit's outcome is unknown.

        Where `se_id` is given, nothing else writes that SE's record meanwhile, not even its link's ticket.
        """
        async with self._ledger, self._alone(se_id) if se_id else contextlib.nullcontext():
            if self._is_stale:
                await self._read()
            yield

    @contextlib.asynccontextmanager
    async def alone(self, se_ids: Iterable[str]) -> AsyncIterator[None]:
        """For who holds the turn: nothing else writes the records of these SEs meanwhile."""
        async with contextlib.AsyncExitStack() as stack:
            for se_id in se_ids:
                await stack.enter_async_context(self._alone(se_id))
            if self._is_stale:
                await self._read()
            yield

    def _alone(self, se_id: str) -> asyncio.Lock:
        """The lock of an SE's record; whoever also takes the ledger's takes that first."""
        return self._writing.setdefault(se_id, asyncio.Lock())

    async def _all(self, prefix: str) -> AsyncIterator[tuple[str, bytes, int]]:
        after = ""
        while page := await self._store.range(prefix, start_after=after, limit=PAGE):
            for entry in page:
                yield entry.key, entry.value, entry.mod_revision
            after = page[-1].key

    def _remember(self, record: Record, revision: int) -> None:
        if isinstance(record, ImageKeyRecord):
            self._image_keys[record.image_key_id] = _Kept(record, revision)
            self._reserved.add(ssh_keys.fingerprint(record.public_key))
            return
        if isinstance(record, ImageRecord):
            self._images[record.image_id] = _Kept(record, revision)
            self._by_image_id.update(dict.fromkeys(record.ids, record.image_id))
            return
        if isinstance(record, TokenRecord):
            self._tokens[record.digest] = _Kept(record, revision)
            return
        kept = self._ses.get(record.se_id)
        if kept is not None:
            if kept.revision > revision:
                return  # read while a link's ticket was committed
            self._by_key.pop(kept.record.thumbprint, None)
        self._ses[record.se_id] = _Kept(record, revision)
        self._by_key[record.thumbprint] = record.se_id
        self._by_number[record.number] = record.se_id

    def _forget(self, record: SeRecord) -> None:
        del self._ses[record.se_id], self._by_key[record.thumbprint], self._by_number[record.number]

    def _last_read(self, record: Record) -> _Kept[Any] | None:
        """The record that one of this name would replace."""
        if isinstance(record, SeRecord):
            return self._ses.get(record.se_id)
        if isinstance(record, ImageKeyRecord):
            return self._image_keys.get(record.image_key_id)
        if isinstance(record, ImageRecord):
            return self._images.get(record.image_id)
        return self._tokens.get(record.digest)

    async def nonce_used(self, nonce: str, now: float) -> tuple[Compare, Put]:
        """What makes a transaction the one that uses `nonce`."""
        lease, until = self._lease
        if now >= until or now < until - _LEASE_SHARED_S:
            lease = await self._store.lease(NONCE_LIFE_S + _LEASE_SHARED_S)
            self._lease = (lease, now + _LEASE_SHARED_S)
        key = records.NONCE_PREFIX + nonce
        return Compare(key, "version", "=", 0), Put(key, b"", lease)

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
        """Finds an SE by id, number, loopback address, fingerprint of its key, or name.

        Raises:
            NotFoundError: nothing fits.
            UsageError: the name fits several.
        """
        number = int(text) if text.isascii() and text.isdigit() and len(text) <= 8 else se_number(text)
        record = self.se(text) or (self.se_by_number(number) if number else None) or self.se_by_key(text)
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
        return sorted((kept.record for kept in self._image_keys.values()), key=lambda record: record.created_at)

    def image_key(self, image_key_id: str) -> ImageKeyRecord | None:
        """The image key of that id."""
        found = self._image_keys.get(image_key_id)
        return found.record if found else None

    def images(self) -> list[ImageRecord]:
        """All images, oldest first."""
        return sorted((kept.record for kept in self._images.values()), key=lambda record: record.added_at)

    def image(self, image_id: str) -> ImageRecord | None:
        """The image whose SEs name that id."""
        found = self._images.get(self._by_image_id.get(image_id, ""))
        return found.record if found else None

    def tokens(self) -> list[TokenRecord]:
        """All tokens, oldest first."""
        return sorted((kept.record for kept in self._tokens.values()), key=lambda record: record.created_at)

    def token(self, digest: str) -> TokenRecord | None:
        """The token of that digest."""
        found = self._tokens.get(digest)
        return found.record if found else None

    def is_reserved(self, thumbprint: str) -> bool:
        """Whether a key is a node's, a log-in's or an image's, which no SE may use."""
        return thumbprint in self._reserved

    # Changing: one transaction each.

    async def commit(
        self,
        *changed: Record,
        forgotten: SeRecord | None = None,
        compares: Sequence[Compare] = (),
        writes: Sequence[Op] = (),
        actor: str,
        action: str,
        subject: str,
        detail: str = "",
    ) -> None:
        """Commits new and changed records and an audit entry. See `commit_noted`."""
        note = Note(actor, action, subject, detail)
        await self.commit_noted(changed, [note], forgotten=forgotten, compares=compares, writes=writes)

    async def commit_noted(
        self, changed: Sequence[Record], notes: Sequence[Note], *, forgotten: SeRecord | None = None,
        compares: Sequence[Compare] = (), writes: Sequence[Op] = (),
    ) -> None:  # fmt: skip
        """Commits new and changed records and audit entries, where each is in the store as memory has it.

        The caller holds the turn, and has not let go of the loop since it read what it changed. The indices of SEs
        follow their records; `forgotten` goes without a trace but its number, which isn't given again.

        Raises:
            StoreError: nothing was stored, or it isn't known; memory is read anew before the next change.
        """
        checks, puts = list(compares), list(writes)
        for record in changed:
            kept = self._last_read(record)
            checks.append(Compare(record.store_key, "mod_revision", "=", kept.revision if kept else 0))
            puts.append(Put(record.store_key, records.encode(record)))
            if isinstance(record, SeRecord):
                before = kept.record if kept else None
                if before is None:
                    puts.append(Put(records.number_key(record.number), record.se_id.encode()))
                elif before.thumbprint != record.thumbprint:
                    puts.append(Delete(records.thumbprint_key(before.thumbprint)))
                if before is None or before.thumbprint != record.thumbprint:
                    checks.append(Compare(records.thumbprint_key(record.thumbprint), "version", "=", 0))
                    puts.append(Put(records.thumbprint_key(record.thumbprint), record.se_id.encode()))
        if forgotten is not None:
            checks.append(Compare(forgotten.store_key, "mod_revision", "=", self._ses[forgotten.se_id].revision))
            keys = (records.thumbprint_key(forgotten.thumbprint), records.number_key(forgotten.number))
            puts += [Delete(key) for key in (forgotten.store_key, *keys)]
        entry, follows, audit_writes = self.audit.prepare(notes, at=self._wall())
        revision = await self._audited_txn([*checks, follows], [*puts, *audit_writes])
        self.audit.committed(entry)
        for record in changed:
            self._remember(record, revision)
        if forgotten is not None:
            self._forget(forgotten)

    def next_number_taken(self) -> tuple[Compare, Put]:
        """What makes a transaction the one that takes `next_number`."""
        number = self.next_number
        unchanged = Compare(records.NUMBER_NEXT, "value", "=", str(number).encode())
        if number == 1:
            unchanged = Compare(records.NUMBER_NEXT, "version", "=", 0)
        return unchanged, Put(records.NUMBER_NEXT, str(number + 1).encode())

    async def forget_tokens(self, ended: Sequence[TokenRecord]) -> None:
        """Deletes tokens; the audit keeps what it told of them. The caller holds the turn. Raises as `commit`."""
        kept = [self._tokens[record.digest] for record in ended]
        await self._txn(
            [Compare(record.store_key, "mod_revision", "=", revision) for record, revision in kept],
            [Delete(record.store_key) for record, _ in kept],
        )
        for record in ended:
            del self._tokens[record.digest]

    async def use_nonce(self, nonce: str) -> None:
        """Stores that a nonce was used, with nothing else. Raises as `commit`."""
        unused, used = await self.nonce_used(nonce, self._wall())
        await self._txn([unused], [used])

    async def put_aside(self, *writes: Op) -> None:
        """Stores what is no record and no decision, also where the disk is full. Raises as `commit`."""
        await self._audited_txn([], writes)

    async def _audited_txn(self, compares: Sequence[Compare], writes: Sequence[Op]) -> int:
        """As `_txn`; where the disk is full, the space that is held back for this is given up, once."""
        try:
            return await self._txn(compares, writes)
        except StoreError as error:
            space = self.reserve_space
            if not error.retryable or space is None or not space.is_needed or not space.release():
                raise
            _log.error("the disk is full; space held back for the audit is given up: %s", error.message)
        # The first try may have happened after all: the compare on the audit's head tells.
        return await self._txn(compares, writes)

    async def _txn(self, compares: Sequence[Compare], writes: Sequence[Op]) -> int:
        """Commits, and notes where memory may be behind the store: a commit that failed can still have happened."""
        try:
            result = await self._store.txn(compares, writes)
        except BaseException:  # of a caller that was cancelled, too
            self._is_stale = True
            raise
        if not result.succeeded:
            self._is_stale = True
            raise StoreError("the store changed under a decision", hint="try again", retryable=True)
        return result.revision

    def _rebased(self, was: SeRecord, record: SeRecord) -> tuple[SeRecord, int]:
        """What to store for a change from `was` to `record`, and on which revision; it may have been overtaken.

        What an SE told of its image key meanwhile decides nothing, and stays: its first heartbeat tells it, and a link
        that breaks right after that must not make the next one's hello fail.
        """
        kept = self._ses[was.se_id]
        if kept.record.image_key_gone_at != was.image_key_gone_at:
            gone_at = kept.record.image_key_gone_at
            was = msgspec.structs.replace(was, image_key_gone_at=gone_at)
            record = msgspec.structs.replace(record, image_key_gone_at=gone_at)
        if kept.record != was:
            raise OvertakenError(f"the record of {was.name} changed meanwhile", hint="try again")
        return record, kept.revision

    async def update_se(self, was: SeRecord, record: SeRecord) -> None:
        """Stores `record` in the place of `was`; only its own key is touched, so the store groups many of these.

        Raises:
            OvertakenError: the SE's record isn't `was` any more; nothing was stored.
            StoreError: the store failed; memory is as before.
        """
        if self._is_stale:
            async with self.turn():
                pass
        async with self._alone(record.se_id):
            key = records.se_key(record.se_id)
            record, now = self._rebased(was, record)
            compare = Compare(key, "mod_revision", "=", now)
            revision = await self._txn([compare], [Put(key, records.encode(record))])
            self._remember(record, revision)

    async def update_audited(
        self, was: SeRecord, record: SeRecord, *, actor: str, action: str, detail: str = ""
    ) -> None:
        """Stores `record` in the place of `was`, together with an audit entry. Raises as `update_se`."""

        def rebased(_: SeRecord) -> SeRecord:
            return self._rebased(was, record)[0]

        await self.change_se(record.se_id, rebased, actor=actor, action=action, detail=detail)

    async def change_se(
        self, se_id: str, change: Callable[[SeRecord], SeRecord], *, actor: str, action: str, detail: str = ""
    ) -> SeRecord:
        """Changes an SE as it stands when its turn has come, with an audit entry where that changes anything.

        Raises:
            NotFoundError: there is no such SE.
            StoreError: as `commit`.
        """
        return await self._changes.make(se_id, change, Note(actor, action, se_id, detail))

    async def note(self, *, actor: str, action: str, subject: str, detail: str = "") -> None:
        """Adds an audit entry that changes nothing else."""
        async with self.turn():
            await self.commit(actor=actor, action=action, subject=subject, detail=detail)

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
            rate_per_s=wish.rate_per_s,
            burst=wish.burst,
        )
        async with self.turn():
            detail = f"policy {record.policy.value}, max uses {record.max_uses}, expires at {record.expires_at}"
            await self.commit(record, actor=actor, action="image-key.created", subject=image_key_id, detail=detail)
        return record, identity

    async def revoke_image_key(self, image_key_id: str, *, actor: str, reason: str) -> ImageKeyRecord:
        """Revokes an image key; SEs that came by it are left alone. Revoking twice changes nothing."""
        async with self.turn():
            return await self.revoke_key_in_turn(image_key_id, actor=actor, reason=reason)

    async def revoke_key_in_turn(self, image_key_id: str, *, actor: str, reason: str) -> ImageKeyRecord:
        """The same for a caller that holds the turn."""
        record = self.image_key(image_key_id)
        if record is None:
            raise NotFoundError(f"no image key {image_key_id!r} is known", hint="see `appliance image-key list`")
        if record.revoked_at:
            return record
        revoked = msgspec.structs.replace(record, revoked_at=int(self._wall()))
        await self.commit(revoked, actor=actor, action="image-key.revoked", subject=image_key_id, detail=reason)
        return revoked


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
