"""What tests of the controller's parts stand on: a clock set by hand, a store that fails on demand, SEs' requests."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from appliance.controller.admission import Admission, Enrolled
from appliance.controller.audit import Audit
from appliance.controller.records import ImageKeyRecord
from appliance.controller.registry import Registry
from appliance.controller.store.port import Compare, Entry, Event, Op, Store, TxnResult
from appliance.controller.store.sqlite import SqliteStore
from appliance.errors import StoreError
from appliance.pki import ssh_keys
from appliance.pki.identity import Identity
from appliance.protocol.enroll import EnrollRequest, InstanceFacts
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.seed import Hints

NOW = 1_800_000_000.0
PENDING_LIFE_S = 3600.0


class HandClock:
    """Both clocks, moved by the test; the store's leases follow it too."""

    def __init__(self, wall: float = NOW) -> None:
        self.wall = wall
        self.ticks = 1000.0

    def now(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.ticks

    def synchronised(self) -> bool:
        return True

    def pass_s(self, seconds: float) -> None:
        self.wall += seconds
        self.ticks += seconds


class FaultyStore:
    """A store whose commits fail when told to, `before` they happen or `after`, as a lost answer of etcd would."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.fail: list[str] = []
        """What happens to the next commits: "before", "after", "" for none."""
        self.txns = 0
        self.gate: asyncio.Event | None = None
        """Where set, commits wait for it."""

    async def txn(self, compares: Sequence[Compare], success: Sequence[Op], failure: Sequence[Op] = ()) -> TxnResult:
        self.txns += 1
        if self.gate is not None:
            await self.gate.wait()
        fault = self.fail.pop(0) if self.fail else ""
        if fault == "before":
            raise StoreError("the disk is full", retryable=True)
        result = await self.store.txn(compares, success, failure)
        if fault == "after":
            raise StoreError("the answer was lost", retryable=True)
        return result

    async def get(self, key: str) -> Entry | None:
        return await self.store.get(key)

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 1000) -> list[Entry]:
        return await self.store.range(prefix, start_after=start_after, limit=limit)

    def watch(self, prefix: str, *, from_revision: int = 0) -> AsyncGenerator[Event, None]:
        return self.store.watch(prefix, from_revision=from_revision)

    async def lease(self, ttl_s: int) -> int:
        return await self.store.lease(ttl_s)

    async def keep_alive(self, lease: int) -> None:
        await self.store.keep_alive(lease)

    async def revoke_lease(self, lease: int) -> None:
        await self.store.revoke_lease(lease)

    async def compact(self, revision: int) -> None:
        await self.store.compact(revision)

    async def close(self) -> None:
        await self.store.close()


def request(**changes: Any) -> EnrollRequest:
    """An enrollment of a fresh SE; signatures are not the registry's concern."""
    fields: dict[str, Any] = {
        "audience": "c-1",
        "nonce": uuid.uuid4().hex,
        "se_id": str(uuid.uuid4()),
        "se_key": Identity.create().public_line,
        "host_keys": [Identity.create().public_line],
        "facts": InstanceFacts(boot_id="b-1"),
        "agent_version": "0.1.0",
        "attempt_id": uuid.uuid4().hex[:16],
        "hints": Hints(),
    }
    return EnrollRequest(**{**fields, **changes})


class Book:
    """A registry on a real SQLite store behind a `FaultyStore`."""

    def __init__(self, path: Path, clock: HandClock | None = None) -> None:
        self.clock = clock or HandClock()
        self.store = FaultyStore(SqliteStore.open(path, clock=self.clock))
        self.registry = self.another()

    @property
    def admission(self) -> Admission:
        """The door of the registry as it is now."""
        return Admission(self.registry, pending_life_s=PENDING_LIFE_S, wall=self.clock.now)

    def another(self) -> Registry:
        """A second registry on the same store: what a restart would see."""
        audit = Audit(self.store, cluster_id="c-1", node=1, epoch=1)
        return Registry(self.store, audit, wall=self.clock.now)

    async def image_key(self, **terms: Any) -> ImageKeyRecord:
        record, _ = await self.registry.create_image_key(ImageKeyTermsWish(**terms), actor="test")
        return record

    async def enroll(
        self, key: ImageKeyRecord, wish: EnrollRequest | None = None, source: str = "192.0.2.1"
    ) -> Enrolled:
        wish = wish or request()
        return await self.admission.enroll(
            wish, thumbprint=ssh_keys.fingerprint(wish.se_key), image_key_id=key.image_key_id, source=source
        )


@contextlib.asynccontextmanager
async def book(path: Path, clock: HandClock | None = None) -> AsyncIterator[Book]:
    """A loaded `Book` whose store lies below `path`."""
    found = Book(path / "store.sqlite", clock)
    try:
        await found.registry.load(reserved=())
        yield found
    finally:
        await found.store.close()


async def turns(condition: Callable[[], object], most: int = 2000) -> None:
    """Lets the loop turn until `condition` holds: for what needs no time, only turns."""
    for _ in range(most):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when nothing else is to do: hours pass in milliseconds.

    Work in threads doesn't move the clock; don't let timers and threads race.
    """

    def __init__(self) -> None:
        super().__init__()
        self._jumped_s = 0.0
        selector = self._selector  # type: ignore[attr-defined]
        real = selector.select

        def select(timeout: float | None = None) -> Any:
            found = real(timeout if timeout is None else 0)
            if not found and timeout:
                self._jumped_s += timeout
            return found

        selector.select = select

    def time(self) -> float:
        return 1000.0 + self._jumped_s


class LoopClock(HandClock):
    """Both clocks, moved by the loop in which it was made."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()

    def now(self) -> float:
        return NOW + self.monotonic() - 1000.0

    def monotonic(self) -> float:
        return self._loop.time()


def run_jumping(work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` in a `JumpingLoop`."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(work)
