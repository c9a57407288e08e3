"""The audit chain: what an entry's hash covers, where a chain begins, and whether entries are one unbroken chain.

    previous(1) = genesis(cluster, node, epoch)        previous(n) = hash(n - 1)        hash(n) = SHA-256(canonical(n))

`verify` walks entries in the order given and stops at the first that does not follow: changed (its content does not
give its hash), removed (a sequence number is missing), moved (the missing number stands further down), inserted (a
number stands twice, or an entry with a right hash does not continue the one before it).

A chain alone can't show that its newest entries were cut off, nor that somebody who holds the file wrote all of it
anew: for that the caller passes the `head` that a witness remembers, and the genesis it computed itself. Where the
entries are kept and who signs heads is the controller's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import msgspec

from appliance.protocol import strict_json
from appliance.protocol.operator import AuditEntry, AuditVerdict


def genesis(cluster_id: str, node: int, epoch: int) -> str:
    """Returns the `previous` of a chain's first entry, hex."""
    return hashlib.sha256(f"appliance audit {cluster_id} node {node} epoch {epoch}".encode()).hexdigest()


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
    if (entry.node, entry.epoch) != (last.node, last.epoch):
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
    if entry.previous != last.hash:
        return f"entry {entry.sequence} does not continue entry {last.sequence}: one of them was inserted or replaced"
    return ""


def verify(entries: Iterable[AuditEntry], *, start: str = "", head: str = "") -> AuditVerdict:
    """Checks that `entries`, oldest first, are one unbroken chain of one node and epoch.

    Args:
        entries: read once, so any length will do.
        start: `genesis(...)` where the chain must begin with its first entry; "" trusts the first entry's `previous`,
            for a part of a chain.
        head: hash of the newest entry as a witness remembers it; "" where there is no witness.

    Returns:
        `entries` is how many hold, counted from the first, and `head` the hash of the last of them; `text` names the
        first fault.
    """
    held = 0
    last: AuditEntry | None = None
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
        if fault:
            return AuditVerdict(entries=held, intact=False, text=fault, head=last.hash if last else start)
        held += 1
        last = entry
    reached = last.hash if last else start
    if head and head != reached:
        text = f"the newest entry has hash {reached[:12]}…, the witness remembers {head[:12]}…: entries were cut off"
        return AuditVerdict(entries=held, intact=False, text=text, head=reached)
    return AuditVerdict(entries=held, intact=True, text="the chain is unbroken", head=reached)
