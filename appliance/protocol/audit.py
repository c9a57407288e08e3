"""The audit chain: what an entry's hash covers, where a chain begins, and whether entries are one unbroken chain.

    previous(1) = genesis(cluster, node, epoch)        previous(n) = hash(n - 1)        hash(n) = SHA-256(canonical(n))

A controller restored from a backup begins a new segment: its sequence goes on, its epoch is a higher one, and
previous(n) = genesis(cluster, node, epoch, after=hash(n - 1)), with the cluster as the entry's subject.

`verify` walks entries in the order given and stops at the first that does not follow: changed (its content does not
give its hash), removed (a sequence number is missing), moved (the missing number stands further down), inserted (a
number stands twice, or an entry with a right hash does not continue the one before it).

A chain alone can't show that its newest entries were cut off, nor that somebody who holds the file wrote all of it
anew: for that the caller passes what witnesses remember, and the genesis it computed itself. A `trust.AuditHead` is
such a memory: a root signs it, SEs keep the newest and show it at each hello; `judge_head` says what a controller has
to think of one. Where the entries are kept and who signs heads is the controller's.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Iterator

import msgspec

from appliance.protocol import strict_json
from appliance.protocol.operator import AuditEntry, AuditVerdict
from appliance.protocol.trust import AuditHead


class HeadVerdict(enum.Enum):
    """What a head says about the chain of the node that is shown it."""

    HOLDS = "the chain has it"
    LOST = "of an epoch before a restore, whose last entries the backup did not have"
    AHEAD = "newer than the chain: entries were cut off, or the whole node was set back"
    REWRITTEN = "the chain has another entry in its place"


def judge_head(head: AuditHead, entry: AuditEntry | None, *, epoch: int) -> HeadVerdict:
    """Judges a verified head of this node.

    Args:
        head: what a witness shows.
        entry: the chain's entry of that sequence, None where it has none.
        epoch: the node's own.
    """
    if entry is not None and (entry.epoch, entry.hash) == (head.epoch, head.hash):
        return HeadVerdict.HOLDS
    if head.epoch < epoch:
        return HeadVerdict.LOST
    if entry is None or head.epoch > epoch:
        return HeadVerdict.AHEAD
    return HeadVerdict.REWRITTEN


def genesis(cluster_id: str, node: int, epoch: int, *, after: str = "") -> str:
    """Returns the `previous` of the first entry of a chain, or of the segment behind the entry of hash `after`; hex."""
    words = f"appliance audit {cluster_id} node {node} epoch {epoch}" + (f" after {after}" if after else "")
    return hashlib.sha256(words.encode()).hexdigest()


def canonical(entry: AuditEntry) -> bytes:
    """Returns the bytes that `entry.hash` covers: JSON with sorted names, without `hash` itself."""
    fields = msgspec.to_builtins(entry)
    del fields["hash"]
    return strict_json.encode(fields)


def entry_hash(entry: AuditEntry) -> str:
    """Returns the SHA-256 over `canonical(entry)`, hex; what `entry.hash` holds is not looked at."""
    return hashlib.sha256(canonical(entry)).hexdigest()


def seal(entry: AuditEntry) -> AuditEntry:
    """Returns `entry` with its hash filled in."""
    return msgspec.structs.replace(entry, hash=entry_hash(entry))


def _fault(entry: AuditEntry, last: AuditEntry, rest: Iterator[AuditEntry]) -> str:
    """Returns what keeps `entry` from standing behind `last`, or "" where it follows."""
    expected = last.sequence + 1
    previous = last.hash
    if entry.node == last.node and entry.epoch > last.epoch:
        previous = genesis(entry.subject, entry.node, entry.epoch, after=last.hash)
    elif (entry.node, entry.epoch) != (last.node, last.epoch):
        return (
            f"entry {entry.sequence} is of the chain of node {entry.node}, epoch {entry.epoch}; "
            f"node {last.node}, epoch {last.epoch} expected"
        )
    if entry.sequence > expected:
        span = f"entry {expected}" if entry.sequence == expected + 1 else f"entries {expected} to {entry.sequence - 1}"
        if any(later.sequence == expected for later in rest):
            return f"entries were reordered: {entry.sequence} stands before {expected}"
        return f"{span} removed: {entry.sequence} stands behind {last.sequence}"
    if entry.sequence < expected:
        return f"entry {entry.sequence} stands behind {last.sequence}: one was inserted, or moved here"
    if entry.previous != previous:
        return f"entry {entry.sequence} does not continue entry {last.sequence}: one of them was inserted or replaced"
    return ""


def verify(
    entries: Iterable[AuditEntry], *, start: str = "", head: str = "", witnesses: Iterable[AuditHead] = ()
) -> AuditVerdict:
    """Checks that `entries`, oldest first, are one unbroken chain of one node.

    Args:
        entries: read once, so any length will do.
        start: `genesis(...)` where the chain must begin with its first entry; "" trusts the first entry's `previous`,
            for a part of a chain.
        head: hash of the newest entry as a witness remembers it; "" where there is no witness.
        witnesses: heads whose signatures were verified; each must be among the entries, which may go on behind it.

    Returns:
        `entries` is how many hold, counted from the first, and `head` the hash of the last of them; `text` names the
        first fault.
    """
    held = 0
    last: AuditEntry | None = None
    awaited = {(witness.node, witness.epoch, witness.sequence): witness for witness in witnesses}
    rest = iter(entries)
    for entry in rest:
        fault = ""
        if (got := entry_hash(entry)) != entry.hash:
            fault = f"entry {entry.sequence} was changed: its hash is {entry.hash[:12]}…, its content gives {got[:12]}…"
        elif last is not None:
            fault = _fault(entry, last, rest)
        elif start and entry.sequence != 1:
            fault = f"the chain begins with entry {entry.sequence}: what stood before it was removed"
        elif start and entry.previous != start:
            fault = "the first entry does not begin the chain of this cluster, node and epoch"
        witness = awaited.pop((entry.node, entry.epoch, entry.sequence), None)
        if witness is not None and witness.hash != entry.hash and not fault:
            fault = f"entry {entry.sequence} is another one than the witness remembers: the chain was written anew"
        if fault:
            return AuditVerdict(entries=held, intact=False, text=fault, head=last.hash if last else start)
        held += 1
        last = entry
    reached = last.hash if last else start
    if head and head != reached:
        text = f"the newest entry has hash {reached[:12]}…, the witness remembers {head[:12]}…: entries were cut off"
        return AuditVerdict(entries=held, intact=False, text=text, head=reached)
    text = "the chain is unbroken"
    for witness in awaited.values():
        told = f"a witness remembers entry {witness.sequence} of node {witness.node}, epoch {witness.epoch}"
        if last is None or witness.node != last.node or witness.epoch >= last.epoch:
            text = f"{told}: it is not among these, entries were cut off"
            return AuditVerdict(entries=held, intact=False, text=text, head=reached)
        text += f"; {told}, which a restore lost"
    return AuditVerdict(entries=held, intact=True, text=text, head=reached)
