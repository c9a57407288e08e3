"""What the controller may ask of a store: no more than etcd can do, so that etcd can take SQLite's place.

Rules that every implementation keeps, and `tests/contract/test_store.py` holds them to (after etcd's API, v3.5):

- A transaction that changes something makes one new revision; all its changes carry it. One that changes nothing (only
  compares, or deletes of absent keys) makes none. What was acknowledged survives a `kill -9` and a power cut.
- An entry's `version` counts its puts since it was created, from 1; `create_revision` and `mod_revision` are those of
  its first and newest put. An absent key compares as version 0, revisions 0; comparing its value never holds, not even
  as `!=`. Values compare as bytes.
- A range is in the order of the keys' UTF-8 bytes. Pages (`start_after`) are not of one moment.
- A watch yields each change once, in order, beginning with `from_revision` (0: whatever comes after the call). To read
  and then follow without a gap: `revision = (await txn([], [])).revision`, then `range`, then
  `watch(from_revision=revision + 1)`; a change may be seen twice that way, and `mod_revision` tells.
- History is kept for a while only: a watch from before the compacted revision raises `CompactedError`; read anew then.
- A lease that isn't kept alive expires and deletes what was put with it. A put without the lease takes a key off it.
- A retryable error can mean that the outcome is unknown; read again, and let a compare make the repetition safe.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from appliance.errors import StoreError

MAX_KEY_BYTES = 1024
MAX_VALUE_BYTES = 512 * 1024
MAX_OPERATIONS = 100
"""Of compares, of success and of failure each."""
MAX_TXN_BYTES = 1024 * 1024
"""Keys and values of one transaction; etcd takes requests of 1.5 MiB."""
MAX_TTL_S = 10 * 365 * 86400

Target = Literal["version", "mod_revision", "create_revision", "value"]
Comparison = Literal["=", "!=", ">", "<"]


class CompactedError(StoreError):
    """The history that was asked for is gone."""

    code = "STORE-002"


class LeaseError(StoreError):
    """The lease has expired, was revoked, or never was."""

    code = "STORE-003"


class OvertakenError(StoreError):
    """What was to be changed had been changed meanwhile; nothing was stored."""

    code = "STORE-004"
    retryable = True


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's newest state. In a delete event: the revision of the deletion as `mod_revision`, the rest empty."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition on one key: `<target> <op> <operand>`; the operand is bytes for a value, else an integer."""

    key: str
    target: Target
    op: Comparison
    operand: int | bytes


@dataclass(frozen=True, slots=True)
class Put:
    """Sets a key, attached to `lease` (0: to none)."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Removes a key; fine where it is absent."""

    key: str


Op = Put | Delete


@dataclass(frozen=True, slots=True)
class TxnResult:
    """Whether all compares held, and the store's revision right after the transaction."""

    succeeded: bool
    revision: int


@dataclass(frozen=True, slots=True)
class Event:
    """One change."""

    kind: Literal["put", "delete"]
    entry: Entry


class Store(Protocol):
    """The port. All methods raise `StoreError`; `retryable` tells whether the same can help later."""

    async def get(self, key: str) -> Entry | None:
        """Returns the entry, None where the key is absent."""
        ...

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 1000) -> list[Entry]:
        """Returns up to `limit` entries whose keys begin with `prefix` and come after `start_after`."""
        ...

    async def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        """Does all of `success` where all compares hold, else all of `failure`: at once, durably.

        Raises:
            LeaseError: a put names a lease that isn't; nothing was changed.
            StoreError: over a limit, or a key twice in one list (nothing was changed); or the store failed.
        """
        ...

    def watch(self, prefix: str, *, from_revision: int = 0) -> AsyncGenerator[Event, None]:
        """Yields the changes below `prefix`, until the store is closed. Close it: `contextlib.aclosing`.

        Raises:
            CompactedError: (from the iterator) changes that should come next are gone.
        """
        ...

    async def lease(self, ttl_s: int) -> int:
        """Makes a lease that expires `ttl_s` seconds from now and from each `keep_alive`. Returns its id."""
        ...

    async def keep_alive(self, lease: int) -> None:
        """Starts the lease's time again. Raises `LeaseError` where it isn't any more."""
        ...

    async def revoke_lease(self, lease: int) -> None:
        """Ends a lease and deletes what is attached to it. Raises `LeaseError` where it isn't any more."""
        ...

    async def compact(self, revision: int) -> None:
        """Forgets the history before `revision`; fine where that was done already."""
        ...

    async def close(self) -> None:
        """Finishes what was asked, then gives up all resources; fine when closed already."""
        ...


def prefix_end(prefix: str) -> str | None:
    """Returns the least string above all that begin with `prefix`, None where there is no bound."""
    for length in range(len(prefix), 0, -1):
        following = ord(prefix[length - 1]) + 1
        if following <= 0x10FFFF:
            # Surrogates have no UTF-8 form; what follows them comes next in byte order.
            return prefix[: length - 1] + chr(0xE000 if following == 0xD800 else following)
    return None


def check_text(text: str, what: str) -> int:
    """Returns the UTF-8 length of a key or prefix. Raises `StoreError` where no store could hold it."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise StoreError(f"{what} {text!r} holds a lone surrogate") from None
    if size > MAX_KEY_BYTES or "\0" in text:
        raise StoreError(f"{what} {text[:80]!r} of {size} bytes, at most {MAX_KEY_BYTES} without NUL expected")
    return size


def check_key(key: str) -> int:
    """Returns the UTF-8 length of a key. Raises `StoreError` where it is none."""
    if not key:
        raise StoreError("an empty key")
    return check_text(key, "key")


def check_ttl(ttl_s: int) -> None:
    """Raises `StoreError` where a lease can't have this time."""
    if not 1 <= ttl_s <= MAX_TTL_S:
        raise StoreError(f"a lease of {ttl_s} s, 1 to {MAX_TTL_S} expected")


def check_lease(lease: int) -> None:
    """Raises `LeaseError` where no lease can have this id."""
    if not 0 < lease < 2**63:
        raise LeaseError(f"{lease} is no lease, 1 to 2**63 - 1 expected")


def check_txn(compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op]) -> None:
    """Raises `StoreError` where a transaction is over a limit or ambiguous; implementations ask first."""
    for name, part in (("compares", compares), ("success", success), ("failure", failure)):
        if len(part) > MAX_OPERATIONS:
            raise StoreError(
                f"a transaction with {len(part)} operations in {name}, at most {MAX_OPERATIONS} expected",
                hint="split it, and tie the parts together with compares",
            )
    size = sum(check_key(compare.key) + _operand_bytes(compare) for compare in compares)
    size += _check_operations(success) + _check_operations(failure)
    if size > MAX_TXN_BYTES:
        raise StoreError(f"a transaction of {size} bytes, at most {MAX_TXN_BYTES} expected")


def _operand_bytes(compare: Compare) -> int:
    if isinstance(compare.operand, bytes) != (compare.target == "value"):
        raise StoreError(f"{compare.target} of {compare.key!r} compared with a {type(compare.operand).__name__}")
    return len(compare.operand) if isinstance(compare.operand, bytes) else 0


def _check_operations(operations: Iterable[Op]) -> int:
    size = 0
    seen: set[str] = set()
    for operation in operations:
        size += check_key(operation.key)
        if operation.key in seen:
            raise StoreError(f"the key {operation.key!r} stands twice in one transaction")
        seen.add(operation.key)
        if isinstance(operation, Put):
            if operation.lease:
                check_lease(operation.lease)
            if not isinstance(operation.value, bytes):
                raise StoreError(f"a {type(operation.value).__name__} for {operation.key!r}, bytes expected")
            if len(operation.value) > MAX_VALUE_BYTES:
                raise StoreError(
                    f"a value of {len(operation.value)} bytes for {operation.key!r}, at most {MAX_VALUE_BYTES} expected"
                )
            size += len(operation.value)
    return size
