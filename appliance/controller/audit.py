"""The audit: an append-only, hash-chained record of what was decided, one chain for each node.

An entry is written in the transaction of what it tells about, so there is never one without the other; what lies in
files is told by way of `intents`. The chain's rules are pure and live in `protocol.audit`; this module prepares the
compares and operations that extend it. After a restore the sequence goes on in a new segment, whose first entry names
the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from appliance.controller import records
from appliance.controller.store.port import Compare, Put, Store
from appliance.errors import StateMachineError
from appliance.protocol import audit as chain
from appliance.protocol.operator import AuditEntry, AuditVerdict

ENTRY_PREFIX = "audit/"
HEAD_PREFIX = "audit-head/"
PAGE = 1000


def _entry_key(node: int, sequence: int) -> str:
    return f"{ENTRY_PREFIX}{node}/{sequence:012d}"


class Note(NamedTuple):
    """What an entry tells; the rest of it is the chain's."""

    actor: str
    action: str
    subject: str
    detail: str = ""


class Audit:
    """One node's chain. Entries are prepared and committed in turn: the caller holds the ledger lock until then."""

    def __init__(self, store: Store, *, cluster_id: str, node: int, epoch: int) -> None:
        self._store = store
        self._node = node
        self._epoch = epoch
        self._cluster_id = cluster_id
        self._head_key = f"{HEAD_PREFIX}{node}"
        self.head = chain.genesis(cluster_id, node, epoch)
        self.count = 0
        self._newest_epoch = epoch

    async def load(self) -> None:
        """Finds the chain's end."""
        head = await self._store.get(self._head_key)
        if head is None:
            return
        text, _, sequence = head.value.decode().partition(" ")
        self.head, self.count = text, int(sequence)
        newest = await self.entry(self.count)
        if newest is not None:
            self._newest_epoch = newest.epoch

    def _head_value(self) -> bytes:
        return f"{self.head} {self.count}".encode()

    def prepare(self, notes: Sequence[Note], *, at: float) -> tuple[AuditEntry, Compare, list[Put]]:
        """Returns the last of the next entries, one for each note (one at least), with what must hold and what to
        write; `committed` makes it the head."""
        previous = self.head
        if self._newest_epoch != self._epoch:
            if notes[0].subject != self._cluster_id:
                raise StateMachineError(f"a segment of the audit begins with {notes[0].subject!r}, not its cluster")
            previous = chain.genesis(self._cluster_id, self._node, self._epoch, after=self.head)
        writes = []
        for sequence, note in enumerate(notes, self.count + 1):
            entry = chain.seal(
                AuditEntry(
                    sequence=sequence, time=at, node=self._node, epoch=self._epoch, previous=previous, **note._asdict()
                )
            )
            writes.append(Put(_entry_key(self._node, sequence), records.encode(entry)))
            previous = entry.hash
        writes.append(Put(self._head_key, f"{entry.hash} {entry.sequence}".encode()))
        if self.count:
            return entry, Compare(self._head_key, "value", "=", self._head_value()), writes
        return entry, Compare(self._head_key, "version", "=", 0), writes

    def committed(self, entry: AuditEntry) -> None:
        """The transaction with `entry` was committed."""
        self.head, self.count, self._newest_epoch = entry.hash, entry.sequence, entry.epoch

    async def entry(self, sequence: int) -> AuditEntry | None:
        """Returns the entry of that number."""
        found = await self._store.get(_entry_key(self._node, sequence))
        return records.decode(found.value, AuditEntry, found.key) if found else None

    async def read(self, *, after: int = 0, limit: int = PAGE) -> list[AuditEntry]:
        """Returns entries with a sequence above `after`, oldest first."""
        prefix = f"{ENTRY_PREFIX}{self._node}/"
        found = await self._store.range(prefix, start_after=_entry_key(self._node, after), limit=limit)
        return [records.decode(entry.value, AuditEntry, entry.key) for entry in found]

    async def verify(self) -> AuditVerdict:
        """Checks the whole chain against its genesis and the stored head."""
        entries: list[AuditEntry] = []
        while page := await self.read(after=entries[-1].sequence if entries else 0):
            entries += page
        return chain.verify(entries, start=start_of(self._cluster_id, self._node, entries), head=self.head)


def start_of(cluster_id: str, node: int, entries: Sequence[AuditEntry]) -> str:
    """Returns the genesis that a node's chain must begin with; its first entry says of which epoch."""
    return chain.genesis(cluster_id, node, entries[0].epoch) if entries else ""
