"""What operators change in files, and its entry in the audit: files and store have no transaction in common.

    intent    who wants what is stored                      cut from here on: the next start writes `<action>.cut`
    act       files change (`rotation`, `vault`)            refused: nothing was changed, the intent is taken back
    entry     it is written, and the intent goes, in one    -> none
              transaction

So nothing changes without a word of it in the store. An act that fails half-way is cut, too: its files are finished or
taken back by the next start, and only then does the entry say what is in force.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable

import msgspec

from appliance.controller import records
from appliance.controller.audit import Note
from appliance.controller.records import INTENT_PREFIX
from appliance.controller.registry import Registry
from appliance.controller.store.port import Compare, Delete, Put, Store
from appliance.controller.web import ProblemError
from appliance.errors import StoreError

_log = logging.getLogger(__name__)


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """An act that has no entry yet. `at` is seconds since 1970."""

    at: float
    actor: str
    action: str
    subject: str
    reason: str


class Intents:
    """Acts on files, each with an entry. One loop only."""

    def __init__(self, registry: Registry, store: Store, *, wall: Callable[[], float]) -> None:
        self._registry = registry
        self._store = store
        self._wall = wall

    @contextlib.asynccontextmanager
    async def audited(self, wish: Note, detail: Callable[[], str]) -> AsyncIterator[None]:
        """Has an act carried out within it: the entry is written at its end.

        Args:
            wish: what an entry needs; its detail is the operator's reason.
            detail: asked after the act for what the entry tells.

        Raises:
            StoreError: at the begin, and nothing was done; or at the end, and the next start writes the entry.
        """
        key = f"{INTENT_PREFIX}{uuid.uuid4().hex}"
        intent = Intent(at=self._wall(), actor=wish.actor, action=wish.action, subject=wish.subject, reason=wish.detail)
        await self._registry.put_aside(Put(key, records.encode(intent)))
        try:
            yield
        except ProblemError:
            await self._registry.put_aside(Delete(key))
            raise
        async with self._registry.turn():
            done = wish._replace(detail=detail())
            await self._registry.commit_noted([], [done], writes=[Delete(key)])

    async def settle(self, in_force: str) -> None:
        """Writes the entries of acts that were cut. At the start, when their files are finished or taken back.

        Args:
            in_force: what is so now, for people.
        """
        for found in await self._store.range(INTENT_PREFIX):
            intent = records.decode(found.value, Intent, found.key)
            detail = f"begun at {int(intent.at)} and cut before it was noted; in force is {in_force}"
            note = Note(
                intent.actor, f"{intent.action}.cut", intent.subject,
                f"{detail}: {intent.reason}" if intent.reason else detail,
            )  # fmt: skip
            _log.warning("%s of %s: %s", note.action, note.actor, note.detail)
            try:
                async with self._registry.turn():
                    still = Compare(found.key, "mod_revision", "=", found.mod_revision)
                    await self._registry.commit_noted([], [note], compares=[still], writes=[Delete(found.key)])
            except StoreError as error:  # links matter more; the next start tries again
                _log.error("what was cut is not in the audit yet: %s", error.message)
